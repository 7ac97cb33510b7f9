"""Copies new weights into the live parameters, from a broadcast by another process or from a folder."""

import contextlib
import hashlib
import logging
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from asyncrl_api.exits import ExitError
from asyncrl_runtime.engine.fields import BadRequest
from asyncrl_runtime.engine.model import CausalModel, load_weights
from asyncrl_runtime.weights.group import join_group, leave_group

logger = logging.getLogger(__name__)

ALIGNMENT = 64
"""The multiple, in bytes, at which tensors that are received one by one start within the buffer."""


class InitGroup(msgspec.Struct, frozen=True):
    """The body of `/init_weights_update_group`."""

    master_address: str
    master_port: int
    rank_offset: int
    """The rank of this engine; the sender has rank 0."""
    world_size: int
    group_name: str = "weight_update_group"
    backend: str = "nccl"


class Tensors(msgspec.Struct, frozen=True):
    """The body of `/update_weights_from_distributed`: the tensors that are broadcast, in this order."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    group_name: str = "weight_update_group"
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None
    load_format: str | None = None
    """The form of the tensors. `flattened_bucket`: all bytes as one uint8 tensor; else a broadcast each."""


class WeightLoader:
    """Loads weights on the scheduler's thread: nothing is sampled while one of its methods runs.

    As in SGLang, joining a group blocks until all members have joined, and the buckets of a session are
    loaded one by one, each once it has arrived as a whole.
    """

    tp_size = 1
    """The number of members of a group that this engine counts for."""

    def __init__(self, model: CausalModel) -> None:
        self._model = model
        self._parameters = model.parameters()
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._is_open = False
        self._buffer = torch.empty(0, dtype=torch.uint8)
        """The buffer for buckets, reused: fresh memory for each more than doubles the time of an update."""

    def init_group(self, body: InitGroup) -> str:
        try:
            group = join_group(
                body.master_address,
                body.master_port,
                body.rank_offset,
                body.world_size,
                body.group_name,
                body.backend,
            )
        except (RuntimeError, ValueError, TypeError) as error:
            raise BadRequest(f"Failed to initialize custom process group: {_first_line(error)}.") from error
        self._groups[body.group_name] = group
        return "Succeeded to initialize custom process group."

    def destroy_group(self, name: str) -> str:
        group = self._groups.pop(name, None)
        if group is None:
            raise BadRequest("The group to be destroyed does not exist.")
        leave_group(group)
        return "Succeeded to destroy custom process group."

    def begin(self) -> str:
        if self._is_open:
            raise BadRequest("begin_weight_update called while a weight-update session is already open")
        self._is_open = True
        return "Success"

    def end(self) -> str:
        if not self._is_open:
            raise BadRequest("end_weight_update called without begin_weight_update")
        self._is_open = False
        return "Success"

    def receive(self, body: Tensors) -> str:
        """Take part in the broadcasts that `body` announces, then load the tensors that came.

        Raises:
            BadRequest: there is no session or group (nothing was received), the sender went away (nothing
                was loaded), or a shape does not fit (the tensors before it were loaded).
        """
        if not self._is_open:
            raise BadRequest(
                "update_weights_from_distributed must run between begin_weight_update() and "
                "end_weight_update()"
            )
        try:
            self.load(self._broadcast(body))
        except (RuntimeError, ValueError, AttributeError) as error:
            message = (
                f"Failed to update parameter online: {_first_line(error)}. The full weights of the "
                "ModelRunner are partially updated. Please discard the whole weights."
            )
            logger.error(message)
            raise BadRequest(message) from error
        return "Succeeded to update parameter online."

    def load(self, tensors: list[tuple[str, Tensor]]) -> None:
        """Copy tensors into the parameters of the same names; a name that no parameter has is skipped.

        Raises:
            ValueError: a shape does not fit.
        """
        for name, tensor in tensors:
            parameter = self._parameters.get(name)
            if parameter is None:
                continue
            if parameter.shape != tensor.shape:
                raise ValueError(f"{name} has shape {list(parameter.shape)}, not {list(tensor.shape)}")
            if parameter.dim() == 2 and not parameter.is_contiguous():  # stored transposed
                parameter, tensor = parameter.t(), tensor.t()  # the way in which torch copies by blocks
            parameter.copy_(tensor)

    def load_folder(self, folder: Path) -> str:
        """Load a whole model folder with the same shapes; nothing changes unless all of it fits."""
        if self._load_files(folder):
            return "Succeeded to update model weights."
        try:
            fresh = dict(load_weights(folder, self._model.dtype).named_parameters(remove_duplicate=False))
        except ExitError as error:
            raise BadRequest(f"Failed to update weights: {error}.") from error
        shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        if shapes != {name: parameter.shape for name, parameter in fresh.items()}:
            raise BadRequest(f"Failed to update weights: {folder} holds a model of another shape.")
        self.load(list(fresh.items()))
        return "Succeeded to update model weights."

    def _load_files(self, folder: Path) -> bool:
        """Load from the files themselves, which is as fast as memory is; return whether that was possible.

        It is if every weight stands there under the name of its parameter, and in its shape.
        """
        with contextlib.ExitStack() as stack:
            try:
                paths = sorted(folder.glob("*.safetensors"))
                files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
                found = {name: file for file in files for name in file.keys()}  # noqa: SIM118  # no mapping
                shapes = {name: found[name].get_slice(name).get_shape() for name in found}
            except (OSError, SafetensorError):
                return False  # the library that reads it as a model says what is wrong
            known = {name: self._parameters.get(name) for name in found}
            places = {each.data_ptr() for each in known.values() if each is not None}
            is_all = {each.data_ptr() for each in self._parameters.values()} <= places
            if not is_all or any(
                parameter is None or list(parameter.shape) != shapes[name]
                for name, parameter in known.items()
            ):
                return False
            for name, file in found.items():
                self.load([(name, file.get_tensor(name))])
        return True

    def checksums(self) -> dict[str, str]:
        """Return the SHA-256 of each parameter's bytes, independent of their layout in memory."""
        return {
            name: hashlib.sha256(parameter.contiguous().view(torch.uint8).numpy().data).hexdigest()
            for name, parameter in sorted(self._parameters.items())
        }

    def rows_of(self, name: str, num_rows: int) -> list[Any]:
        """Return the first entries of a parameter along its first axis."""
        parameter = self._parameters.get(name)
        if parameter is None:
            raise BadRequest("Get parameter by name failed")
        rows: list[Any] = parameter[:num_rows].float().tolist()
        return rows

    def _broadcast(self, body: Tensors) -> list[tuple[str, Tensor]]:
        """Receive all tensors; they may be views of the buffer, valid until the next call."""
        group = self._groups.get(body.group_name)
        if group is None:
            raise ValueError(
                f"Group {body.group_name} not in {list(self._groups)}. "
                "Please call `init_weights_update_group` first"
            )
        if body.load_format not in (None, "flattened_bucket"):
            raise ValueError(f"load_format {body.load_format!r} is not implemented by this engine")
        is_flat = body.load_format == "flattened_bucket"
        places, num_bytes = _lay_out(body, 1 if is_flat else ALIGNMENT)
        if num_bytes > len(self._buffer):
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8)
        slices = [self._buffer[place.start : place.end] for place in places]
        for part in [self._buffer[:num_bytes]] if is_flat else slices:
            dist.broadcast(part, src=0, group=group)
        return [(place.name, place.view(self._buffer)) for place in places]


class _Place(msgspec.Struct, frozen=True):
    """The place of a tensor in the buffer, in bytes."""

    name: str
    dtype: Any
    shape: list[int]
    start: int
    end: int

    def view(self, buffer: Tensor) -> Tensor:
        part = buffer[self.start : self.end]
        if self.start % self.dtype.itemsize:
            part = part.clone()  # torch cannot view memory that is not aligned
        return part.view(self.dtype).view(self.shape)


def _lay_out(body: Tensors, alignment: int) -> tuple[list[_Place], int]:
    """Return the places of a bucket's tensors, one after the other, and the bytes that they take in all."""
    places = []
    end = 0
    for name, dtype_name, shape in zip(body.names, body.dtypes, body.shapes, strict=True):
        dtype = getattr(torch, dtype_name)
        start = -(-end // alignment) * alignment
        end = start + dtype.itemsize * torch.Size(shape).numel()
        places.append(_Place(name, dtype, shape, start, end))
    return places, end


def _first_line(error: Exception) -> str:
    """Return an error's message without the C++ stack that torch appends."""
    return str(error).strip().split("\n", 1)[0].rstrip(".")
