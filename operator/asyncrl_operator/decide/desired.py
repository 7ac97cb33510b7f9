"""What a pass decides: plain values that the planner hands to the executor.

The executor renders `Desired` (render/manifests.py), applies what differs, and makes the deletions.
"""

from dataclasses import dataclass, field
from typing import Literal

from asyncrl_api.job_status import Status
from asyncrl_operator.decide.observed import Seconds


@dataclass(frozen=True)
class DesiredTrainer:
    """The trainer's Job that should exist."""

    number: int
    gpus: int


@dataclass(frozen=True)
class Desired:
    """The objects that should exist. None: an object is left as it is, or not created."""

    shared: bool = True
    """Whether the objects that all groups share should: Services, ConfigMaps, RBAC, Secret, PDB,
    NetworkPolicy."""
    messaging_replicas: int | None = None
    trainer: DesiredTrainer | None = None
    rollout_replicas: int | None = None
    disruption: str = ""
    """What is announced to end the trainer's pods; handed on to the trainer."""


@dataclass(frozen=True)
class DeletePod:
    name: str
    uid: str
    is_forced: bool
    """Whether it is deleted without a grace period, since no kubelet answers for it any more."""


@dataclass(frozen=True)
class DeleteTrainerJob:
    """Delete a trainer's Job in the foreground, so that the Job stays until its pods are gone."""

    name: str


@dataclass(frozen=True)
class DeleteChildren:
    """Delete all objects of a job that has finished and whose time to live is over."""


Deletion = DeletePod | DeleteTrainerJob | DeleteChildren


@dataclass(frozen=True)
class Event:
    """What `kubectl describe` tells the user."""

    reason: str
    message: str
    type: Literal["Normal", "Warning"] = "Normal"


@dataclass(frozen=True)
class Outcome:
    """Everything that one pass decides. The executor carries it out in the order of the fields."""

    write_status_first: bool
    """Whether `status` is written before anything is done, because the attempt or the split in it is new, or
    the job ends."""
    desired: Desired | None
    """None: nothing is applied or corrected."""
    deletions: tuple[Deletion, ...]
    status: Status
    wake_at: Seconds | None
    """When to look again even if nothing has changed."""
    events: tuple[Event, ...] = field(default=())
