"""The operator uses each right that the chart grants: one job is taken through all of them."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncrl_operator.resources import JOB_UID_LABEL
from support.chart.rendered_chart import NAME, only, render, rights
from support.cluster.operator_process import Job, OperatorProcess, eventually, running_operator

pytestmark = pytest.mark.e2e

BY_KOPF = {("asyncrljobs", "list"), ("asyncrljobs", "watch")}
"""The rights that kopf uses with its own client; without them no job would be seen."""
BY_THE_SERVER = {("asyncrljobs/finalizers", "update")}
"""The rights that OwnerReferencesPermissionEnforcement requires, which is off in this control plane."""
BY_APPLY = {("jobs", "patch")}
"""An apply that makes an object needs both rights; a Job stays as it was made."""
CHILDREN = "roles,rolebindings,serviceaccounts,services,configmaps,pdb,networkpolicies,statefulsets,jobs"


@pytest.fixture
def operator(operator_rights: Path, tmp_path: Path) -> Iterator[OperatorProcess]:
    """An operator whose calls are those of this test alone."""
    with running_operator(operator_rights, tmp_path) as running:
        yield running


def granted() -> set[tuple[str, str]]:
    role = rights(only(render(), "ClusterRole", NAME))
    return {(name.partition(".")[0], verb) for name, verbs in role.items() for verb in verbs}


def test_each_right_is_used(job: Job, operator: OperatorProcess) -> None:
    job.kubectl("create", "quota", "few", "--hard=pods=0")  # events: list
    job.apply()
    job.wait_for_reason("Reconciling", "QuotaExceeded")
    job.kubectl("delete", "quota", "few")
    job.wait("Running")
    eventually("both engines are ready", lambda: job.condition("RolloutReady")["message"] == "2/2")
    take_labels_off(job)
    for _ in range(2):  # the same words twice: events: get, patch
        job.kubectl("delete", "service", "gsm8k-rollout")
        eventually("the Service is back", lambda: "gsm8k-rollout" in job.names("services"))
    roll(job)
    end(job)
    used = {pair for pair in granted() if operator.num_calls(*pair)}
    assert granted() - used == BY_KOPF | BY_THE_SERVER | BY_APPLY


def take_labels_off(job: Job) -> None:
    """Make the operator lose sight of all children, so that it looks up each one when it creates it again."""
    children = [each for each in job.children(CHILDREN) if each["kind"] != "Job"]
    for child in children:
        what = f"{child['kind']}/{child['metadata']['name']}"
        job.kubectl("label", what, f"{JOB_UID_LABEL}-")

    def missing() -> list[str]:
        found = json.loads(job.kubectl("get", CHILDREN, "-l", JOB_UID_LABEL, "-o", "json"))["items"]
        there = {(each["kind"], each["metadata"]["name"]) for each in found}
        places = ((each["kind"], each["metadata"]["name"]) for each in children)
        return [f"{kind}/{name}" for kind, name in places if (kind, name) not in there]

    try:
        eventually("all have their labels again", lambda: not missing())
    except AssertionError as error:
        raise AssertionError(f"{error}: {missing()}") from error
    job.kubectl("label", "job/gsm8k-trainer-1", f"{JOB_UID_LABEL}-")
    eventually("a Job that cannot be watched is replaced", lambda: job.names("jobs") == ["gsm8k-trainer-2"])
    job.wait("Running")


def roll(job: Job) -> None:
    """Make the operator replace the engines (pods: delete)."""
    job.patch({"rollout": {"engine": {"type": "CPU", "args": ["--max-total-tokens", "4096"]}}})

    def is_rolled() -> bool:
        group = next(each for each in job.status()["groups"] if each["name"] == "rollout")
        return bool((group.get("updated"), group["summary"]) == (2, "2/2"))

    eventually("both engines are replaced", is_rolled)


def end(job: Job) -> None:
    """Finish the job, so that its children are deleted."""
    pod = next(name for name in job.names("pods") if "trainer" in name)
    job.kubectl("annotate", "pod", pod, "kubeup/exit-code=0")
    job.wait("Complete")
    job.patch({"ttlSecondsAfterFinished": 0})
    eventually("its children are deleted", lambda: not job.names(CHILDREN))
