"""Argo CD's engine applies a folder, and a policy is trained."""

from pathlib import Path
from typing import Any

import pytest

from support.chart.installed_operator import Operator
from support.cluster.gitops_repository import Repository
from support.cluster.nodes import NodeCluster
from support.cluster.operator_process import eventually
from support.cluster.running_job import RunningJob, in_pods
from support.paths import EXAMPLES

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600, func_only=True)]

CODE = {
    "apiVersion": "v1",
    "kind": "ConfigMap",
    "metadata": {"name": "code"},
    "data": {"digits.py": (EXAMPLES / "custom_reward" / "digits.py").read_text()},
}
STEPS = 150
SECONDS = 240


def manifest(temperature: float) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "reward": {"configMapRef": {"name": "code"}},
        "sampling": {"temperature": temperature},
        "training": {"maxSteps": STEPS},
        "evaluation": {"samples": 50, "everySteps": 5000},
    }
    return in_pods(EXAMPLES / "custom_reward" / "job.yaml", **spec)


@pytest.mark.parametrize("how", [(), ("--server-side",)], ids=["client-side", "server-side"])
def test_a_folder_trains_a_policy(
    nodes: NodeCluster, operator: Operator, namespace: str, tmp_path: Path, how: tuple[str, ...]
) -> None:
    job = RunningJob(nodes, namespace, "custom_reward/job.yaml")
    repository = Repository(nodes, tmp_path, namespace, how)
    repository.write("code", CODE)
    repository.write("job", manifest(1.0))
    repository.sync()
    assert repository.stands() == ("Synced", "Progressing")
    job.wait_for_step(2, SECONDS)
    job.wait("Running", SECONDS)
    assert repository.stands() == ("Synced", "Healthy")

    for temperature in (1.2, 1.0):  # a change, and back
        repository.write("job", manifest(temperature))
        assert repository.stands()[0] == "OutOfSync"
        repository.sync()
        assert repository.stands() == ("Synced", "Healthy")
    job.wait("Finished", SECONDS)
    assert job.status()["progress"]["step"] == STEPS
    assert repository.stands() == ("Synced", "Healthy"), "a job that is done is no fault"

    repository.remove("job")
    repository.sync()
    eventually("all of it is gone", lambda: not job.names("statefulsets") and not job.names("pods"), 120)
