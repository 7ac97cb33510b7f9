"""Weights in the form in which they travel: one after another, as SGLang's `flattened_bucket`."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from asyncrl_runtime.contract.messages import BucketLayout


@dataclass(frozen=True)
class PublishedWeights:
    """What a publisher of weights sends: always the same buckets, at least one, in the same order."""

    layout: tuple[BucketLayout, ...]
    gather: Callable[[tuple[str, ...]], Awaitable[Tensor]]
    """Returns weights as they are now, given by name: [bytes] uint8, without gaps. They are valid until the
    second one after them is asked for: there is memory for two buckets, one that is sent and one that is
    gathered meanwhile."""


def describe(weights: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> BucketLayout:
    """Return the layout of a bucket of these weights: name, dtype and shape of each."""
    names, dtypes, shapes = zip(*weights, strict=True)
    return BucketLayout(names, tuple(str(dtype).removeprefix("torch.") for dtype in dtypes), shapes)


class BucketBuffer:
    """Memory for two buckets in turn, used again: fresh memory for each would more than double the time."""

    def __init__(self) -> None:
        self._memory = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]

    def fill(self, weights: Iterable[tuple[str, Tensor]], num_bytes: int, device: torch.device) -> Tensor:
        """Copy weights, `num_bytes` in all; [bytes] uint8, valid until the next call but one."""
        self._memory.reverse()
        if self._memory[0].nbytes < num_bytes or self._memory[0].device != device:
            self._memory[0] = torch.empty(0, dtype=torch.uint8)  # the old memory is freed first
            self._memory[0] = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        data, start = self._memory[0][:num_bytes], 0
        for _, tensor in weights:
            data[start : start + tensor.nbytes].copy_(tensor.reshape(-1).view(torch.uint8))
            start += tensor.nbytes
        return data
