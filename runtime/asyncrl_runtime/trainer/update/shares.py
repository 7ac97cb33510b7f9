"""What one rank trains of a step, and how it comes to that rank: as arrays, to nobody else.

A whole batch has about 14 bytes a token. Were it sent to every rank as Python objects, the trainer would wait
for seconds, and rank 0 would hold Python's lock meanwhile.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from asyncrl_runtime.trainer.update.packing import TrainingSample
from asyncrl_runtime.trainer.update.policy_api import StepSettings

MicroBatchSamples = tuple[TrainingSample, ...]


class MinibatchShare(NamedTuple):
    """One rank's part of a minibatch."""

    micro_batches: tuple[MicroBatchSamples, ...]
    """The same number on every rank; some may be empty."""
    num_tokens: int
    """The sampled tokens of the whole minibatch, over all ranks: the loss's denominator."""


@dataclass(frozen=True, eq=False)
class StepShare:
    """Everything that one rank needs for a step."""

    minibatches: tuple[MinibatchShare, ...]
    learning_rate: float
    settings: StepSettings
    skipped: frozenset[int] = frozenset()
    """The minibatches that an earlier attempt made no update of: it made none, so none is made now."""


@dataclass(frozen=True)
class ShareOutline:
    """What is the same in all ranks' shares, small enough to be broadcast, and how much follows for whom."""

    num_micro_batches: tuple[int, ...]
    """Their number in each minibatch."""
    num_tokens: tuple[int, ...]
    """The sampled tokens of each minibatch, over all ranks."""
    learning_rate: float
    settings: StepSettings
    skipped: frozenset[int]
    num_samples: tuple[int, ...]
    """The samples that each rank gets."""


def outline(shares: Sequence[StepShare]) -> ShareOutline:
    """Return what all ranks are told before each gets its share, by rank."""
    first = shares[0]
    return ShareOutline(
        num_micro_batches=tuple(len(part.micro_batches) for part in first.minibatches),
        num_tokens=tuple(part.num_tokens for part in first.minibatches),
        learning_rate=first.learning_rate,
        settings=first.settings,
        skipped=first.skipped,
        num_samples=tuple(sum(1 for _ in _placed(share)) for share in shares),
    )


def send_share(share: StepShare, rank: int, group: dist.ProcessGroup) -> None:
    """Send a rank its share; it calls `receive_share`."""
    placed = list(_placed(share))
    if not placed:
        return
    samples = [sample for _, _, sample in placed]
    rows = [
        [*place, s.ticket, s.index, len(s.prompt_ids), len(s.response_ids), s.staleness is not None]
        for *place, s in placed
    ]
    _send(np.array(rows, dtype=np.int64), rank, group)
    _send(np.array([[s.advantage, s.temperature] for s in samples]), rank, group)
    for column in _COLUMNS:
        arrays = [array for s in samples if (array := column.of(s)) is not None]
        if arrays:
            _send(np.concatenate(arrays), rank, group)


def receive_share(told: ShareOutline, rank: int, group: dist.ProcessGroup) -> StepShare:
    """Return the share that rank 0 sends this rank."""
    parts: list[list[list[TrainingSample]]] = [[[] for _ in range(n)] for n in told.num_micro_batches]
    for minibatch, micro_batch, sample in _receive_samples(told.num_samples[rank], group):
        parts[minibatch][micro_batch].append(sample)
    minibatches = tuple(
        MinibatchShare(tuple(map(tuple, part)), num_tokens)
        for part, num_tokens in zip(parts, told.num_tokens, strict=True)
    )
    return StepShare(minibatches, told.learning_rate, told.settings, told.skipped)


def _receive_samples(count: int, group: dist.ProcessGroup) -> Iterator[tuple[int, int, TrainingSample]]:
    if count == 0:
        return
    rows = _receive(7 * count, np.int64, group).reshape(count, 7)
    numbers = _receive(2 * count, np.float64, group).reshape(count, 2)
    arrays = []
    for column in _COLUMNS:
        lengths = column.lengths(rows)
        flat = _receive(int(lengths.sum()), column.dtype, group)
        ends = lengths.cumsum()
        arrays.append([flat[end - length : end] for end, length in zip(ends, lengths, strict=True)])
    for place, row in enumerate(rows.tolist()):
        prompt_ids, response_ids, logprobs, sampled, in_loss, staleness = (each[place] for each in arrays)
        yield (
            row[0],
            row[1],
            TrainingSample(
                ticket=row[2],
                index=row[3],
                prompt_ids=prompt_ids,
                response_ids=response_ids,
                behavior_logprobs=logprobs,
                sampled_mask=sampled,
                loss_mask=in_loss,
                advantage=float(numbers[place, 0]),
                temperature=float(numbers[place, 1]),
                staleness=staleness if row[6] else None,
            ),
        )


class _Column(NamedTuple):
    """A per-token array of samples, end to end."""

    dtype: Any
    of: Callable[[TrainingSample], NDArray[Any] | None]
    lengths: Callable[[NDArray[np.int64]], NDArray[np.int64]]
    """Returns the lengths of the arrays, from the samples' rows."""


_COLUMNS = (
    _Column(np.int32, lambda s: s.prompt_ids, lambda rows: rows[:, 4]),
    _Column(np.int32, lambda s: s.response_ids, lambda rows: rows[:, 5]),
    _Column(np.float32, lambda s: s.behavior_logprobs, lambda rows: rows[:, 5]),
    _Column(np.bool_, lambda s: s.sampled_mask, lambda rows: rows[:, 5]),
    _Column(np.bool_, lambda s: s.loss_mask, lambda rows: rows[:, 5]),
    _Column(np.int32, lambda s: s.staleness, lambda rows: rows[:, 5] * rows[:, 6]),
)


def _placed(share: StepShare) -> Iterator[tuple[int, int, TrainingSample]]:
    """Yield each sample with its minibatch and its micro-batch."""
    for number, minibatch in enumerate(share.minibatches):
        for place, samples in enumerate(minibatch.micro_batches):
            for sample in samples:
                yield number, place, sample


def _send(array: NDArray[Any], rank: int, group: dist.ProcessGroup) -> None:
    # As bytes, since a backend knows few types.
    dist.send(torch.from_numpy(array.reshape(-1).view(np.uint8)), dst=rank, group=group)


def _receive(count: int, dtype: Any, group: dist.ProcessGroup) -> NDArray[Any]:
    if count == 0:
        return np.empty(0, dtype)
    data = torch.empty(count * np.dtype(dtype).itemsize, dtype=torch.uint8)
    dist.recv(data, src=0, group=group)
    return data.numpy().view(dtype)
