"""Argo CD's engine applies a folder, and a policy is trained."""

from pathlib import Path
from typing import Any

import pytest

from gitops_repository import Repository
from installed_operator import Operator
from node_cluster import NodeCluster
from operator_process import eventually
from running_job import EXAMPLES, RunningJob, in_pods

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

CODE = {
    "apiVersion": "v1",
    "kind": "ConfigMap",
    "metadata": {"name": "code"},
    "data": {"digits.py": (EXAMPLES / "custom_reward" / "digits.py").read_text()},
}
SECONDS = 240


def manifest(steps: int) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "reward": {"configMapRef": {"name": "code"}},
        "training": {"maxSteps": steps},
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
    repository.write("job", manifest(5000))
    repository.sync()
    assert repository.stands() == ("Synced", "Progressing")
    job.wait_for_step(2, SECONDS)
    job.wait("Running", SECONDS)
    assert repository.stands() == ("Synced", "Healthy")

    repository.write("job", manifest(steps := job.trained() + 200))
    assert repository.stands()[0] == "OutOfSync"
    repository.sync()
    assert repository.stands() == ("Synced", "Healthy")
    repository.write("job", manifest(5000))
    repository.sync()
    eventually("it is rolled back", lambda: job.get("arl", job.name)["spec"]["training"]["maxSteps"] == 5000)
    repository.write("job", manifest(steps))
    repository.sync()
    job.wait("Finished", SECONDS)
    assert job.status()["progress"]["step"] == steps
    assert repository.stands() == ("Synced", "Healthy"), "a job that is done is no fault"

    repository.remove("job")
    repository.sync()
    eventually("all of it is gone", lambda: not job.names("statefulsets") and not job.names("pods"), 120)
