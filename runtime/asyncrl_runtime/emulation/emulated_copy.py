"""A copy of weights that are none: it takes its time."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from asyncrl_runtime.contract.messages import BucketLayout

BYTES_PER_SECOND = 25e9
"""What a GPU copies into pinned host memory over PCIe 4.0 x16, whose nominal rate is 31.5 GB/s each way."""


class EmulatedCopy:
    """Implements RankCopy. Gathering takes no time: it runs beside the broadcasts of the weight group.

    Args:
        layout: the buckets of the weights, which have a size, and no memory.
        spend: lets model seconds pass.
        gpus: the number of GPUs that copy a share each.
    """

    def __init__(self, layout: Sequence[BucketLayout], spend: Callable[[float], None], gpus: int) -> None:
        self.layout = tuple(layout)
        self._spend = spend
        self._sizes = {each.names: each.shapes[0][0] for each in self.layout}
        self._seconds = sum(self._sizes.values()) / gpus / BYTES_PER_SECOND

    def take(self) -> None:
        self._spend(self._seconds)

    def gather(self, names: tuple[str, ...]) -> Tensor:
        """Return a bucket that has its size, and no memory."""
        return torch.empty(self._sizes[names], dtype=torch.uint8, device="meta")

    def serve(self) -> None:
        """Rank 0 asks for nothing."""

    def close(self) -> None:
        """There is nothing to end."""
