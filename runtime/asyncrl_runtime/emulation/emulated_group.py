"""Weight groups without a collective: joining and broadcasting take the time that the device model says."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from asyncrl_runtime.emulation.device import DeviceModel
from asyncrl_runtime.emulation.emulated_server import Pace


class EmulatedGroups:
    """Implements WeightGroups, and its group and meeting place: there is nothing to tell apart."""

    port = 1
    """Nobody listens there; the emulated engines do not ask."""

    def __init__(self, model: DeviceModel, pace: Pace) -> None:
        self._model = model
        self._pace = pace

    def open_place(self, host: str) -> "EmulatedGroups":
        return self

    async def form(
        self, world_size: int, name: str, backend: str, timeout_seconds: float
    ) -> "EmulatedGroups":
        await self._pace.sleep(self._model.weights.join_seconds)
        return self

    def close(self) -> None:
        pass

    async def broadcast(self, data: Tensor) -> None:
        await self._pace.sleep(transfer_seconds(self._model, data.nbytes))

    async def leave(self) -> None:
        pass


def bucket_bytes(shapes: Sequence[Sequence[int]], dtypes: Sequence[str]) -> int:
    """Return the bytes of tensors of these shapes and of these dtypes, by torch's names."""
    sizes = (int(getattr(torch, dtype).itemsize) for dtype in dtypes)
    return sum(math.prod(shape) * size for shape, size in zip(shapes, sizes, strict=True))


def transfer_seconds(model: DeviceModel, num_bytes: int) -> float:
    """Return how long so many bytes of weights are on their way."""
    return num_bytes / model.weights.bytes_per_second
