"""Weights in the form in which they travel: one after another, as SGLang's `flattened_bucket`."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bucket:
    """Some of the weights, and how the receiver tells them apart."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    """The dtypes as torch calls them: `bfloat16`."""
    shapes: tuple[tuple[int, ...], ...]
    data: Tensor
    """[bytes] uint8: all the weights, without gaps."""


class BucketBuffer:
    """Memory for one bucket at a time, used again: fresh memory for each would more than double the time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def fill(self, weights: Iterable[tuple[str, Tensor]], num_bytes: int, device: torch.device) -> Bucket:
        """Copy weights, `num_bytes` in all, into a bucket that stays valid until the next one."""
        if self._memory.nbytes < num_bytes or self._memory.device != device:
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old memory is freed first
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        data, start = self._memory[:num_bytes], 0
        described = []
        for name, tensor in weights:
            data[start : start + tensor.nbytes].copy_(tensor.reshape(-1).view(torch.uint8))
            start += tensor.nbytes
            described.append((name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)))
        names, dtypes, shapes = zip(*described, strict=True)
        return Bucket(names, dtypes, shapes, data)
