"""What one pass sees of a job: plain values that `api_server/observe.py` makes from the caches."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from asyncrl_api.report import Report
from asyncrl_operator.layout import Role

Seconds = float
"""Of Unix time."""
Values = Mapping[str, Any]
"""A spec as in a manifest, perhaps of another version of the types."""

KUBELET_OOM = "OOMKilled"
"""The kubelet's word; that it is also one of ours means nothing."""


@dataclass(frozen=True)
class ContainerEnd:
    """A container that has terminated, for the last time that is known of."""

    container: str
    exit_code: int
    reason: str = ""
    """OOMKilled, Error, Completed ..."""

    @property
    def ran_out_of_memory(self) -> bool:
        return self.reason == KUBELET_OOM


@dataclass(frozen=True)
class Pod:
    """A pod with our label `asyncrl.dev/job`."""

    name: str
    uid: str
    group: Role
    is_ours: bool = True
    """False: made for an earlier object of the same name (label `asyncrl.dev/job-uid`)."""
    attempt: int = 0
    """Of the trainer; 0 in other groups."""
    template: str = ""
    """Of a rollout pod: the name of its template, label `asyncrl.dev/template`."""
    gpus: int = 0
    """Annotation `asyncrl.dev/gpus`: what it counts against the budget."""
    phase: Literal["Pending", "Running", "Succeeded", "Failed", "Unknown"] = "Pending"
    is_ready: bool = False
    ready_changed_at: Seconds = 0.0
    """Since when it has been so."""
    node: str = ""
    """Empty until it is scheduled."""
    created_at: Seconds = 0.0
    deleted_at: Seconds | None = None
    """When its grace period ends, if it is being deleted (`deletionTimestamp`)."""
    disruption: str = ""
    """Reason of its condition DisruptionTarget: preemption, eviction, a taint."""
    unschedulable: str = ""
    """The scheduler's message, while it finds no node."""
    waiting: str = ""
    """Reason and message of a container that cannot start: `ImagePullBackOff: ...`."""
    ends: tuple[ContainerEnd, ...] = ()

    @property
    def is_alive(self) -> bool:
        """Whether it may still run, hence counts against the budget."""
        return self.phase not in ("Succeeded", "Failed")


@dataclass(frozen=True)
class TrainerJob:
    """The Job of one attempt."""

    name: str
    attempt: int
    is_complete: bool = False
    is_failed: bool = False
    """It has condition Failed or FailureTarget."""
    message: str = ""
    is_deleting: bool = False


@dataclass(frozen=True)
class StatefulSet:
    """The rollout or messaging group."""

    name: str
    replicas: int
    template: str = ""
    is_deleting: bool = False


@dataclass(frozen=True)
class Node:
    """A node that one of the pods is on."""

    is_ready: bool
    since: Seconds
    """When that changed last."""


@dataclass(frozen=True)
class Problem:
    """Why the operator cannot act on the spec as it is. A later pass may find it gone."""

    reason: str
    """NameConflict, MissingReference, InvalidSpec, BudgetTooSmall, CRDTooOld: the reason of Stalled."""
    message: str


@dataclass(frozen=True)
class Observed:
    """All that a pass knows of the cluster."""

    trainer_jobs: tuple[TrainerJob, ...] = ()
    rollout: StatefulSet | None = None
    messaging: StatefulSet | None = None
    pods: tuple[Pod, ...] = ()
    nodes: Mapping[str, Node] | None = None
    """The nodes of these pods; one that is missing is gone. None: the operator may not see nodes."""
    report: Report | None = None
    attempts_began: Mapping[int, Values] = field(default_factory=dict)
    """The spec with which an attempt began, by its number, as far as its configuration is there."""
    templates_began: Mapping[str, Values] = field(default_factory=dict)
    """The spec with which a rollout template began, by the template's name."""
    problem: Problem | None = None
    blocked: Problem | None = None
    """A write that the API server refused in the last pass (QuotaExceeded, say): told, and tried again."""
    has_children: bool = True
    """Whether any object of ours is left, those without pods included."""
