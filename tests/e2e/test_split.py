"""GPUs move between trainer and rollout as the reports ask for it, while their pods run."""

import re
from pathlib import Path
from typing import Any

import pytest

from support.chart.installed_operator import Operator
from support.cluster.nodes import NodeCluster
from support.cluster.operator_process import eventually
from support.cluster.running_job import RunningJob

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900, func_only=True)]

SECONDS = 300
SLOW = "slow"
"""A file on the models' volume; while it exists, engines produce little."""
CODE = f'''"""The right sum, judged in no hurry."""

import os
import time


def score(prompt, response, row):
    if os.path.exists("/cache/{SLOW}"):
        time.sleep(0.1)
    return float(response == str(row["answer"]))
'''


@pytest.fixture
def patient(nodes: NodeCluster, operator: Operator, namespace: str, tmp_path: Path) -> RunningJob:
    """A job whose reward can be made slow, not applied yet."""
    job = RunningJob(nodes, namespace, "custom_reward/job.yaml")
    code = tmp_path / "patience.py"
    code.write_text(CODE)
    job.kubectl("create", "configmap", "code", f"--from-file={code}")
    return job


def apply(job: RunningJob, **auto: Any) -> None:
    """Apply it with two ranks and two engines to begin with."""
    job.apply(
        reward={"function": "patience:score", "configMapRef": {"name": "code"}},
        training={"maxSteps": 100_000},
        evaluation={"samples": 50, "everySteps": 100_000},
        trainer={"deepspeed": {"zeroStage": 2}},
        gpuBudget={"total": 4, "auto": {"initialRolloutPercent": 50, "cooldownSeconds": 10} | auto},
    )


def split(job: RunningJob) -> tuple[int, int, int]:
    """Return the GPUs of trainer and rollout, and those that are idle."""
    decided = job.status().get("split", {})
    return decided.get("trainer", 0), decided.get("rollout", 0), decided.get("idle", 0)


def test_gpus_move_to_the_group_that_is_short_and_back(nodes: NodeCluster, patient: RunningJob) -> None:
    slow = nodes.folder_of(patient.namespace, "models") / SLOW
    slow.touch()
    apply(patient)
    eventually("it is divided", lambda: split(patient) == (2, 2, 0))
    eventually("the trainer starves", lambda: split(patient) == (1, 3, 0), SECONDS)
    eventually("a smaller trainer", lambda: "custom-reward-trainer-2" in patient.names("jobs"), 60)
    patient.wait_for_step(patient.trained() + 3, SECONDS)

    slow.unlink()
    eventually("samples pile up", lambda: split(patient) == (2, 2, 0), SECONDS)
    eventually("a larger trainer", lambda: "custom-reward-trainer-3" in patient.names("jobs"), 60)
    patient.wait_for_step(patient.trained() + 3, SECONDS)
    assert patient.events()["SplitChanged"] >= 2
    assert patient.status()["attempt"]["restarts"] == 0
    patient.patch({"suspend": True})
    patient.wait("Suspended", 120)
    assert re.search(r"missing 0  twice 0", patient.audit())


def test_a_trainer_that_may_not_be_resized_has_what_is_too_much_given_back(patient: RunningJob) -> None:
    apply(patient, trainerResize="Never")
    eventually("samples pile up", lambda: split(patient) == (2, 1, 1), SECONDS)
    eventually("one engine is left", lambda: len(patient.pods("rollout")) == 1, 60)
    patient.wait_for_step(patient.trained() + 3, SECONDS)
    assert patient.names("jobs") == ["custom-reward-trainer-1"], "the trainer took no pause"
