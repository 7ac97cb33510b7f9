"""Turns samples into micro-batches: which sample goes where, and the flat tensors for model and loss.

There is no padding: the sequences of a micro-batch lie end to end in one row of T tokens, and everything a
loss needs exists only for the R tokens that the policy sampled. Pure, apart from the tensors it makes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncrl_runtime.model.attention import AttentionPlan, plan_attention


@dataclass(frozen=True, eq=False)
class TrainingSample:
    """One response with its advantage, ready to be trained on. R is the number of tokens after the prompt."""

    ticket: int
    index: int
    prompt_ids: NDArray[np.int32]
    response_ids: NDArray[np.int32]
    """[R] everything after the prompt, including what the environment said between turns."""
    behavior_logprobs: NDArray[np.float32]
    """[R] natural logarithms at `temperature`; 0 for tokens that the policy did not sample."""
    sampled_mask: NDArray[np.bool_]
    """[R] the tokens that the policy sampled. They make up the loss's denominator."""
    loss_mask: NDArray[np.bool_]
    """[R] the tokens that the policy sampled and that are not masked as stale."""
    advantage: float
    temperature: float
    staleness: NDArray[np.int32] | None = None
    """[R] training version minus the version that sampled the token; for diagnostics only."""

    def __post_init__(self) -> None:
        name = f"sample {self.ticket}/{self.index}"
        sizes = {
            len(self.response_ids),
            len(self.behavior_logprobs),
            len(self.sampled_mask),
            len(self.loss_mask),
        }
        if self.staleness is not None:
            sizes.add(len(self.staleness))
        if len(sizes) != 1 or 0 in sizes or len(self.prompt_ids) == 0:
            raise ValueError(
                f"{name}: per-token arrays of {sorted(sizes)} tokens, prompt of {len(self.prompt_ids)}"
            )
        if (self.loss_mask & ~self.sampled_mask).any():
            raise ValueError(f"{name}: a token in the loss that the policy did not sample")
        if not (
            self.temperature > 0 and np.isfinite(self.advantage) and np.isfinite(self.behavior_logprobs).all()
        ):
            raise ValueError(
                f"{name}: temperature {self.temperature}, advantage {self.advantage}, or log-probs not finite"
            )

    @property
    def num_tokens(self) -> int:
        """The tokens of prompt and response together, which the sample takes up in a micro-batch."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def num_sampled_tokens(self) -> int:
        return int(self.sampled_mask.sum())


def allocate(
    lengths: Sequence[int], capacity: int, min_bins: int = 1, multiple_of: int = 1
) -> list[list[int]]:
    """Distribute sequences over micro-batches of at most `capacity` tokens (AReaL, arXiv 2505.24298, alg. 1).

    The longest sequence comes first. A sequence opens a micro-batch if there are fewer than k_min or none has
    room; otherwise it joins, of those with room, the one with the fewest sequences. k_min grows until the
    number of micro-batches is a multiple of `multiple_of`. The result is deterministic.

    Returns:
        Indices into `lengths` by micro-batch; some are empty if there are too few sequences.

    Raises:
        ValueError: a sequence is longer than `capacity`.
    """
    for index, length in enumerate(lengths):
        if length > capacity:
            raise ValueError(f"sequence {index} of {length} tokens exceeds tokensPerMicroBatch {capacity}")
    min_bins = _round_up(min_bins, multiple_of)
    while True:
        bins = _allocate_at_least(lengths, capacity, min_bins)
        if len(bins) % multiple_of == 0 and len(bins) >= min_bins:
            return bins
        if len(bins) == len(lengths):  # each sequence has a micro-batch of its own
            return bins + [[] for _ in range(max(min_bins, _round_up(len(bins), multiple_of)) - len(bins))]
        min_bins = _round_up(len(bins), multiple_of)


def _round_up(number: int, multiple_of: int) -> int:
    return -(-number // multiple_of) * multiple_of


def _allocate_at_least(lengths: Sequence[int], capacity: int, min_bins: int) -> list[list[int]]:
    bins: list[list[int]] = []
    # These are arrays, since B*G sequences times as many micro-batches are too much for Python at full size.
    num_tokens, num_sequences = (np.zeros(len(lengths), dtype=np.int64) for _ in range(2))
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        has_room = np.flatnonzero(num_tokens[: len(bins)] + lengths[index] <= capacity)
        if len(bins) < min_bins or len(has_room) == 0:
            chosen = len(bins)
            bins.append([])
        else:
            chosen = int(has_room[num_sequences[has_room].argmin()])
        bins[chosen].append(index)
        num_tokens[chosen] += lengths[index]
        num_sequences[chosen] += 1
    return bins


def distribute(lengths: Sequence[int], capacity: int, num_ranks: int) -> list[list[list[int]]]:
    """Distribute one minibatch's sequences over data-parallel ranks.

    Returns:
        Indices into `lengths`, by rank and micro-batch. Every rank has the same number of micro-batches, at
        least one, and the i-th ones are of similar size on all ranks, because under ZeRO 2 and 3 the ranks
        wait for each other in every one. Empty micro-batches are packed and run like the others, so that
        collectives stay collective.
    """
    bins = allocate(lengths, capacity, min_bins=num_ranks, multiple_of=num_ranks)
    bins.sort(key=lambda indices: -sum(lengths[i] for i in indices))  # stable, hence deterministic
    return [bins[rank::num_ranks] for rank in range(num_ranks)]


def split_minibatches(tickets: Sequence[int], count: int) -> list[list[int]]:
    """Split a step's samples into minibatches of whole prompt groups, so that each is centered by itself.

    Args:
        tickets: the ticket of each sample.
        count: the number of minibatches, at most the number of groups.

    Returns:
        Indices into `tickets` by minibatch, with groups in order of first appearance. The numbers of groups
        differ by at most one.

    Raises:
        ValueError: `count` is below 1 or above the number of groups.
    """
    groups: dict[int, list[int]] = {}
    for index, ticket in enumerate(tickets):
        groups.setdefault(ticket, []).append(index)
    if not 1 <= count <= len(groups):
        raise ValueError(f"{count} minibatches of {len(groups)} prompt groups")
    members = list(groups.values())
    bounds = [len(members) * part // count for part in range(count + 1)]
    return [[index for group in members[start:stop] for index in group] for start, stop in pairwise(bounds)]


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """The input of one forward and backward pass: T tokens in a row, R of them sampled by the policy.

    An empty micro-batch has one dummy token (T = 1) and R = 0, and hence a loss and gradients of zero.
    """

    input_ids: Tensor
    """[T] int64: the sequences end to end, longest first."""
    position_ids: Tensor
    """[T] int64: the positions, from 0 in each sequence."""
    attention_plan: AttentionPlan
    positions: Tensor
    """[R] int64: the place in the row of the logits that predict each sampled token."""
    targets: Tensor
    """[R] int64: the sampled tokens."""
    temperatures: Tensor
    """[R] float32: the temperatures by which the logits are divided."""
    behavior_logprobs: Tensor
    """[R] float32."""
    advantages: Tensor
    """[R] float32, equal within a sequence."""
    loss_mask: Tensor
    """[R] bool: False for a token that is masked as stale; it still counts in the denominator."""
    staleness: Tensor
    """[R] int32: -1 if it is not known."""
    sequences: Tensor
    """[R] int64: the sequence that a token belongs to, 0 <= sequence < num_sequences."""
    num_sequences: int

    @property
    def num_sampled_tokens(self) -> int:
        """R; summed over the micro-batches and ranks of a minibatch, it is the loss's denominator."""
        return len(self.targets)

    def to(self, device: torch.device) -> "MicroBatch":
        movable = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "num_sequences"}
        moved: dict[str, Any] = {name: value.to(device) for name, value in movable.items()}
        return replace(self, **moved)


class Announced(Sequence[MicroBatch]):
    """Micro-batches that are announced to whoever wants to know, as they are iterated over.

    Args:
        before: called before each, with its place.
        after: called after the last.
    """

    def __init__(
        self,
        batches: Sequence[MicroBatch],
        before: Callable[[int], None],
        after: Callable[[], None] = lambda: None,
    ) -> None:
        self._batches, self._before, self._after = batches, before, after

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, place: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[MicroBatch]: ...
    def __getitem__(self, place: int | slice) -> MicroBatch | Sequence[MicroBatch]:
        return self._batches[place]

    def __iter__(self) -> Iterator[MicroBatch]:
        for place, batch in enumerate(self._batches):
            self._before(place)
            yield batch
        self._after()


def pack(samples: Sequence[TrainingSample]) -> MicroBatch:
    """Lay `samples` end to end, longest first, as suits the attention plan; no samples give an empty one."""
    ordered = sorted(samples, key=lambda s: (-s.num_tokens, s.ticket, s.index))
    lengths = [s.num_tokens for s in ordered]
    starts = np.cumsum([0, *lengths[:-1]])
    sampled = [s.sampled_mask for s in ordered]
    counts = [s.num_sampled_tokens for s in ordered]

    def per_row(arrays: Sequence[NDArray[Any]], dtype: torch.dtype) -> Tensor:
        chosen = [array[mask] for array, mask in zip(arrays, sampled, strict=True)]
        return torch.as_tensor(np.concatenate(chosen) if chosen else np.empty(0), dtype=dtype)

    def repeated(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.repeat(np.asarray(values, dtype=np.float64), counts), dtype=dtype)

    rows = [ids for s in ordered for ids in (s.prompt_ids, s.response_ids)]
    # The logits at one place predict the token at the next.
    positions = [
        start + len(s.prompt_ids) - 1 + np.arange(len(s.response_ids))
        for start, s in zip(starts, ordered, strict=False)
    ]
    staleness = [
        np.full(len(s.response_ids), -1, np.int32) if s.staleness is None else s.staleness for s in ordered
    ]
    return MicroBatch(
        input_ids=torch.as_tensor(np.concatenate(rows) if rows else np.zeros(1), dtype=torch.int64),
        position_ids=torch.as_tensor(np.concatenate([np.arange(n) for n in lengths or [1]])),
        attention_plan=plan_attention(lengths or [1]),
        positions=per_row(positions, torch.int64),
        targets=per_row([s.response_ids for s in ordered], torch.int64),
        temperatures=repeated([s.temperature for s in ordered], torch.float32),
        behavior_logprobs=per_row([s.behavior_logprobs for s in ordered], torch.float32),
        advantages=repeated([s.advantage for s in ordered], torch.float32),
        loss_mask=per_row([s.loss_mask for s in ordered], torch.bool),
        staleness=per_row(staleness, torch.int32),
        sequences=repeated(range(len(ordered)), torch.int64),
        num_sequences=len(ordered),
    )
