"""Rows of the failure matrix that a control plane with fake nodes can produce, as the user sees them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from support.cluster.control_plane import Cluster
from support.cluster.operator_process import Job, OperatorProcess, eventually, running_operator

pytestmark = pytest.mark.e2e

CPU = {"allocation": "None"}


@pytest.fixture(scope="module", autouse=True)
def operator(operator_rights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    with running_operator(operator_rights, tmp_path_factory.mktemp("operator")) as running:
        yield running


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


def test_a_secret_that_is_missing_is_named_in_the_words_of_kubelet(job: Job) -> None:
    model = {"source": "hf://org/tiny", "dtype": "Float32", "secretRef": {"name": "hub"}}
    job.apply(model=model, trainer={"deepspeed": {"zeroStage": 0}, "podTemplate": annotated(start="hold")})
    [trainer] = eventually("the trainer's pod is there", lambda: pods_of(job, "trainer"))
    waiting = {"reason": "CreateContainerConfigError", "message": 'secret "hub" not found'}
    status = {"name": "trainer", "image": "", "imageID": "", "ready": False, "restartCount": 0}
    patch = {"status": {"containerStatuses": [status | {"state": {"waiting": waiting}}]}}
    name = trainer["metadata"]["name"]
    job.kubectl("patch", "pod", name, "--subresource=status", "-p", json.dumps(patch))
    message = job.wait_for_reason("Stalled", "MissingReference")
    assert message == f"pod {name}: secret 'hub' does not exist"
    job.kubectl("annotate", "pod", name, "kubeup/start-")  # kubelet has found it
    job.wait("Running")


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


def test_a_node_that_dies_under_the_trainer_is_a_disruption_and_costs_no_restart(
    cluster: Cluster, job: Job
) -> None:
    job.apply(failurePolicy={"deadNodeForceDeleteSeconds": 2})
    job.wait("Running")
    [trainer] = pods_of(job, "trainer")
    with node_dead(cluster, trainer["spec"]["nodeName"]):
        eventually("a new attempt", lambda: job.names("jobs") == ["gsm8k-trainer-2"])
        job.wait("Running")
        [again] = pods_of(job, "trainer")
        assert again["spec"]["nodeName"] != trainer["spec"]["nodeName"]
        attempt = job.status()["attempt"]
        assert (attempt["disruptions"], attempt["restarts"]) == (1, 0)
        assert job.events()["Disrupted"] == 1


@contextmanager
def node_dead(cluster: Cluster, name: str) -> Iterator[None]:
    """Silence a node's kubelet for a while, so that the node's controller at last finds it not ready."""
    answers, now = "kwok.x-k8s.io/node", datetime.now(UTC).isoformat(timespec="seconds")
    unknown = {"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown", "lastTransitionTime": now}
    cluster.kubectl("annotate", "node", name, f"{answers}-")
    patch = json.dumps({"status": {"conditions": [unknown]}})
    cluster.kubectl("patch", "node", name, "--subresource=status", "-p", patch)
    try:
        yield
    finally:
        cluster.kubectl("annotate", "node", name, f"{answers}=fake")
        cluster.kubectl("wait", "--for=condition=Ready", f"node/{name}", "--timeout=60s")


def pods_of(job: Job, group: str) -> list[dict[str, Any]]:
    """Return the pods of a group that are not being deleted."""
    return [
        pod
        for pod in job.children("pods")
        if pod["metadata"]["labels"]["asyncrl.dev/group"] == group
        and "deletionTimestamp" not in pod["metadata"]
    ]


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


def test_gpus_move_to_the_group_that_is_short_and_back(job: Job) -> None:
    auto = {"initialRolloutPercent": 50, "cooldownSeconds": 4}
    job.apply(gpuBudget={"total": 4, **CPU, "auto": auto})
    job.wait("Running")
    assert shares(job) == (2, 2)
    eventually("an engine takes the trainer's slot", lambda: starve(job) and shares(job) == (1, 3))
    eventually("the smaller trainer runs", lambda: job.names("jobs") == ["gsm8k-trainer-2"])
    eventually("the third engine is ready", lambda: job.condition("RolloutReady")["message"] == "3/3")
    eventually("and gives it back", lambda: flood(job) and shares(job) == (2, 2))
    eventually("the larger trainer runs", lambda: job.names("jobs") == ["gsm8k-trainer-3"])
    job.wait("Running")
    assert job.events()["SplitChanged"] >= 2
    attempt = job.status()["attempt"]
    assert (attempt["restarts"], attempt["disruptions"]) == (0, 0), "a resize is nobody's fault"
    spec = job.get("asyncrljob", "gsm8k")["spec"]
    assert "split" not in spec["gpuBudget"], "a decision is status, never spec"


def shares(job: Job) -> tuple[int, int]:
    split = job.status()["split"]
    return split["trainer"], split["rollout"]


def starve(job: Job) -> bool:
    """Report as a trainer that waits for trajectories."""
    return job.report(wait_share=0.8, rollout_load=1.0)


def flood(job: Job) -> bool:
    """Report as a trainer that falls behind."""
    return job.report(wait_share=0.0, rollout_load=0.3)


def test_a_job_with_poison_in_its_report_is_shown_and_can_be_suspended(job: Job) -> None:
    job.apply(gpuBudget={"total": 3, **CPU})
    job.wait("Running")
    job.report(step=7, reward=-1e30, queue_depth=-1, message="x" * 5000)
    eventually("it is shown", lambda: job.status().get("progress", {}).get("step") == 7)
    assert job.status()["reward"]["mean"] == "-1.000e+30"
    checkpoint = {"step": 8, "path": "p" * 2000, "time": "2026-01-02T03:04:05Z"}
    report = {
        "attempt": 1,
        "step": -8,
        "maxSteps": 9,
        "state": "y" * 300,
        "time": "soon",
        "lastCheckpoint": checkpoint,
    }
    body = {"data": {"report": json.dumps(report)}}
    job.kubectl("patch", "configmap", f"{job.name}-report", "--type=merge", "-p", json.dumps(body))
    job.patch({"suspend": True})
    job.wait("Suspended")
    assert job.condition("Degraded")["reason"] != "OperatorError"


def test_skipped_updates_are_told_of_until_there_are_none(job: Job) -> None:
    job.apply(gpuBudget={"total": 3, **CPU})
    job.wait("Running")
    job.report(step=7, skipped_updates=3)
    message = job.wait_for_reason("Degraded", "UpdatesSkipped")
    assert "3" in message and "not finite" in message
    assert job.condition("Ready") | {"reason": "Degraded"} == job.condition("Ready")
    job.report(step=8, skipped_updates=0)
    eventually("it is well again", lambda: job.condition("Degraded")["status"] == "False")
