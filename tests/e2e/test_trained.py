"""A `kubectl apply` leads to a trained policy, in pods that run on nodes of their own."""

import json
import re
from typing import Any

import pytest

from asyncrl_runtime.trainer.update.deepspeed_config import deep_merge
from support.cluster.nodes import NODES
from support.cluster.operator_process import eventually
from support.cluster.running_job import RunningJob, pod_templates

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600, func_only=True)]

STEPS, BATCH = 40, 32
TRAINER = {"matchLabels": {"asyncrl.dev/group": "trainer"}}
APART = {
    "spec": {
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "DoNotSchedule",
                "labelSelector": TRAINER,
            }
        ]
    }
}
"""Pods of the trainer on nodes of their own."""
SECONDS = 300


def test_an_applied_job_trains_a_policy_to_the_end(job: RunningJob) -> None:
    job.apply(
        training={"maxSteps": STEPS},
        evaluation={"samples": 100, "everySteps": 20},
        checkpoint={"everySteps": 10},
    )
    eventually("steps are shown", lambda: job.step() > 0, SECONDS)
    job.wait("Running", SECONDS)  # an engine samples some seconds before the kubelet calls its pod ready
    row = job.kubectl("get", "arl", job.name).splitlines()[1].split()
    assert row[1] == "Running" and re.fullmatch(rf"\d+/{STEPS}", row[2])
    assert (row[3], row[5]) == ("1/1", "3/3") and re.fullmatch(r"[12]/2", row[4])
    assert job.logs("trainer") and job.logs("rollout")
    assert {group for group in ("trainer", "rollout", "messaging") if has_token(job, group)} == {"trainer"}
    job.wait("Finished", SECONDS)
    assert job.condition("Complete")["status"] == "True", job.status()
    status = job.status()
    assert status["progress"]["step"] == STEPS and float(status["reward"]["mean"]) > 0.1
    assert (job.folder / "export" / "final" / "config.json").exists()
    assert len(list((job.folder / "checkpoints").glob("step-*"))) >= 2
    assert re.search(rf"trained {STEPS * BATCH}  discarded \d+  missing 0  twice 0", job.audit())


@pytest.mark.slow
def test_a_trainer_of_two_pods_trains_as_one(job: RunningJob) -> None:
    """Two ranks in each, on two nodes; they meet over the pod network, by the name of the first pod."""
    job.apply(
        training={"maxSteps": 10},
        evaluation={"samples": 50, "everySteps": 50},
        gpuBudget=budget(trainer=4, rollout=2) | {"allocation": "None"},
        **deep_merge(
            pod_templates(trainer=APART),
            {"trainer": {"gpusPerNode": 2, "deepspeed": {"zeroStage": 2}}},
        ),
    )
    job.wait_for_step(1, SECONDS)
    assert {pod["spec"]["nodeName"] for pod in job.pods("trainer")} == set(NODES)
    job.wait("Finished", SECONDS)
    assert job.condition("Complete")["status"] == "True", job.status()
    assert "missing 0  twice 0" in job.audit()


@pytest.mark.slow
def test_adapters_are_trained_though_the_engines_die(job: RunningJob) -> None:
    """They reach an engine with a worker's rights, by the folder that the two containers share."""
    job.apply(
        training={"maxSteps": STEPS, "lora": {"rank": 8}},
        evaluation={"samples": 50, "everySteps": STEPS},
    )
    job.wait_for_step(3, SECONDS)
    engines = [pod["metadata"]["name"] for pod in job.pods("rollout")]
    job.kubectl("delete", "pod", *engines, "--grace-period=0", "--force")
    assert job.trained() < STEPS / 2, "it is others that sample the rest"
    job.wait("Finished", SECONDS)
    assert job.condition("Complete")["status"] == "True", job.status()
    assert (job.folder / "export" / "final" / "adapter_config.json").exists()
    assert "missing 0  twice 0" in job.audit()


@pytest.mark.slow
def test_gpus_are_asked_for_and_the_scheduler_says_when_there_are_too_few(job: RunningJob) -> None:
    """The nodes advertise four each; there is no device, so all computes on CPUs."""
    spec: dict[str, Any] = {"training": {"maxSteps": 5}, "evaluation": {"samples": 50, "everySteps": 50}}
    job.apply(**spec, gpuBudget=budget(trainer=5, rollout=1))
    assert "nvidia.com/gpu" in job.wait_for_reason("Reconciling", "Unschedulable")
    job.apply(**spec, gpuBudget=budget(trainer=1, rollout=2))
    job.wait("Finished", SECONDS)
    assert job.condition("Complete")["status"] == "True", job.status()
    [trainer] = job.pods("trainer")
    assert trainer["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def budget(trainer: int, rollout: int) -> dict[str, Any]:
    split = {"trainer": trainer, "rollout": rollout}
    return {
        "total": trainer + rollout,
        "allocation": "ExtendedResource",
        "mode": "Manual",
        "split": split,
    }


def has_token(job: RunningJob, group: str) -> bool:
    """Whether pods of a group may talk to the API server."""
    return "serviceAccountToken" in json.dumps([pod["spec"]["volumes"] for pod in job.pods(group)])
