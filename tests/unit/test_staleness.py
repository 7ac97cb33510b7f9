"""What may be trained of a group, and which groups form the next batch."""

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl_api.job import StalenessSpec
from asyncrl_runtime.contract.messages import (
    Group,
    PolicyVersion,
    SampleFailure,
    Tombstone,
    VersionSpan,
    floats_to_bytes,
)
from asyncrl_runtime.trainer.books.staleness import (
    LiveGroup,
    LiveSample,
    assess,
    form_batch,
    reject,
    span_staleness,
    surviving_version,
)
from asyncrl_runtime.trainer.books.tickets import Discard
from support.messages.samples import make_group, make_sample

MASK = StalenessSpec(max_versions=2, on_exceed="Mask")
DROP = StalenessSpec(max_versions=2, on_exceed="Drop")
KEEP = StalenessSpec(max_versions=2, on_exceed="Keep")


def test_a_token_of_an_abandoned_attempt_counts_as_sampled_where_the_histories_part() -> None:
    began = {1: 0, 2: 7, 3: 9}
    assert surviving_version(PolicyVersion(1, 10), began) == 7  # 1.8 to 1.10 are no ancestors
    assert surviving_version(PolicyVersion(1, 5), began) == 5
    assert surviving_version(PolicyVersion(2, 12), began) == 9
    assert surviving_version(PolicyVersion(3, 12), began) == 12


def test_staleness_is_by_token() -> None:
    sample = make_sample(spans=[(1, 3, 2), (1, 5, 5)])
    live = LiveSample(sample, span_staleness(sample, 6, {1: 0}), oldest=None)
    assert live.staleness.tolist() == [3, 3, 1, 1, 1]


def test_mask_takes_old_tokens_out_of_the_loss_and_keeps_the_sample() -> None:
    group = Group(
        ticket=1,
        group_size=2,
        samples=(make_sample(0, spans=[(1, 3, 2), (1, 5, 5)], reward=0), make_sample(1, spans=[(1, 5, 3)])),
    )
    live = assess(group, 6, MASK, {1: 0}, "None")
    assert isinstance(live, LiveGroup)
    assert live.samples[0].loss_mask.tolist() == [False, False, True, True, True]
    assert live.samples[1].loss_mask.all() and live.num_masked_tokens == 2
    assert [each.staleness[each.sample.mask()].max() for each in live.samples] == [3, 1]


def test_tokens_that_nobody_sampled_are_never_stale() -> None:
    told = make_sample(0, spans=[(1, 0, 2), (1, 5, 4)], mask=[False, False, True, True], reward=0)
    live = assess(
        Group(ticket=1, group_size=2, samples=(told, make_sample(1, spans=[(1, 5, 2)]))), 6, DROP, {}, "None"
    )
    assert isinstance(live, LiveGroup) and len(live.samples) == 2
    assert live.samples[0].loss_mask.tolist() == [False, False, True, True]


def test_drop_takes_the_sample_out_of_its_group() -> None:
    live = assess(make_group(1, [5, 3, 5]), 6, DROP, {}, "None")
    assert isinstance(live, LiveGroup)
    assert [s.sample.index for s in live.samples] == [0, 2] and live.num_dropped_samples == 1


def test_keep_trains_everything() -> None:
    live = assess(make_group(1, [0, 0]), 9, KEEP, {}, "None")
    assert isinstance(live, LiveGroup) and all(s.loss_mask.all() for s in live.samples)


@pytest.mark.parametrize(
    ("group", "rule", "reason"),
    [
        (make_group(1, [0, 0]), MASK, "stale"),  # no live token
        (make_group(1, [6, 0]), DROP, "stale"),  # one live sample
        (make_group(1, [0]), DROP, "stale"),  # none, where one would do
        (
            Group(
                ticket=1,
                group_size=2,
                samples=(make_sample(0),),
                failures=(SampleFailure(index=1, reason="reward_error"),),
            ),
            MASK,
            "failed",
        ),
    ],
)
def test_a_group_with_too_little_left_is_discarded(group: Group, rule: StalenessSpec, reason: str) -> None:
    assert assess(group, 6, rule, {}, "None") == Discard(1, reason)


@pytest.mark.parametrize(
    "changes",
    [
        {"reward": math.nan},
        {"reward": -1e39},
        {"temperature": 0.0},
        {"temperature": math.inf},
        {"behavior_logprobs": floats_to_bytes([-1, -1, math.inf, -1])},
        {"version_spans": (VersionSpan(1, 2**31, 4),)},
        {"version_spans": (VersionSpan(1, -1, 4),)},
    ],
)
def test_a_group_with_a_number_that_cannot_be_trained_is_discarded(changes: dict[str, Any]) -> None:
    samples = (make_sample(0, reward=0), msgspec.structs.replace(make_sample(1), **changes))
    group = Group(ticket=1, group_size=2, samples=samples)
    assert reject(group, "None") == assess(group, 6, MASK, {}, "None") == Discard(1, "unusable_number")


def test_one_sample_is_enough_where_groups_have_one() -> None:
    assert isinstance(assess(make_group(1, [6]), 6, MASK, {}, "None"), LiveGroup)


def test_uniform_groups_go_when_asked() -> None:
    samples = (make_sample(0, reward=1), make_sample(1, reward=1))
    group = Group(ticket=4, group_size=2, samples=samples)
    assert reject(group, "DropUniformGroups") == Discard(4, "uniform")
    assert reject(group, "None") is None
    assert reject(Tombstone(ticket=4, reason="prompt_too_long"), "None") == Discard(4, "prompt_too_long")


def test_a_group_that_becomes_uniform_by_drops_goes_too() -> None:
    samples = (
        make_sample(0, spans=[(1, 0, 2)], reward=0),
        make_sample(1, spans=[(1, 6, 2)]),
        make_sample(2, spans=[(1, 6, 2)]),
    )
    group = Group(ticket=1, group_size=3, samples=samples)
    assert assess(group, 6, DROP, {}, "DropUniformGroups") == Discard(1, "uniform")


@given(
    st.dictionaries(st.integers(1, 40), st.lists(st.integers(0, 6), min_size=2, max_size=4), max_size=20),
    st.integers(1, 6),
    st.sampled_from(["Mask", "Drop", "Keep"]),
    st.sampled_from(["OldestFirst", "FreshestFirst"]),
)
def test_batches_keep_the_bound_and_the_order(
    tickets: dict[int, list[int]], batch_size: int, on_exceed: str, order: str
) -> None:
    rule = StalenessSpec.model_validate({"maxVersions": 2, "onExceed": on_exceed, "order": order})
    arrived = [make_group(ticket, versions) for ticket, versions in tickets.items()]
    batch, discards = form_batch(
        arrived,
        lambda group: assess(group, 6, rule, {}, "None"),
        batch_size=batch_size,
        freshest_first=rule.order == "FreshestFirst",
    )
    discarded = {discard.ticket for discard in discards}
    usable = [t for t in sorted(tickets, reverse=order == "FreshestFirst") if t not in discarded]
    if batch is None:
        assert len(usable) < batch_size
        return
    assert [group.ticket for group in batch] == usable[:batch_size]
    for group in batch:
        for sample in group.samples:
            if on_exceed != "Keep":
                assert not (sample.loss_mask & (sample.staleness > 2)).any()
            assert np.array_equal(sample.loss_mask & sample.sample.mask(), sample.loss_mask)
