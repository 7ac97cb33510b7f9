"""The operator's own metrics."""

from prometheus_client import generate_latest

from asyncrl_api.job_status import AttemptStatus, GPUsStatus, Status
from asyncrl_operator.decide.observed import Observed, Pod
from asyncrl_operator.telemetry import Telemetry
from asyncrl_operator.workqueue import Key

KEY = Key("ns", "gsm8k")


def text(telemetry: Telemetry) -> str:
    return generate_latest(telemetry.registry).decode()


def test_a_job_is_shown_and_all_its_series_go_with_it() -> None:
    telemetry = Telemetry()
    status = Status(
        phase="Running",
        gpus=GPUsStatus(budget=8, allocated=6, summary="6/8"),
        attempt=AttemptStatus(number=1, job_name="j", config_hash="h", gpus=2, restarts=3),
    )
    seen = Observed(pods=(Pod("a", "1", "rollout", is_ready=True), Pod("b", "2", "rollout")))
    telemetry.show(KEY, "uid-1", status, seen)
    shown = text(telemetry)
    for line in (
        'asyncrl_job_info{job="gsm8k",namespace="ns",uid="uid-1"} 1.0',
        'asyncrl_job_phase{job="gsm8k",namespace="ns",phase="Running"} 1.0',
        'asyncrl_group_pods{group="rollout",job="gsm8k",namespace="ns",state="Ready"} 1.0',
        'asyncrl_gpus{group="all",job="gsm8k",kind="idle",namespace="ns"} 2.0',
        'asyncrl_trainer_restarts_total{job="gsm8k",namespace="ns",reason="restart"} 3.0',
    ):
        assert line in shown
    telemetry.forget(KEY)
    assert "gsm8k" not in text(telemetry)


def test_a_series_that_no_longer_holds_is_dropped() -> None:
    telemetry = Telemetry()
    telemetry.show(KEY, "u", Status(), Observed(pods=(Pod("a", "1", "trainer", phase="Pending"),)))
    telemetry.show(KEY, "u", Status(), Observed(pods=(Pod("a", "1", "trainer", phase="Running"),)))
    shown = text(telemetry)
    assert 'state="Running"' in shown and 'state="Pending"' not in shown
