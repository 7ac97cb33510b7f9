"""Argo CD's engine applies a folder, and finds it in sync at every phase of a job's life."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.cluster.control_plane import Cluster
from support.cluster.gitops_repository import Repository
from support.cluster.operator_process import Job, OperatorProcess, eventually, make_job, running_operator

pytestmark = pytest.mark.e2e

CODE = {
    "apiVersion": "v1",
    "kind": "ConfigMap",
    "metadata": {"name": "code"},
    "data": {"code.py": "def score(answer): return 1.0"},
}
REWARD = {"type": "Function", "function": "code:score", "configMapRef": {"name": "code"}}
BUDGET = {
    "total": 4,
    "allocation": "None",
    "auto": {"initialRolloutPercent": 50, "cooldownSeconds": 4},
}


@pytest.fixture(scope="module")
def operator(operator_rights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    with running_operator(operator_rights, tmp_path_factory.mktemp("operator")) as running:
        yield running


@pytest.fixture(params=[(), ("--server-side",)], ids=["client-side", "server-side"])
def repository(cluster: Cluster, job: Job, tmp_path: Path, request: pytest.FixtureRequest) -> Repository:
    return Repository(cluster, tmp_path, job.namespace, request.param)


def test_a_job_is_in_sync_all_its_life(job: Job, operator: OperatorProcess, repository: Repository) -> None:
    spec: dict[str, Any] = {"reward": REWARD, "gpuBudget": BUDGET}
    repository.write("code", CODE)
    repository.write("job", make_job(**spec))
    repository.sync()
    job.wait("Running")
    assert repository.stands() == ("Synced", "Healthy")

    repository.write("job", make_job(**spec, training={"batchSize": 8, "maxSteps": 250}))
    assert repository.stands()[0] == "OutOfSync"
    repository.sync()
    live = "the change is live"
    eventually(live, lambda: "250" in str(job.get("configmap", "gsm8k-live")["data"]))
    assert repository.stands()[0] == "Synced"

    eventually("GPUs move", lambda: job.report(wait_share=0.8) and job.status()["split"]["trainer"] == 1)
    eventually("the smaller trainer runs", lambda: job.names("jobs") == ["gsm8k-trainer-2"])
    job.wait("Running")
    assert repository.stands() == ("Synced", "Healthy"), "a decision of the operator is no drift"

    job.kubectl("scale", "asyncrljob", "gsm8k", "--replicas=3")
    assert differences(repository.compare("AsyncRLJob")) == ["spec.gpuBudget.total"]
    repository.sync()
    assert job.get("asyncrljob", "gsm8k")["spec"]["gpuBudget"]["total"] == 4

    job.patch({"suspend": True})
    job.wait("Suspended")
    assert repository.stands() == ("Synced", "Suspended"), "Git says nothing of suspend"
    job.patch({"suspend": False})
    job.wait("Running")

    repository.remove("job")
    repository.sync()
    gone = "the job is pruned, and its children with it"
    eventually(gone, lambda: not job.children("statefulsets,jobs,services,configmaps"))
    assert repository.compare("ConfigMap")["sync"] == "Synced"


def differences(found: dict[str, Any]) -> list[str]:
    """Return the paths at which the live object differs from what a sync would make of it."""
    live, wanted = (leaves(json.loads(found[side])) for side in ("live", "predicted"))
    return [path for path in sorted(live.keys() | wanted.keys()) if live.get(path) != wanted.get(path)]


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            name: leaf for key, each in value.items() for name, leaf in leaves(each, f"{path}.{key}").items()
        }
    return {path.removeprefix("."): value}
