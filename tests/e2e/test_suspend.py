"""A job is suspended, resumed and resized while its pods run."""

import re

import pytest

from support.cluster.operator_process import eventually
from support.cluster.running_job import RunningJob

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600, func_only=True)]

GRACE_AND = 25.0
"""The grace period of the trainer, and 5 s."""
NAMES = {"quickstart-rollout-0", "quickstart-rollout-1"}


def test_a_suspended_job_goes_on_from_its_checkpoint_and_grows_and_shrinks(job: RunningJob) -> None:
    job.apply(
        training={"maxSteps": 5000},
        evaluation={"samples": 50, "everySteps": 5000},
        checkpoint={"everySteps": 100},
    )
    job.wait_for_step(3)
    job.patch({"suspend": True})
    eventually("no pod is left", lambda: not job.names("pods"), GRACE_AND)
    job.wait("Suspended")
    stopped = job.trained()
    assert (job.folder / "checkpoints" / f"step-{stopped:06d}").exists(), "made when it was told to end"

    job.patch({"suspend": False})
    job.wait_for_step(stopped + 2)
    assert job.names("jobs") == ["quickstart-trainer-2"]

    job.kubectl("scale", "arl", job.name, "--replicas=4")
    eventually("a third engine", lambda: "quickstart-rollout-2" in job.names("pods"), 5)
    eventually("it is ready", lambda: job.condition("RolloutReady")["message"] == "3/3", 120)
    job.kubectl("scale", "arl", job.name, "--replicas=3")
    eventually("it goes", lambda: {pod["metadata"]["name"] for pod in job.pods("rollout")} <= NAMES, 5)
    job.wait_for_step(job.trained() + 2)
    assert job.names("jobs") == ["quickstart-trainer-2"], "the trainer took no pause"
    assert re.search(r"missing 0  twice 0", job.audit())


def test_a_trainer_of_another_size_goes_on_from_the_checkpoint(job: RunningJob) -> None:
    budget = {"total": 4, "mode": "Manual"}
    job.apply(
        training={"maxSteps": 5000},
        evaluation={"samples": 50, "everySteps": 5000},
        trainer={"deepspeed": {"zeroStage": 2}},
        gpuBudget=budget | {"split": {"trainer": 2, "rollout": 2}},
    )
    job.wait_for_step(3)
    job.patch({"gpuBudget": {"split": {"trainer": 1, "rollout": 3}}})
    eventually("the smaller trainer", lambda: "quickstart-trainer-2" in job.names("jobs"), 60)
    stopped = job.trained()
    job.wait_for_step(stopped + 3)
    eventually("the third engine is ready", lambda: job.condition("RolloutReady")["message"] == "3/3", 120)
    attempt = job.status()["attempt"]
    assert (attempt["number"], attempt["restarts"], attempt["gpus"]) == (2, 0, 1)
    assert re.search(r"missing 0  twice 0", job.audit())
