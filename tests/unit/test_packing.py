"""Packing keeps every token once, whatever the lengths, ranks and minibatches."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl_runtime.trainer.update.packing import (
    MicroBatch,
    TrainingSample,
    allocate,
    distribute,
    pack,
    split_minibatches,
)

CAPACITY = 100
lengths_of_sequences = st.lists(st.integers(1, CAPACITY), max_size=60)


def make_sample(
    prompt: Sequence[int],
    response: Sequence[int],
    *,
    ticket: int = 0,
    index: int = 0,
    sampled: Sequence[bool] | None = None,
    live: Sequence[bool] | None = None,
    advantage: float = 1.0,
    temperature: float = 1.0,
) -> TrainingSample:
    sampled_mask = np.array([True] * len(response) if sampled is None else sampled)
    return TrainingSample(
        ticket=ticket,
        index=index,
        prompt_ids=np.array(prompt, np.int32),
        response_ids=np.array(response, np.int32),
        behavior_logprobs=-np.array(response, np.float32) / np.float32(100),
        sampled_mask=sampled_mask,
        loss_mask=sampled_mask if live is None else np.array(live),
        advantage=advantage,
        temperature=temperature,
        staleness=np.arange(len(response), dtype=np.int32),
    )


@given(lengths_of_sequences, st.integers(1, 5), st.integers(1, 5))
def test_allocation_keeps_every_sequence_once_within_capacity(
    lengths: list[int], min_bins: int, multiple_of: int
) -> None:
    bins = allocate(lengths, CAPACITY, min_bins, multiple_of)
    assert sorted(i for indices in bins for i in indices) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in indices) <= CAPACITY for indices in bins)
    assert len(bins) % multiple_of == 0 and len(bins) >= min_bins
    assert bins == allocate(lengths, CAPACITY, min_bins, multiple_of)
    assert all(bins) or all(len(indices) <= 1 for indices in bins), "empty only where sequences are too few"


def test_allocation_prefers_the_micro_batch_with_the_fewest_sequences() -> None:
    # 30 has room with 60 and with 50, alone in both: the first. The first 10 would fill that one up, but goes
    # to 50, where there are fewer; the second finds two in both.
    assert allocate([60, 50, 30, 10, 10], CAPACITY) == [[0, 2, 4], [1, 3]]


def test_allocation_opens_micro_batches_up_to_the_minimum_before_it_fills_them() -> None:
    assert allocate([5, 4, 3, 2], CAPACITY, min_bins=3) == [[0, 3], [1], [2]]


def test_allocation_grows_to_a_multiple_of_the_ranks() -> None:
    assert len(allocate([60] * 5, CAPACITY)) == 5
    assert [len(b) for b in allocate([60] * 5, CAPACITY, multiple_of=4)] == [1, 1, 1, 1, 1, 0, 0, 0]
    assert len(allocate([20] * 11, CAPACITY, multiple_of=2)) == 4, "three would do, four is even"


def test_a_sequence_that_fits_nowhere_is_named() -> None:
    with pytest.raises(ValueError, match=r"sequence 1 of 101 tokens exceeds tokensPerMicroBatch 100"):
        allocate([7, 101], CAPACITY)


@given(lengths_of_sequences, st.integers(1, 5))
def test_ranks_get_equally_many_micro_batches_of_like_size(lengths: list[int], num_ranks: int) -> None:
    ranks = distribute(lengths, CAPACITY, num_ranks)
    assert len(ranks) == num_ranks and len({len(bins) for bins in ranks}) == 1 and ranks[0]
    assert sorted(i for bins in ranks for b in bins for i in b) == list(range(len(lengths)))
    sizes = [[sum(lengths[i] for i in b) for b in bins] for bins in ranks]
    for now, then in zip(
        (max(row) for row in list(zip(*sizes, strict=True))[1:]),
        (min(row) for row in zip(*sizes, strict=True)),
        strict=False,
    ):
        assert now <= then, "the largest of a round is not above the smallest of the round before"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.data())
def test_minibatches_hold_whole_groups_in_near_equal_numbers(tickets: list[int], data: st.DataObject) -> None:
    num_groups = len(set(tickets))
    count = data.draw(st.integers(1, num_groups))
    minibatches = split_minibatches(tickets, count)
    assert sorted(i for m in minibatches for i in m) == list(range(len(tickets)))
    groups = [{tickets[i] for i in m} for m in minibatches]
    assert sum(len(g) for g in groups) == num_groups, "no group in two minibatches"
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_more_minibatches_than_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="3 minibatches of 2 prompt groups"):
        split_minibatches([1, 1, 2], 3)


def test_a_packed_row_says_where_each_sampled_token_is_predicted() -> None:
    short = make_sample([1, 2], [3], ticket=5, advantage=-2.0, temperature=0.5)
    long = make_sample(
        [10, 11], [12, 13, 14], sampled=[True, False, True], live=[False, False, True], advantage=3.0
    )
    batch = pack([short, long])
    assert batch.input_ids.tolist() == [10, 11, 12, 13, 14, 1, 2, 3]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.targets.tolist() == [12, 14, 3], "the environment's 13 is no target"
    assert batch.positions.tolist() == [1, 3, 6]
    assert batch.input_ids[batch.positions + 1].tolist() == batch.targets.tolist()
    assert batch.advantages.tolist() == [3.0, 3.0, -2.0]
    assert batch.temperatures.tolist() == [1.0, 1.0, 0.5]
    assert batch.loss_mask.tolist() == [False, True, True]
    assert batch.staleness.tolist() == [0, 2, 0]
    assert batch.sequences.tolist() == [0, 0, 1] and batch.num_sequences == 2
    torch.testing.assert_close(batch.behavior_logprobs, torch.tensor([-0.12, -0.14, -0.03]))
    assert batch.num_sampled_tokens == 3


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12))
def test_packing_keeps_every_token_once(shapes: list[tuple[int, int]]) -> None:
    samples = [
        make_sample([100 * n + i for i in range(p)], [100 * n + 50 + i for i in range(r)], ticket=n)
        for n, (p, r) in enumerate(shapes)
    ]
    batch = pack(samples)
    ids = [i for s in samples for i in [*s.prompt_ids.tolist(), *s.response_ids.tolist()]]
    assert sorted(batch.input_ids.tolist()) == sorted(ids)
    assert sorted(batch.targets.tolist()) == sorted(i for s in samples for i in s.response_ids.tolist())
    assert batch.input_ids[batch.positions + 1].tolist() == batch.targets.tolist()
    assert sum(b.num_tokens for b in batch.attention_plan.buckets) == len(ids)


def test_an_empty_micro_batch_is_one_dummy_token_and_no_rows() -> None:
    batch = pack([])
    assert len(batch.input_ids) == len(batch.position_ids) == 1
    assert batch.num_sampled_tokens == 0 and batch.num_sequences == 0
    assert batch.attention_plan.max_length == 1
    for name in ("targets", "positions", "advantages", "behavior_logprobs", "loss_mask", "sequences"):
        assert len(getattr(batch, name)) == 0


def test_moving_a_micro_batch_keeps_its_type() -> None:
    batch = pack([make_sample([1], [2, 3]), make_sample([1], [2, 3, 4])])
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, MicroBatch)
    assert moved.targets.device.type == "meta" and moved.attention_plan.max_length == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_mask": np.array([True, True])}, "a token in the loss that the policy did not sample"),
        ({"behavior_logprobs": np.zeros(3, np.float32)}, r"sample 7/2: per-token arrays of \[2, 3\] tokens"),
        ({"behavior_logprobs": np.array([0, np.nan], np.float32)}, "log-probs not finite"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"prompt_ids": np.array([], np.int32)}, "prompt of 0"),
    ],
)
def test_a_sample_in_a_wrong_state_does_not_exist(change: dict[str, object], message: str) -> None:
    good = make_sample([1], [2, 3], sampled=[True, False], ticket=7, index=2)
    fields = {name: getattr(good, name) for name in good.__dataclass_fields__} | change
    with pytest.raises(ValueError, match=message):
        TrainingSample(**fields)
