"""Copies of what is trained, from which engines get it while the next step changes the original."""

import asyncio
from typing import Protocol

import torch
from torch import Tensor

from asyncrl_runtime.weights.adapter_publisher import Adapter, AdapterSource
from asyncrl_runtime.weights.bucket import BucketBuffer, PublishedWeights


class WeightsCopy(Protocol):
    """What is published. It must not be taken anew while a publication reads it."""

    async def take(self) -> None:
        """Copy what is trained, as it is now."""
        ...


class HostCopy:
    """All weights in host memory of rank 0, allocated with the first copy, pinned if they come from a GPU.

    Args:
        weights: what is copied.
        device: where buckets are sent from, if not from host memory: NCCL sends from a GPU.
    """

    def __init__(self, weights: PublishedWeights, device: torch.device | None = None) -> None:
        self._weights = weights
        self._device = device
        self._kept: dict[tuple[str, ...], Tensor] = {}
        self._buffer = BucketBuffer()

    async def take(self) -> None:
        for layout in self._weights.layout:
            bucket = await self._weights.gather(layout.names)
            await asyncio.to_thread(self._keep, layout.names, bucket)

    @property
    def published(self) -> PublishedWeights:
        """The copy, in the form in which it is published."""
        return PublishedWeights(self._weights.layout, self._send)

    def _keep(self, names: tuple[str, ...], bucket: Tensor) -> None:
        if names not in self._kept:
            self._kept[names] = torch.empty(bucket.nbytes, dtype=torch.uint8, pin_memory=bucket.is_cuda)
        self._kept[names].copy_(bucket)

    async def _send(self, names: tuple[str, ...]) -> Tensor:
        kept = self._kept[names]
        if self._device is None:
            return kept
        return await asyncio.to_thread(self._buffer.fill, [("", kept)], kept.nbytes, self._device)


class AdapterCopy:
    """The adapters as an engine loads them."""

    def __init__(self, load: AdapterSource) -> None:
        self._load = load
        self._kept: Adapter | None = None

    async def take(self) -> None:
        self._kept = await self._load()

    async def load(self) -> Adapter:
        assert self._kept is not None, "it is copied first"
        return self._kept
