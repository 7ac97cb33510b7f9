"""When a trainer counts as hung for the operator: it says so, or falls silent, whatever its clock shows."""

from dataclasses import replace
from typing import Any

import pytest

from asyncrl_api.report import Report
from asyncrl_api.times import to_text
from asyncrl_operator.decide.attempts import REPORT_DELAY_SECONDS
from asyncrl_operator.decide.hang import Signs, hung
from support.cluster.model_cluster import ModelCluster, make_spec

LIMIT = 200
COPY_SECONDS = 30.0


def running(clock_error: float = 0.0) -> ModelCluster:
    """Return a job that runs and has reported; `clock_error`: what the trainer's clock is ahead by."""
    cluster = ModelCluster(make_spec(failurePolicy={"trainer": {"hangSeconds": LIMIT}}))
    cluster.run_until_still()
    says(cluster, clock_error, seconds_without_progress=0.0)
    return cluster


def says(cluster: ModelCluster, clock_error: float = 0.0, **values: Any) -> None:
    cluster.reports(time=to_text(cluster.now + clock_error), **values)
    cluster.pass_once()


def attempt(cluster: ModelCluster) -> tuple[int, str, int]:
    """Return the attempt's number, why the one before ended, and how many restarts are counted."""
    found = cluster.status.attempt
    assert found is not None
    return found.number, found.last_reason, found.restarts


@pytest.mark.parametrize("clock_error", [-3600.0, 0.0, 3600.0])
def test_a_trainer_that_reports_but_makes_no_progress_is_restarted(clock_error: float) -> None:
    cluster = running(clock_error)
    for without in range(0, LIMIT, int(COPY_SECONDS)):
        cluster.now += COPY_SECONDS
        says(cluster, clock_error, seconds_without_progress=float(without))
        assert attempt(cluster) == (1, "", 0)
    cluster.now += COPY_SECONDS
    says(cluster, clock_error, seconds_without_progress=LIMIT + 3.0)
    cluster.run_until_still()
    assert attempt(cluster) == (2, "Hung", 1)
    [event] = [each for each in cluster.events if each.reason == "TrainerRestart"]
    assert event.message == (
        "Hung: the trainer made no progress in 203 s although it was its turn "
        "(failurePolicy.trainer.hangSeconds: 200)"
    )


@pytest.mark.parametrize("clock_error", [-3600.0, 0.0, 3600.0])
def test_a_trainer_that_waits_for_long_answers_does_not_hang(clock_error: float) -> None:
    cluster = running(clock_error)
    for _ in range(100):
        cluster.now += COPY_SECONDS
        says(cluster, clock_error, state="WaitingForBatch", seconds_without_progress=0.0)
    assert attempt(cluster) == (1, "", 0) and cluster.condition("Degraded") == "False/AsExpected"


@pytest.mark.parametrize("clock_error", [-3600.0, 0.0, 3600.0])
@pytest.mark.parametrize("without", [0.0, None], ids=["", "older runtime"])
def test_a_trainer_that_falls_silent_hangs_whatever_it_said_last(
    clock_error: float, without: float | None
) -> None:
    cluster = running(clock_error)
    for _ in range(40):
        cluster.now += COPY_SECONDS
        says(cluster, clock_error, state="WaitingForBatch", seconds_without_progress=without)
    assert attempt(cluster)[0] == 1, "it is heard of"
    cluster.now += LIMIT + REPORT_DELAY_SECONDS - 2
    outcome = cluster.pass_once()
    assert attempt(cluster)[0] == 1
    assert outcome.wake_at is not None and 0 < outcome.wake_at - cluster.now <= 3
    cluster.now = outcome.wake_at
    cluster.run_until_still()
    assert attempt(cluster) == (2, "Hung", 1)
    assert "Hung: the trainer has not reported for 26" in str(cluster.events)


def test_an_attempt_that_has_never_reported_is_judged_from_its_pods_start() -> None:
    cluster = ModelCluster(make_spec(failurePolicy={"trainer": {"hangSeconds": LIMIT}}))
    cluster.nodes, nodes = {}, cluster.nodes
    for _ in range(10):
        cluster.pass_once()
        cluster.settle()
    cluster.now += 10 * LIMIT  # its pods find no node
    cluster.nodes = nodes
    cluster.pass_once()
    cluster.settle()
    cluster.pass_once()
    assert attempt(cluster) == (1, "", 0)
    cluster.now += LIMIT + REPORT_DELAY_SECONDS - 1
    cluster.pass_once()
    assert attempt(cluster) == (1, "", 0)
    cluster.now += 1
    cluster.pass_once()
    assert attempt(cluster) == (1, "Hung", 1)


def test_a_clock_that_is_set_makes_nothing_hang() -> None:
    cluster = running()
    for clock_error in (0.0, -7200.0, -7200.0, 7200.0, 7200.0, 0.0):
        for _ in range(3):
            cluster.now += COPY_SECONDS
            says(cluster, clock_error, seconds_without_progress=0.0)
    assert attempt(cluster) == (1, "", 0) and cluster.condition("Degraded") == "False/AsExpected"


def test_a_trainer_whose_clock_was_set_back_falls_silent_like_any_other() -> None:
    cluster = running()
    for _ in range(3):
        cluster.now += COPY_SECONDS
        says(cluster, -7200.0, seconds_without_progress=0.0)
    cluster.now += LIMIT + REPORT_DELAY_SECONDS + COPY_SECONDS
    cluster.run_until_still()
    assert attempt(cluster) == (2, "Hung", 1)


def test_an_operator_that_was_away_hears_first_what_the_trainer_has_to_say() -> None:
    cluster = running()
    cluster.now += 10 * LIMIT
    says(cluster, seconds_without_progress=0.0)
    assert attempt(cluster) == (1, "", 0)


def test_what_an_earlier_attempt_said_does_not_count() -> None:
    cluster = running()
    says(cluster, seconds_without_progress=LIMIT + 1.0)
    cluster.run_until_still()
    assert attempt(cluster)[0] == 2
    assert cluster.report is not None and cluster.report.attempt == 1
    cluster.now += LIMIT
    cluster.pass_once()
    assert attempt(cluster) == (2, "Hung", 1)


def test_without_a_limit_nothing_hangs() -> None:
    assert not hung(0, Signs(1e9, 0.0, 0.0), 1e9)


def test_a_status_of_an_older_operator_gets_to_know_when_reports_come() -> None:
    cluster = running()
    cluster.status = cluster.status.model_copy(update={"report_seen_time": None})
    cluster.pass_once()
    assert cluster.status.report_seen_time == to_text(cluster.now)
    cluster.now += LIMIT + REPORT_DELAY_SECONDS
    cluster.run_until_still()
    assert attempt(cluster) == (2, "Hung", 1)


def test_a_report_of_a_newer_runtime_is_read() -> None:
    text = '{"attempt": 1, "step": 2, "maxSteps": 9, "state": "Training", "notKnownYet": 1}'
    assert Report.model_validate_json(text).step == 2
    assert Report.model_validate_json(text).seconds_without_progress is None


def test_a_trainer_some_of_whose_pods_do_not_run_yet_is_not_judged() -> None:
    cluster = running()
    [name] = [pod.name for pod in cluster.pods.values() if pod.group == "trainer"][:1]
    cluster.pods[name] = replace(cluster.pods[name], phase="Pending", is_ready=False)
    says(cluster, seconds_without_progress=LIMIT + 1.0)
    assert attempt(cluster) == (1, "", 0)
