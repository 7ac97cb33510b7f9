"""Advantages of groups of all sizes, against hand-worked numbers."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl_api.job import AlgorithmSpec, OverlongPenaltySpec
from asyncrl_api.parsing import apply_overrides, validate
from asyncrl_runtime.trainer.update.advantages import (
    ADVANTAGES,
    compute_advantages,
    longest_turn,
    overlong_penalty,
)
from support.manifests.api_values import values_of
from support.manifests.smallest import SMALLEST
from support.messages.samples import make_sample

KINDS = tuple(ADVANTAGES)
WITHIN_GROUPS = [kind for kind in KINDS if kind != "BatchNormalized"]

groups_of_rewards = st.lists(
    st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=5), min_size=1, max_size=5
)


def advantages(
    groups: list[list[float]],
    kind: str,
    *,
    scale: float = 1.0,
    shift: float = 0.0,
    clip: float | None = None,
) -> list[list[float]]:
    """By group, with tickets that neither start at 0 nor ascend."""
    tickets = np.concatenate([[100 - 7 * n] * len(g) for n, g in enumerate(groups)]).astype(np.int64)
    algorithm = AlgorithmSpec.model_validate(
        {"advantage": kind, "rewardScale": scale, "rewardShift": shift, "rewardClip": clip}
    )
    values = compute_advantages(
        np.concatenate(groups), tickets, np.ones_like(tickets), np.full_like(tickets, 100), algorithm
    )
    ends = np.cumsum([len(g) for g in groups])[:-1]
    return [part.tolist() for part in np.split(values, ends)]


def test_group_normalized_by_hand() -> None:
    # Mean 0.25, variance 3/16: deviation sqrt(3)/4.
    (first, second) = advantages([[1, 0, 0, 0], [2, 4]], "GroupNormalized")
    assert first == pytest.approx([3**0.5, -1 / 3**0.5, -1 / 3**0.5, -1 / 3**0.5], rel=1e-4)
    assert second == pytest.approx([-1, 1], rel=1e-4)


def test_group_centered_by_hand() -> None:
    assert advantages([[1, 0, 0, 0], [2, 4]], "GroupCentered") == [[0.75, -0.25, -0.25, -0.25], [-1, 1]]


def test_leave_one_out_by_hand() -> None:
    # Against the others' mean: 1 - 0, and 0 - 1/3 for the rest.
    (first, second) = advantages([[1, 0, 0, 0], [2, 4]], "LeaveOneOut")
    assert first == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    assert second == pytest.approx([-2, 2])


def test_batch_normalized_by_hand() -> None:
    # Mean 2, variance (4 + 4 + 0) / 3.
    deviation = (8 / 3) ** 0.5
    (first, second) = advantages([[0, 4], [2]], "BatchNormalized")
    assert first + second == pytest.approx([-2 / deviation, 2 / deviation, 0], rel=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e200, 1e300])
def test_rewards_of_any_size_have_the_advantages_of_small_ones(scale: float) -> None:
    """The square of 1e200 is infinite, and so would be the deviation."""
    groups = np.array([0, 0, 0, 1, 1, 1])
    rewards = np.array([1.0, 0.0, 0.0, 2.0, 4.0, 4.5])
    for kind, compare in ADVANTAGES.items():
        expected = compare(rewards * 1e3, groups)
        if not kind.endswith("Normalized"):
            expected = expected * (scale / 1e3)
        assert compare(rewards * scale, groups) == pytest.approx(expected, rel=1e-2), kind


def test_a_group_of_huge_rewards_leaves_the_others_as_they_are() -> None:
    rewards, groups = np.array([1.0, 0.0, 1e300, -1e300]), np.array([0, 0, 1, 1])
    assert ADVANTAGES["GroupNormalized"](rewards, groups) == pytest.approx([1, -1, 1, -1], rel=1e-5)
    assert ADVANTAGES["GroupCentered"](rewards, groups)[:2].tolist() == [0.5, -0.5]


@pytest.mark.parametrize("kind", KINDS)
def test_an_advantage_is_finite_in_float32_whatever_the_manifest_may_say(kind: str) -> None:
    rewards = [[3e38, -3e38], [1.0, 0.0]]
    values = np.concatenate(advantages(rewards, kind, scale=1e9, shift=-1e9))
    assert np.isfinite(values.astype(np.float32)).all() and values[0] > 0 > values[1]


def test_rewards_are_clipped_after_scale_and_shift_and_before_the_comparison() -> None:
    rewards = [[5.0, 1.0, -9.0]]
    clipped = advantages(rewards, "GroupCentered", scale=10.0, shift=1.0, clip=20.0)
    assert clipped == [pytest.approx([20 - 20 / 3, 20 - 20 / 3, -20 - 20 / 3])]
    assert advantages(rewards, "GroupCentered", clip=9.0) == advantages(rewards, "GroupCentered")


def test_scale_and_shift_come_before_the_comparison() -> None:
    assert advantages([[1, 0]], "GroupCentered", scale=10.0, shift=-0.5) == [[5, -5]]


@given(groups_of_rewards, st.sampled_from(KINDS))
def test_advantages_sum_to_zero_where_they_were_compared(groups: list[list[float]], kind: str) -> None:
    result = advantages(groups, kind)
    for part in [[a for group in result for a in group]] if kind == "BatchNormalized" else result:
        assert sum(part) == pytest.approx(0, abs=1e-9)


@given(groups_of_rewards, st.sampled_from(KINDS), st.integers(-3, 3).map(float))
def test_a_shift_of_all_rewards_changes_nothing(groups: list[list[float]], kind: str, shift: float) -> None:
    for part, shifted in zip(advantages(groups, kind), advantages(groups, kind, shift=shift), strict=True):
        assert shifted == pytest.approx(part, abs=1e-9)


@given(groups_of_rewards, st.sampled_from(["GroupNormalized", "BatchNormalized"]))
def test_normalized_advantages_do_not_know_the_scale(groups: list[list[float]], kind: str) -> None:
    for part, scaled in zip(advantages(groups, kind), advantages(groups, kind, scale=8.0), strict=True):
        assert scaled == pytest.approx(part, abs=1e-4)


@given(groups_of_rewards, st.sampled_from(WITHIN_GROUPS))
def test_a_group_does_not_see_the_others(groups: list[list[float]], kind: str) -> None:
    assert advantages(groups, kind)[0] == pytest.approx(advantages(groups[:1], kind)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_teach_nothing(kind: str) -> None:
    """Exactly nothing: what has no advantage is not computed."""
    for size in (3, 6, 7):
        assert list(advantages([[0.1] * size, [0.1]], kind)[0]) == [0] * size


def test_every_advantage_of_the_api_is_registered() -> None:
    assert set(ADVANTAGES) == values_of(AlgorithmSpec, "advantage")


@pytest.mark.parametrize("kind", KINDS)
def test_an_advantage_that_is_zero_in_groups_of_one_is_refused_with_them(kind: str) -> None:
    teaches_nothing = advantages([[5], [1, 0]], kind)[0] == [0]
    assert teaches_nothing == (kind in WITHIN_GROUPS)
    changes = ["spec.sampling.groupSize=1", f"spec.algorithm.advantage={kind}"]
    assert bool(validate(apply_overrides(SMALLEST, changes))) == teaches_nothing


def test_overlong_penalty_by_hand() -> None:
    rule = OverlongPenaltySpec(buffer_tokens=20, penalty=2.0)
    lengths = np.array([1, 80, 85, 90, 100, 120])
    bounds = np.full(6, 100)
    assert overlong_penalty(lengths, bounds, rule).tolist() == [0, 0, 0.5, 1, 2, 2]


def test_overlong_penalty_goes_by_the_bound_of_each_sample() -> None:
    rule = OverlongPenaltySpec(buffer_tokens=20, penalty=2.0)
    lengths, bounds = np.array([90, 90, 5, 5]), np.array([100, 1000, 10, 5])  # two of them below the buffer
    assert overlong_penalty(lengths, bounds, rule).tolist() == [1, 0, 1, 2]


def test_of_several_turns_the_longest_counts() -> None:
    """The bound is that of a turn."""
    turns = [True] * 4 + [False] * 2 + [True] * 7 + [False] + [True] * 3
    told = make_sample(spans=[(1, 0, len(turns))], mask=turns)
    assert longest_turn(told) == 7, "by the mask, for samples of older workers"
    assert longest_turn(msgspec.structs.replace(told, longest_turn=6)) == 6


def test_overlong_penalty_is_taken_before_shift_and_scale() -> None:
    algorithm = AlgorithmSpec(
        advantage="GroupCentered",
        reward_scale=10.0,
        overlong_penalty=OverlongPenaltySpec(buffer_tokens=10, penalty=1.0),
    )
    rewards, tickets = np.array([1.0, 1.0]), np.array([3, 3])
    result = compute_advantages(rewards, tickets, np.array([95, 10]), np.array([100, 100]), algorithm)
    assert result.tolist() == [-2.5, 2.5]
