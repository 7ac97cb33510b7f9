"""What a pass decides: plain values between planner and executor.

The executor renders `Desired` (render/manifests.py), applies what differs, and deletes what is to go.
"""

from dataclasses import dataclass, field
from typing import Literal

from asyncrl_api.job_status import Status
from asyncrl_operator.decide.observed import Seconds


@dataclass(frozen=True)
class DesiredTrainer:
    """The Job that is to be there."""

    number: int
    gpus: int


@dataclass(frozen=True)
class Desired:
    """What is to be there. None: left as it is, or not made."""

    shared: bool = True
    """Services, ConfigMaps, RBAC, Secret, PDB, NetworkPolicy."""
    messaging_replicas: int | None = None
    trainer: DesiredTrainer | None = None
    rollout_replicas: int | None = None


@dataclass(frozen=True)
class DeletePod:
    name: str
    uid: str
    is_forced: bool
    """Without grace: nobody answers for it any more."""


@dataclass(frozen=True)
class DeleteTrainerJob:
    """In the foreground: the Job stays until its pods are gone."""

    name: str


@dataclass(frozen=True)
class DeleteChildren:
    """All of them: the job has finished and its TTL is over."""


Deletion = DeletePod | DeleteTrainerJob | DeleteChildren


@dataclass(frozen=True)
class Event:
    """What the user is told in `kubectl describe`."""

    reason: str
    message: str
    type: Literal["Normal", "Warning"] = "Normal"


@dataclass(frozen=True)
class Outcome:
    """What one pass decides. The executor follows it in the order of the fields."""

    write_status_first: bool
    """DesiredTrainer or split differ from what is stored: `status` is written before anything is done."""
    desired: Desired | None
    """None: nothing is applied, nor corrected."""
    deletions: tuple[Deletion, ...]
    status: Status
    wake_at: Seconds | None
    """When to look again though nothing has changed."""
    events: tuple[Event, ...] = field(default=())
