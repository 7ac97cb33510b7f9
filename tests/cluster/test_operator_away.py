"""What happens while the operator is down, and when it comes back."""

from pathlib import Path

import pytest

from support.cluster.operator_process import Job, eventually, running_operator

pytestmark = pytest.mark.e2e


def test_an_operator_comes_and_goes(job: Job, operator_rights: Path, tmp_path: Path) -> None:
    """It ends within seconds, starts without a write, makes up for what it missed; deletion does without."""
    with running_operator(operator_rights, tmp_path) as operator:
        job.apply()
        job.wait("Running")
        eventually("both engines are ready", lambda: job.condition("RolloutReady")["message"] == "2/2")
        assert operator.stop() < 5
    before = versions(job)
    with running_operator(operator_rights, tmp_path) as operator:
        shown = f'namespace="{job.namespace}"'
        eventually("the job was looked at", lambda: any(shown in series for series in operator.metrics()))
        assert versions(job) == before, "nothing of an unchanged job is written"
    job.kubectl("delete", "service", "gsm8k-nats")
    with running_operator(operator_rights, tmp_path):
        eventually("the Service is back", lambda: "gsm8k-nats" in job.names("services"))
    job.delete()
    kinds = "pods,statefulsets,jobs,services,configmaps,secrets"
    eventually("all is deleted without the operator", lambda: not job.names(kinds), 60)


def versions(job: Job) -> dict[str, str]:
    """Return a version of each object of the job: its generation where others write a status of it."""
    kinds = "statefulsets,jobs,services,configmaps,roles,rolebindings,serviceaccounts,pdb,networkpolicies"
    metadata = {
        f"{each['kind']}/{each['metadata']['name']}": each["metadata"] for each in job.children(kinds)
    }
    return {name: str(meta.get("generation", meta["resourceVersion"])) for name, meta in metadata.items()}
