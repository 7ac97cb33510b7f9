"""AsyncRLJobs as GitOps tools find them: one for each row of the table in docs/gitops.md.

The objects are as the operator writes them: each row's situation is brought about in the cluster in memory,
and has the status of the planner's last pass. There is no queue yet, so the status of its row comes from
`describe` alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from asyncrl_api.job import API_VERSION, KIND, Spec
from asyncrl_api.job_status import ClocksStatus, Status
from asyncrl_operator.decide.observed import Observed, Problem
from asyncrl_operator.decide.status import JobObject, Memory, Standing, describe
from support.cluster.model_cluster import NAME, UID, ModelCluster, make_spec

Object = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A situation, and how each tool should read it."""

    make: Callable[[], Object]
    kstatus: str
    argo: str
    flux: str
    actions: tuple[str, ...]


def _object(spec: Spec, status: Status, generation: int) -> Object:
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": NAME, "namespace": "team", "uid": UID, "generation": generation},
        "spec": spec.model_dump(by_alias=True, exclude_none=True, mode="json"),
        "status": status.to_json(),
    }


def _seen(cluster: ModelCluster) -> Object:
    return _object(cluster.spec, cluster.status, cluster.generation)


def _running(**overrides: Any) -> ModelCluster:
    cluster = ModelCluster(make_spec(**overrides))
    cluster.run_until_still()
    assert cluster.status.phase == "Running"
    return cluster


def _after_pass(cluster: ModelCluster, phase: str) -> Object:
    cluster.pass_once()
    assert cluster.status.phase == phase, cluster.status
    return _seen(cluster)


def _at_rest(cluster: ModelCluster, phase: str) -> Object:
    cluster.run_until_still()
    assert cluster.status.phase == phase, cluster.status
    return _seen(cluster)


def just_created() -> Object:
    """Return the object as the API server stores it, with the default of `status`."""
    return _object(make_spec(), Status(), 1) | {"status": {"observedGeneration": -1}}


def edited() -> Object:
    """A spec that the operator has not seen yet."""
    cluster = _running()
    cluster.edit(training={"maxSteps": 20})
    return _seen(cluster)


def queued() -> Object:
    job = JobObject(NAME, UID, 1, make_spec())
    standing = Standing("Queued", "Queued", "waits for quota in queue research")
    memory = Memory(None, None, ClocksStatus(), None)
    return _object(job.spec, describe(job, Status(), Observed(), None, standing, memory, 1.8e9), 1)


def starting() -> Object:
    return _after_pass(ModelCluster(), "Starting")


def resizing() -> Object:
    cluster = _running(gpuBudget={"total": 8, "mode": "Manual", "split": {"trainer": 2, "rollout": 6}})
    cluster.edit(gpuBudget={"split": {"trainer": 4, "rollout": 4}})
    for _ in range(10):
        cluster.pass_once()
        if cluster.status.phase == "Resizing":
            return _seen(cluster)
        cluster.settle()
    raise AssertionError(cluster.status)


def restarting() -> Object:
    cluster = _running()
    cluster.trainer_exits(1)
    cluster.settle()
    return _after_pass(cluster, "Restarting")


def running() -> Object:
    return _seen(_running())


def below_strength() -> Object:
    cluster = _running()
    pod = cluster.pods[f"{NAME}-rollout-5"]
    cluster.pods[pod.name] = replace(pod, is_ready=False)
    cluster.now += 200  # longer than a new engine may take
    found = _after_pass(cluster, "Running")
    assert cluster.condition("Degraded") == "True/RolloutShort"
    return found


def report_stale() -> Object:
    cluster = _running()
    cluster.reports()
    cluster.pass_once()  # silence counts from when the operator saw the report
    cluster.now += 1000
    found = _after_pass(cluster, "Running")
    assert cluster.condition("Degraded") == "True/ReportStale"
    return found


def suspending() -> Object:
    cluster = _running()
    cluster.edit(suspend=True)
    return _after_pass(cluster, "Suspending")


def suspended() -> Object:
    cluster = _running()
    cluster.edit(suspend=True)
    return _at_rest(cluster, "Suspended")


def created_suspended() -> Object:
    return _at_rest(ModelCluster(make_spec(suspend=True)), "Suspended")


def stalled() -> Object:
    cluster = ModelCluster(problem=Problem("NameConflict", "Service gsm8k-nats exists and is not ours"))
    return _after_pass(cluster, "Pending")


def stalled_while_running() -> Object:
    cluster = _running()
    cluster.problem = Problem("InvalidSpec", "spec.trainer.podTemplate: refused")
    return _after_pass(cluster, "Running")


def succeeded() -> Object:
    cluster = _running()
    cluster.reports(step=9, state="Finished")
    cluster.trainer_exits(0, "Completed")
    return _at_rest(cluster, "Succeeded")


def failed() -> Object:
    cluster = _running()
    cluster.trainer_exits(65)
    return _at_rest(cluster, "Failed")


def deleted() -> Object:
    """A job whose children are being deleted in the foreground."""
    found = running()
    found["metadata"] |= {
        "deletionTimestamp": "2027-01-15T08:00:00Z",
        "finalizers": ["foregroundDeletion"],
    }
    return found


SUSPEND, RESUME = ("suspend",), ("resume",)

ROWS: Mapping[str, Row] = {
    "just created": Row(just_created, "InProgress", "Progressing", "InProgress", SUSPEND),
    "edited, not seen yet": Row(edited, "InProgress", "Progressing", "InProgress", SUSPEND),
    "queued for quota": Row(queued, "InProgress", "Suspended", "Current", SUSPEND),
    "starting": Row(starting, "InProgress", "Progressing", "InProgress", SUSPEND),
    "resizing": Row(resizing, "InProgress", "Progressing", "InProgress", SUSPEND),
    "restarting": Row(restarting, "InProgress", "Progressing", "InProgress", SUSPEND),
    "running": Row(running, "Current", "Healthy", "Current", SUSPEND),
    "running below strength": Row(below_strength, "Current", "Healthy", "Current", SUSPEND),
    "running, no report": Row(report_stale, "Current", "Healthy", "Current", SUSPEND),
    "suspending": Row(suspending, "InProgress", "Progressing", "InProgress", RESUME),
    "suspended": Row(suspended, "Current", "Suspended", "Current", RESUME),
    "created suspended": Row(created_suspended, "Current", "Suspended", "Current", RESUME),
    "stalled": Row(stalled, "Failed", "Degraded", "Failed", SUSPEND),
    "stalled while running": Row(stalled_while_running, "Failed", "Degraded", "Failed", SUSPEND),
    "succeeded": Row(succeeded, "Current", "Healthy", "Current", ()),
    "failed": Row(failed, "Failed", "Degraded", "Failed", ()),
    "being deleted": Row(deleted, "Terminating", "Progressing", "InProgress", SUSPEND),
}
