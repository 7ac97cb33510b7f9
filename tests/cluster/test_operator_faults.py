"""Rows of the failure matrix that a control plane with fake nodes can produce, as the user sees them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kube_fixture import Cluster
from operator_process import Job, OperatorProcess, eventually, make_claim, running_operator

pytestmark = pytest.mark.e2e

CPU = {"allocation": "None"}


@pytest.fixture(scope="module")
def operator(operator_rights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    with running_operator(operator_rights, tmp_path_factory.mktemp("operator")) as running:
        yield running


@pytest.fixture
def job(cluster: Cluster, namespace: str, operator: OperatorProcess) -> Job:
    cluster.apply(*make_claim(namespace))
    return Job(cluster, namespace)


def annotated(**annotations: str) -> dict[str, Any]:
    """Return an overlay that tells the fake kubelet what becomes of a pod."""
    return {"metadata": {"annotations": {f"kubeup/{name}": value for name, value in annotations.items()}}}


def test_a_job_that_is_active_for_too_long_has_failed(job: Job) -> None:
    job.apply(activeDeadlineSeconds=4)
    job.wait("Finished")
    assert job.condition("Failed")["reason"] == "DeadlineExceeded"
    assert "spec.activeDeadlineSeconds: 4" in job.condition("Failed")["message"]
    eventually("no pod is left", lambda: not job.names("pods"))
    assert job.events()["Failed"] == 1


def test_a_job_whose_trainer_does_not_start_has_failed_after_its_deadline(job: Job) -> None:
    trainer = {"deepspeed": {"zeroStage": 0}, "podTemplate": annotated(start="hold")}
    job.apply(pendingDeadlineSeconds=4, trainer=trainer)
    job.wait("Finished")
    assert job.condition("Failed")["reason"] == "PendingDeadlineExceeded"
    assert "rollout-0" not in " ".join(job.names("pods")), "no engine before the trainer has its place"


def test_an_exit_code_that_is_final_ends_the_job(job: Job) -> None:
    ends = annotated(**{"run-for": "1s", "exit-code": "65"})
    job.apply(trainer={"deepspeed": {"zeroStage": 0}, "podTemplate": ends})
    job.wait("Finished")
    assert job.condition("Failed")["reason"] == "FatalExit"
    assert (
        "exit code 65" in job.condition("Failed")["message"] and job.condition("Stalled")["status"] == "True"
    )
    assert job.names("jobs") == ["gsm8k-trainer-1"], "it stays for its logs"


def test_memory_that_runs_out_is_told_and_costs_a_restart(job: Job) -> None:
    ends = annotated(**{"run-for": "1s", "exit-code": "137", "reason": "OOMKilled"})
    policy = {"trainer": {"maxRestarts": 1, "backoffSeconds": 1}}
    job.apply(trainer={"deepspeed": {"zeroStage": 0}, "podTemplate": ends}, failurePolicy=policy)
    job.wait("Finished")
    assert job.condition("Failed")["reason"] == "OOMKilled"
    assert "more than maxRestarts = 1" in job.condition("Failed")["message"]
    assert job.events()["TrainerRestart"] >= 1


def test_an_update_whose_engines_do_not_get_ready_stops_and_the_next_goes_through(job: Job) -> None:
    budget = {"total": 5, **CPU, "mode": "Manual", "split": {"trainer": 1, "rollout": 4}}
    rollout: dict[str, Any] = {"engine": {"type": "CPU"}}
    job.apply(gpuBudget=budget, rollout=rollout)
    job.wait("Running")
    eventually("all engines are ready", lambda: job.condition("RolloutReady")["message"] == "4/4")
    before = uids(job)
    job.apply(gpuBudget=budget, rollout=rollout | {"podTemplate": annotated(ready="false")})
    eventually("one engine is down", lambda: job.condition("RolloutReady")["message"] == "3/4")
    eventually("it is made again", lambda: len(uids(job)) == 4 and len(uids(job) & before) == 3)
    assert len(uids(job) & before) == 3, "a quarter of four may be down, and no more go"
    good = {"engine": {"type": "CPU", "args": ["--max-total-tokens", "4096"]}}
    job.apply(gpuBudget=budget, rollout=good)
    eventually("all are replaced", lambda: not uids(job) & before and len(uids(job)) == 4, 60)
    eventually("all are ready", lambda: job.condition("RolloutReady")["message"] == "4/4")
    assert job.status()["attempt"]["number"] == 1, "the trainer went on"


def uids(job: Job) -> set[str]:
    """Return the UIDs of the engines that are not being deleted."""
    return {
        pod["metadata"]["uid"]
        for pod in job.children("pods")
        if pod["metadata"]["labels"]["asyncrl.dev/group"] == "rollout"
        and "deletionTimestamp" not in pod["metadata"]
    }


def test_a_changed_learning_rate_restarts_the_trainer_and_no_engine(job: Job) -> None:
    job.apply()
    job.wait("Running")
    eventually("all engines are ready", lambda: job.condition("RolloutReady")["message"] == "2/2")
    before = uids(job)
    job.patch({"training": {"learningRate": 2e-6}})
    eventually("the second attempt runs", lambda: job.names("jobs") == ["gsm8k-trainer-2"])
    job.wait("Running")
    assert uids(job) == before
    attempt = job.status()["attempt"]
    assert (attempt["number"], attempt.get("restarts", 0)) == (2, 0)
