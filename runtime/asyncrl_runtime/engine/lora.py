"""LoRA adapters, read from PEFT's folders and added to linear layers for the tokens that use them."""

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from asyncrl_runtime.engine.fields import BadRequest

PREFIX = "base_model.model."
"""The prefix of the model's own names in PEFT's files."""
OTHER_KINDS = (
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "kasa_config", "layer_replication",
    "lora_bias", "modules_to_save", "monteclora_config", "rank_pattern", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora",
)  # fmt: skip
"""Fields of PEFT's config that, if set, ask for more than a product of two matrices at each target."""


class Delta(NamedTuple):
    """The term that an adapter adds to one linear layer: scale * x @ down @ up."""

    down: Tensor
    """[in, rank], PEFT's lora_A, transposed for the same reason as linear weights."""
    up: Tensor
    """[rank, out], PEFT's lora_B, transposed."""


@dataclass(eq=False, frozen=True, slots=True)
class LoadedAdapter:
    """A folder as it was when it was read; read again, it is another adapter with a cache of its own."""

    deltas: Mapping[str, Delta]
    """The deltas, by the names of their linear layers."""
    scale: float
    uid: str = field(default_factory=lambda: uuid.uuid4().hex)


class Share(NamedTuple):
    """The tokens of a forward that go through one adapter."""

    adapter: LoadedAdapter
    rows: Tensor | None
    """[n] int64, the places of the tokens in the forward; None for all tokens."""


class AdaptedLayers:
    """Adds adapters to layers through hooks, which exist only while an adapter is in the batch.

    Layers of another class would change the parameters' names, and would cost time even without an adapter.
    """

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        self._layers = layers
        self._shares: Sequence[Share] = ()
        self._hooked: set[LoadedAdapter] = set()
        self._hooks: list[RemovableHandle] = []

    def apply(self, shares: Sequence[Share]) -> None:
        """Make the next forward add these shares, whose rows are places among its tokens."""
        self._shares = shares
        adapters = {share.adapter for share in shares}
        if adapters == self._hooked:
            return
        for hook in self._hooks:
            hook.remove()
        targets = {name for adapter in adapters for name in adapter.deltas}
        self._hooks = [
            layer.register_forward_hook(partial(self._add, name))
            for name, layer in self._layers.items()
            if name in targets
        ]
        self._hooked = adapters

    def _add(self, name: str, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        add_deltas(self._shares, name, inputs[0], output)


def split(adapters: Sequence[LoadedAdapter | None]) -> list[Share]:
    """Group tokens by adapter, given the adapter of each; None (the base model alone) makes no share."""
    distinct = set(adapters)
    if len(distinct) == 1:
        (only,) = distinct
        return [] if only is None else [Share(only, None)]
    return [
        Share(adapter, torch.tensor([i for i, other in enumerate(adapters) if other is adapter]))
        for adapter in distinct
        if adapter is not None
    ]


def add_deltas(shares: Sequence[Share], layer: str, x: Tensor, out: Tensor) -> None:
    """Add the adapters' deltas for a linear layer to `out`, [..., out], its output for `x`, [..., in]."""
    inputs, outputs = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    for adapter, rows in shares:
        delta = adapter.deltas.get(layer)
        if delta is None:
            continue
        if rows is None:
            outputs.addmm_(inputs @ delta.down, delta.up, alpha=adapter.scale)
        else:
            outputs.index_add_(0, rows, inputs[rows] @ delta.down @ delta.up, alpha=adapter.scale)


class _Config(msgspec.Struct, frozen=True):
    """The fields of `adapter_config.json` that are used."""

    peft_type: Literal["LORA"]
    r: Annotated[int, msgspec.Meta(ge=1)]
    lora_alpha: float
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def read_adapter(folder: Path, layers: Mapping[str, nn.Linear], dtype: torch.dtype) -> LoadedAdapter:
    """Read an adapter for these layers, as PEFT's `save_pretrained` writes it.

    Raises:
        BadRequest: the folder lacks a file or holds a broken one, the adapter is not plain LoRA, or it was
            made for other layers.
    """
    try:
        config = _parse_config((folder / "adapter_config.json").read_bytes())
        tensors = load_file(folder / "adapter_model.safetensors")
        # If the model's head is a target, PEFT adds a copy of it; as in SGLang, the copy is ignored.
        halves = {name: t for name, t in tensors.items() if not name.endswith(".base_layer.weight")}
        return LoadedAdapter(_build_deltas(halves, layers, config.r, dtype), config.scale)
    except (OSError, ValueError, msgspec.DecodeError, SafetensorError) as error:
        raise BadRequest(f"LoRA adapter in {folder} cannot be loaded: {error}") from error


def _parse_config(data: bytes) -> _Config:
    """Return the parsed config.

    Raises:
        ValueError, msgspec.DecodeError: it is not a config, or not one of plain LoRA.
    """
    given: Any = msgspec.json.decode(data)
    config = msgspec.convert(given, _Config)
    others = [name for name in OTHER_KINDS if given.get(name)]
    if given.get("bias", "none") != "none":
        others.append("bias")
    if others:
        raise ValueError(f"{', '.join(others)} not implemented by this engine")
    return config


def _build_deltas(
    tensors: Mapping[str, Tensor], layers: Mapping[str, nn.Linear], rank: int, dtype: torch.dtype
) -> dict[str, Delta]:
    """Return the deltas by target.

    Raises:
        ValueError: there are not two fitting tensors for each target, or a target is not one of the layers.
    """
    targets = {name.removeprefix(PREFIX).rpartition(".lora_")[0] or name for name in tensors}
    strangers = sorted(targets - layers.keys())
    if strangers:
        raise ValueError(f"{strangers[0]} is not a linear layer of the model")
    wanted = {_name(target, "A"): [rank, layers[target].in_features] for target in targets}
    wanted |= {_name(target, "B"): [layers[target].out_features, rank] for target in targets}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(f"{name} has shape {found.get(name)}, expected {wanted.get(name)}")

    def half(target: str, letter: str) -> Tensor:
        tensor = tensors[_name(target, letter)].t()
        # Always a copy: a loaded tensor may be a view of the file, and the file may be replaced.
        return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)

    return {target: Delta(half(target, "A"), half(target, "B")) for target in targets}


def _name(target: str, letter: str) -> str:
    return f"{PREFIX}{target}.lora_{letter}.weight"
