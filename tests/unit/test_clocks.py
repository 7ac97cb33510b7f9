"""The deadlines of a job, as operator and local runner both count them."""

from dataclasses import replace
from typing import Any

import pytest

from asyncrl_operator.decide.clocks import Clocks, Parts, advance, deadlines, is_up
from support.cluster.model_cluster import make_spec

UP = Parts(trainer_runs=True, is_messaging_ready=True, ready_engines=4, engines=4)


def after(parts: Parts, before: Clocks, now: float, *, was_up: bool = True, **overrides: Any) -> Clocks:
    return advance(make_spec(**overrides), before, parts, was_up=was_up, now=now)


@pytest.mark.parametrize(
    ("parts", "was_up", "expected"),
    [
        (UP, False, True),
        (replace(UP, ready_engines=0), False, False),
        (replace(UP, is_messaging_ready=False), False, False),
        (replace(UP, ready_engines=0, is_messaging_ready=False), True, True),
        (replace(UP, trainer_runs=False), True, False),
    ],
)
def test_a_job_is_up_once_all_is_there_and_then_as_long_as_its_trainer(
    parts: Parts, was_up: bool, expected: bool
) -> None:
    assert is_up(parts, was_up=was_up) is expected


def test_a_clock_runs_from_its_beginning_and_ends_with_its_cause() -> None:
    begun = Clocks(active_since=0.0)
    pending = after(replace(UP, ready_engines=0), begun, 10.0, was_up=False)
    assert pending == Clocks(0.0, pending_since=10.0)
    assert after(replace(UP, ready_engines=0), pending, 20.0, was_up=False) == pending
    short = after(replace(UP, ready_engines=0), pending, 30.0)
    assert short == Clocks(0.0, below_minimum_since=30.0)
    assert after(replace(UP, ready_engines=0), short, 40.0) == short
    assert after(UP, short, 50.0) == begun
    assert after(replace(UP, trainer_runs=False), short, 50.0) == Clocks(0.0, pending_since=50.0)


@pytest.mark.parametrize(("ready", "is_short"), [(0, True), (1, False), (2, False)])
def test_the_minimum_itself_is_enough(ready: int, is_short: bool) -> None:
    clocks = after(replace(UP, ready_engines=ready), Clocks(), 5.0)  # 25 % of 4
    assert (clocks.below_minimum_since is not None) is is_short


def test_deadlines_come_in_the_order_in_which_they_count() -> None:
    spec = make_spec(
        activeDeadlineSeconds=100,
        pendingDeadlineSeconds=60,
        failurePolicy={"rollout": {"belowMinimumSeconds": 30}},
    )
    found = list(deadlines(spec, Clocks(1.0, 2.0, 3.0), replace(UP, ready_engines=0), "no node has room"))
    assert [(each.at, each.reason) for each in found] == [
        (101.0, "DeadlineExceeded"),
        (62.0, "PendingDeadlineExceeded"),
        (33.0, "RolloutBelowMinimum"),
    ]
    assert [each.message for each in found] == [
        "spec.activeDeadlineSeconds: 100 have passed",
        "spec.pendingDeadlineSeconds: not running after 60 s; no node has room",
        "0/4 engines were ready, below minAvailablePercent 25, for 30 s",
    ]


def test_what_nobody_asked_for_has_no_deadline() -> None:
    spec = make_spec(failurePolicy={"rollout": {"onBelowMinimum": "Continue"}})
    assert list(deadlines(spec, Clocks(1.0, 2.0, 3.0), UP)) == []
    assert list(deadlines(make_spec(activeDeadlineSeconds=1, pendingDeadlineSeconds=1), Clocks(), UP)) == []
