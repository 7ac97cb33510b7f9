"""Copies of what is trained, from which engines get it while the next step changes the original.

Each rank copies its own share into its host memory, and that alone is waited for. Rank 0 gathers from the
ranks' copies afterwards, bucket after bucket, over a group of their own: the groups of the training carry the
next step meanwhile.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from asyncrl_runtime.contract.messages import BucketLayout
from asyncrl_runtime.weights.adapter_publisher import Adapter
from asyncrl_runtime.weights.bucket import BucketBuffer

GATHER_SECONDS = 600.0
"""How long rank 0 waits for another rank's share of one bucket."""
IDLE_SECONDS = 365 * 86400.0
"""How long a rank waits to be asked for a share: without end, since a job may wait for samples for days.
If rank 0 is gone, its connection breaks, or the rank's next command misses its own deadline."""
_CLOSE = -1

Shares = Callable[[Sequence[str]], Iterator[Tensor]]
"""Yields this rank's share of each of these weights: flat, and valid until the next one is asked for."""


class RankCopy(Protocol):
    """One rank's part of a copy."""

    def take(self) -> None:
        """Copy what is trained, as it is now; every rank does it. Nothing may read the copy meanwhile."""
        ...

    def serve(self) -> None:
        """Give rank 0 what it asks for, until it closes the copy; the other ranks call this in a thread.

        Raises:
            RuntimeError: rank 0 is gone.
        """
        ...

    def close(self) -> None:
        """End `serve` on the other ranks; rank 0 calls this."""
        ...


def share_of(num_elements: int, rank: int, num_ranks: int) -> slice:
    """Return a rank's share of a flat weight: the elements that ZeRO 3 would give it, without padding."""
    size = math.ceil(num_elements / num_ranks)
    return slice(min(rank * size, num_elements), min((rank + 1) * size, num_elements))


class ShareCopy:
    """One rank's share of all weights, in host memory that is allocated once; pinned, if they are on a GPU.

    Args:
        layout: the buckets in which rank 0 gathers the weights; the same on all ranks.
        group: all ranks, over gloo, with no other use.
        device: where rank 0 wants buckets, if not in host memory: NCCL sends from a GPU.
    """

    def __init__(
        self,
        layout: Sequence[BucketLayout],
        shares: Shares,
        group: dist.ProcessGroup,
        device: torch.device | None = None,
    ) -> None:
        self.layout = tuple(layout)
        self._shares = shares
        self._group = group
        self._rank, self._num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self._device = device
        self._numbers = {each.names: number for number, each in enumerate(self.layout)}
        self._kept: dict[int, Tensor] = {}
        self._received: dict[int, Tensor] = {}
        self._buffer = BucketBuffer()

    @property
    def num_bytes(self) -> int:
        """The size of this rank's share."""
        return sum(sum(_share_bytes(each, self._rank, self._num_ranks)) for each in self.layout)

    @torch.no_grad()
    def take(self) -> None:
        stream: torch.cuda.Stream | None = None
        for number, layout in enumerate(self.layout):
            start = 0
            for share in self._shares(layout.names):
                if share.is_cuda:
                    stream = torch.cuda.current_stream(share.device)
                if number not in self._kept:
                    size = sum(_share_bytes(layout, self._rank, self._num_ranks))
                    self._kept[number] = torch.empty(size, dtype=torch.uint8, pin_memory=share.is_cuda)
                kept = self._kept[number][start : start + share.nbytes]
                kept.copy_(share.view(torch.uint8), non_blocking=True)
                start += share.nbytes
        if stream is not None:
            stream.synchronize()

    def gather(self, names: tuple[str, ...]) -> Tensor:
        """Return a bucket of the copy, on rank 0: [bytes] uint8, valid until the next call but one.

        Raises:
            RuntimeError: another rank is gone, or has not answered for GATHER_SECONDS.
        """
        number = self._numbers[names]
        if self._num_ranks == 1 and self._device is None:
            return self._kept[number]
        shares = [self._kept[number], *self._receive(number)]
        lengths = [
            _share_bytes(self.layout[number], rank, self._num_ranks) for rank in range(self._num_ranks)
        ]
        device = self._device or torch.device("cpu")
        return self._buffer.fill(_interleaved(shares, lengths), sum(map(sum, lengths)), device)

    def _receive(self, number: int) -> list[Tensor]:
        """Return the other ranks' shares of a bucket; what the last call returned is no longer valid."""
        shares, waiting = [], []
        for rank in range(1, self._num_ranks):
            size = sum(_share_bytes(self.layout[number], rank, self._num_ranks))
            if rank not in self._received or self._received[rank].nbytes < size:
                is_pinned = self._device is not None and self._device.type == "cuda"
                self._received[rank] = torch.empty(size, dtype=torch.uint8, pin_memory=is_pinned)
            shares.append(self._received[rank][:size])
            if size:
                dist.send(torch.tensor([number]), rank, group=self._group)
                waiting.append(dist.irecv(shares[-1], rank, group=self._group))
        for each in waiting:
            assert each is not None
            each.wait(timedelta(seconds=GATHER_SECONDS))
        return shares

    def serve(self) -> None:
        asked = torch.empty(1, dtype=torch.int64)
        while True:
            dist.recv(asked, 0, group=self._group)
            if (number := int(asked)) == _CLOSE:
                return
            dist.send(self._kept[number], 0, group=self._group)

    def close(self) -> None:
        for rank in range(1, self._num_ranks):
            dist.send(torch.tensor([_CLOSE]), rank, group=self._group)


def _share_bytes(layout: BucketLayout, rank: int, num_ranks: int) -> list[int]:
    """Return the size of a rank's share of each weight of a bucket."""
    sizes = []
    for dtype, shape in zip(layout.dtypes, layout.shapes, strict=True):
        share = share_of(math.prod(shape), rank, num_ranks)
        itemsize: int = getattr(torch, dtype).itemsize
        sizes.append((share.stop - share.start) * itemsize)
    return sizes


def _interleaved(shares: Sequence[Tensor], lengths: Sequence[Sequence[int]]) -> Iterable[tuple[str, Tensor]]:
    """Yield the pieces of a bucket in order: of each weight, each rank's share.

    Args:
        lengths: the bytes of each weight, by rank.
    """
    starts = [0] * len(shares)
    for weight in range(len(lengths[0])):
        for rank, share in enumerate(shares):
            end = starts[rank] + lengths[rank][weight]
            yield "", share[starts[rank] : end]
            starts[rank] = end


class AdapterCopy:
    """The adapters as an engine loads them: rank 0 holds them whole, and the other ranks need not keep any.

    Args:
        load: returns them as they are now.
    """

    def __init__(self, load: Callable[[], Adapter], *, is_rank_0: bool) -> None:
        self._load = load
        self._is_rank_0 = is_rank_0
        self._kept: Adapter | None = None

    def take(self) -> None:
        if self._is_rank_0:
            self._kept = self._load()

    def load(self) -> Adapter:
        """Return the adapters of the copy, on rank 0."""
        assert self._kept is not None, "it is copied first"
        return self._kept

    def serve(self) -> None:
        """Rank 0 asks for nothing."""

    def close(self) -> None:
        """There is nothing to end."""


def make_copy_group() -> dist.ProcessGroup:
    """Make the group over which shares are gathered; collective, and called once by every rank."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=IDLE_SECONDS))
    assert isinstance(group, dist.ProcessGroup)
    return group
