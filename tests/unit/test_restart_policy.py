"""What each end of a process costs, and how long the process waits before its next start."""

import signal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl_api.exits import ExitCode
from asyncrl_api.job import TrainerFailureSpec
from asyncrl_operator.decide.restart_policy import (
    CONTAINER_MAX_BACKOFF_SECONDS,
    CONTAINER_RESET_SECONDS,
    MESSAGING_MAX_FAILURES,
    ContainerBackoff,
    GiveUp,
    Restart,
    TrainerBudget,
)

KILLED, FAILED = -signal.SIGKILL, 1


def budget(**spec: Any) -> TrainerBudget:
    return TrainerBudget(TrainerFailureSpec(**spec))


def delays(trainer: TrainerBudget, ends: list[tuple[int, int]]) -> list[float]:
    """Return the wait after each end, given as (exit code, step)."""
    found = []
    for code, step in ends:
        decision = trainer.ended(code, step)
        assert isinstance(decision, Restart), decision
        found.append(decision.delay_seconds)
    return found


@pytest.mark.parametrize(
    ("spec", "code", "reason"),
    [
        ({"max_disruptions": 2}, KILLED, "more than maxDisruptions = 2 signals ended it"),
        ({"max_restarts": 2}, FAILED, "it failed more than maxRestarts = 2 times"),
        ({"max_restarts": 2}, ExitCode.TRY_AGAIN, "it failed more than maxRestarts = 2 times"),
    ],
)
def test_a_trainer_is_restarted_as_often_as_allowed(spec: dict[str, int], code: int, reason: str) -> None:
    trainer = budget(**spec)
    assert all(isinstance(trainer.ended(code, step), Restart) for step in (1, 2))
    assert trainer.ended(code, 3) == GiveUp(reason)


def test_none_is_allowed_where_the_budget_is_zero() -> None:
    nothing = {"max_restarts": 0, "max_disruptions": 0}
    assert isinstance(budget(**nothing).ended(KILLED, 5), GiveUp)
    assert isinstance(budget(**nothing).ended(FAILED, 5), GiveUp)


@given(st.lists(st.tuples(st.sampled_from([KILLED, -signal.SIGTERM, FAILED, 75, 137]), st.integers(0, 3))))
@settings(max_examples=40)
def test_signals_and_failures_have_a_budget_each(ends: list[tuple[int, int]]) -> None:
    """A preempted trainer does not use up what its own failures may cost, nor the other way round."""
    trainer = budget(max_restarts=2, max_disruptions=4)
    for number, (code, step) in enumerate(ends, start=1):
        decision = trainer.ended(code, step)
        signals = sum(earlier < 0 for earlier, _ in ends[:number])
        spent = signals > 4 if code < 0 else number - signals > 2
        assert isinstance(decision, GiveUp) == spent
        if spent:
            return


@pytest.mark.parametrize("code", [ExitCode.USAGE, ExitCode.UNUSABLE, ExitCode.REFUSED])
def test_what_cannot_be_helped_is_final(code: ExitCode) -> None:
    assert budget().ended(code, 7) == GiveUp(f"exit code {int(code)} is final")
    assert ContainerBackoff().ended(code, 1000.0) == GiveUp(f"exit code {int(code)} is final")


def test_which_codes_are_final_for_the_trainer_is_the_manifests() -> None:
    trainer = budget(fatal_exit_codes=[3])
    assert isinstance(trainer.ended(ExitCode.UNUSABLE, 1), Restart)
    assert trainer.ended(3, 2) == GiveUp("exit code 3 is final")


def test_the_first_failure_costs_no_wait_and_further_ones_wait_ever_longer() -> None:
    trainer = budget(max_restarts=9, backoff_seconds=10, max_backoff_seconds=60)
    assert delays(trainer, [(FAILED, 3)] * 7) == [0, 10, 20, 40, 60, 60, 60]


def test_signals_wait_like_failures() -> None:
    trainer = budget(backoff_seconds=10)
    assert delays(trainer, [(KILLED, 0), (FAILED, 0), (KILLED, 0)]) == [0, 10, 20]


def test_a_step_between_two_failures_begins_the_backoff_again() -> None:
    trainer = budget(max_restarts=9, backoff_seconds=10)
    assert delays(trainer, [(FAILED, 3), (FAILED, 3), (FAILED, 4), (FAILED, 4), (FAILED, 4)]) == [
        0,
        10,
        0,
        10,
        20,
    ]


def test_going_back_to_a_checkpoint_is_no_step() -> None:
    """A trainer that keeps dying at the same place has only repeated old steps in between."""
    trainer = budget(backoff_seconds=10)
    assert delays(trainer, [(KILLED, 8), (KILLED, 5), (KILLED, 8), (KILLED, 9)]) == [0, 10, 20, 0]


@pytest.mark.parametrize("backoff", [0, 1, 2**31 - 1])
def test_thousands_of_disruptions_in_a_row_are_borne(backoff: int) -> None:
    trainer = budget(max_disruptions=5000, backoff_seconds=backoff, max_backoff_seconds=2**31 - 1)
    longest = delays(trainer, [(KILLED, 0)] * 2000)[-1]
    assert longest == (2**31 - 1 if backoff else 0)


def test_a_container_is_restarted_for_ever_and_ever_more_slowly() -> None:
    container = ContainerBackoff()
    decisions = [container.ended(code, 1.0) for code in (1, KILLED, 0, 75, 1, 1, 1, 1)]
    assert decisions == [Restart(delay) for delay in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0)]
    assert container.ended(1, 1.0) == Restart(CONTAINER_MAX_BACKOFF_SECONDS)


def test_steps_that_cannot_be_trained_cost_no_restart_as_long_as_others_are_made() -> None:
    trainer = budget(max_restarts=0, backoff_seconds=0)
    for step in range(5):
        assert delays(trainer, [(ExitCode.STEP_FAILED, step)] * 2) == [0, 0]
    assert trainer.num_restarts == 0


def test_steps_none_of_which_can_be_trained_end_the_job() -> None:
    trainer = budget(max_restarts=3, backoff_seconds=0)
    assert delays(trainer, [(ExitCode.STEP_FAILED, 4)] * 5) == [0] * 5
    assert trainer.ended(ExitCode.STEP_FAILED, 4) == GiveUp("it failed more than maxRestarts = 3 times")


def test_a_broker_that_cannot_be_started_ends_the_job() -> None:
    """Without a broker a job would wait in silence."""
    broker = ContainerBackoff(max_failures=MESSAGING_MAX_FAILURES)
    for _ in range(MESSAGING_MAX_FAILURES):
        assert isinstance(broker.ended(1, 0.1), Restart)
    assert broker.ended(1, 0.1) == GiveUp("it failed 5 times in a row")


@pytest.mark.parametrize(("code", "lived_seconds"), [(KILLED, 1.0), (FAILED, CONTAINER_RESET_SECONDS)])
def test_a_broker_that_was_killed_or_lived_for_long_can_be_started(code: int, lived_seconds: float) -> None:
    broker = ContainerBackoff(max_failures=1)
    assert isinstance(broker.ended(FAILED, 0.1), Restart)
    assert isinstance(broker.ended(code, lived_seconds), Restart)
    assert broker.num_failures == (0 if code < 0 else 1)
    assert isinstance(broker.ended(KILLED, 0.1), Restart)


def test_a_container_that_lived_for_long_begins_again() -> None:
    container = ContainerBackoff()
    for _ in range(5):
        container.ended(1, 1.0)
    assert container.ended(KILLED, CONTAINER_RESET_SECONDS - 0.1) == Restart(8.0)
    assert container.ended(KILLED, CONTAINER_RESET_SECONDS) == Restart(0.0)
    assert container.ended(KILLED, 1.0) == Restart(0.5)
