"""What one pass sees of a job: plain values that `api_server/observe.py` reads from the caches."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from asyncrl_api.report import Report
from asyncrl_operator.layout import Role

Seconds = float
"""Unix time, in seconds."""
Values = Mapping[str, Any]
"""A spec as in a manifest, perhaps made with another version of the types."""

KUBELET_OOM = "OOMKilled"
"""The kubelet's word; it is one of our reasons too, but only by coincidence."""


@dataclass(frozen=True)
class ContainerEnd:
    """The last known termination of a container."""

    container: str
    exit_code: int
    reason: str = ""
    """The kubelet's reason: OOMKilled, Error, Completed ..."""

    @property
    def ran_out_of_memory(self) -> bool:
        return self.reason == KUBELET_OOM


@dataclass(frozen=True)
class Pod:
    """A pod with the job's label, `asyncrl.dev/job`."""

    name: str
    uid: str
    group: Role
    is_ours: bool = True
    """False if it was made for an earlier job of the same name (label `asyncrl.dev/job-uid`)."""
    attempt: int = 0
    """The trainer's attempt; 0 in other groups."""
    template: str = ""
    """The name of a rollout pod's template (label `asyncrl.dev/template`); empty in other groups."""
    gpus: int = 0
    """The GPUs that it counts against the budget (annotation `asyncrl.dev/gpus`)."""
    phase: Literal["Pending", "Running", "Succeeded", "Failed", "Unknown"] = "Pending"
    is_ready: bool = False
    ready_changed_at: Seconds = 0.0
    """When `is_ready` last changed."""
    node: str = ""
    """The name of its node; empty until it is scheduled."""
    created_at: Seconds = 0.0
    deleted_at: Seconds | None = None
    """When its grace period ends, if it is being deleted (`deletionTimestamp`)."""
    disruption: str = ""
    """The reason of its condition DisruptionTarget: preemption, eviction, a taint."""
    notice: str = ""
    """The announcement of its end that somebody has written on it (annotation `asyncrl.dev/disruption`)."""
    unschedulable: str = ""
    """The scheduler's message while no node is found for it."""
    waiting: str = ""
    """The reason and message of a container that cannot start: `ImagePullBackOff: ...`."""
    ends: tuple[ContainerEnd, ...] = ()

    @property
    def is_alive(self) -> bool:
        """Whether it may still run and hence counts against the budget."""
        return self.phase not in ("Succeeded", "Failed")


@dataclass(frozen=True)
class TrainerJob:
    """The Job of one attempt."""

    name: str
    attempt: int
    is_complete: bool = False
    is_failed: bool = False
    """Whether it has the condition Failed or FailureTarget."""
    message: str = ""
    is_deleting: bool = False


@dataclass(frozen=True)
class StatefulSet:
    """The StatefulSet of the rollout group or the messaging group."""

    name: str
    replicas: int
    template: str = ""
    is_deleting: bool = False


@dataclass(frozen=True)
class Node:
    """A node that one of the pods is on."""

    is_ready: bool
    since: Seconds
    """When `is_ready` last changed."""
    notice: str = ""
    """What announces its end, or that of its pods: a taint, or the annotation `asyncrl.dev/disruption`."""


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, with the reason and message of a condition. A later pass may find it gone."""

    reason: str
    """A reason of decide/reasons.py, or the kubelet's word for a container that cannot start."""
    message: str


@dataclass(frozen=True)
class Observed:
    """Everything that a pass knows of the cluster."""

    trainer_jobs: tuple[TrainerJob, ...] = ()
    rollout: StatefulSet | None = None
    messaging: StatefulSet | None = None
    pods: tuple[Pod, ...] = ()
    nodes: Mapping[str, Node] | None = None
    """The nodes of these pods; a node that is missing here is gone. None: the operator may not see nodes."""
    report: Report | None = None
    report_fault: str = ""
    """What is wrong with the report as it was written, in words."""
    attempts_began: Mapping[int, Values] = field(default_factory=dict)
    """The spec with which each attempt began, by the attempt's number, if its configuration still exists."""
    templates_began: Mapping[str, Values] = field(default_factory=dict)
    """The spec with which each rollout template began, by the template's name."""
    problem: Problem | None = None
    """What keeps the operator from acting on the spec as it is."""
    blocked: Problem | None = None
    """A write that the API server refused in the last pass (QuotaExceeded, say): reported, and retried."""
    has_children: bool = True
    """Whether any object of the job is left, those without pods included."""
