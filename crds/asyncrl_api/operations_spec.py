"""What keeps the job going: messaging, checkpoints, reactions to failure."""

from typing import Annotated, Literal

from pydantic import Field

from asyncrl_api.base import (
    ApiType,
    ClaimReference,
    Count,
    CountOrZero,
    OptionalSubject,
    Percent,
    Quantity,
    SecretReference,
    Text,
)
from asyncrl_api.marks import field


class StorageSpec(ApiType):
    """Where the streams of an embedded server lie."""

    type: Literal["Ephemeral", "Persistent"] = field(
        "Ephemeral: in the pod; streams that are lost with it are made again from the checkpoint. "
        "Persistent: on a claim of the server.",
        default="Ephemeral",
    )
    size: Quantity = field("Room for the streams.", default="10Gi")


class EmbeddedSpec(ApiType):
    """A NATS server of the job's own."""

    storage: StorageSpec = field("Where the streams lie.", default=StorageSpec())


class SharedSpec(ApiType):
    """A NATS server that other jobs use as well."""

    url: Text = field("Address, nats://host:4222 say; required in mode Shared.", default="")
    credentials_secret_ref: SecretReference | None = field(
        "Secret with the NATS credentials file; absent: the server asks for none.", default=None
    )
    subject_prefix: OptionalSubject = field(
        "Put before the job's subjects, where the account has no others; those of JetStream itself stay.",
        default="",
    )


class MessagingSpec(ApiType):
    """What carries tickets and trajectories: NATS JetStream."""

    mode: Literal["Embedded", "Shared"] = field(
        "Embedded: a server is started for the job. Shared: one that is there is used.", default="Embedded"
    )
    embedded: EmbeddedSpec = field("Settings of mode Embedded.", default=EmbeddedSpec())
    shared: SharedSpec = field("Settings of mode Shared.", default=SharedSpec())


class LocationSpec(ClaimReference):
    """A folder on a PersistentVolumeClaim."""

    path: Text = field("Folder on the claim; empty: <namespace>/<name> of the job.", default="")


class CheckpointSpec(ApiType):
    """What a restarted trainer continues from."""

    location: LocationSpec = field("Where checkpoints, ledger and exports lie.", mark="I")
    every_steps: Count = field("Steps between checkpoints.", mark="L", default=50)
    keep: Annotated[int, Field(ge=2, le=10_000)] = field(
        "Checkpoints that are kept; the two newest can be restored.", mark="L", default=3
    )
    resume: Literal["Auto", "Never", "FromPath"] = field(
        "What a new job begins with. Auto: a checkpoint of this very object, if there is one. "
        "Never: nothing. FromPath: resumePath.",
        mark="I",
        default="Auto",
    )
    resume_path: Text = field(
        "Folder of a checkpoint on the claim, for resume FromPath.", mark="I", default=""
    )
    export_every_steps: CountOrZero = field(
        "Steps between exports as a Hugging Face folder; 0: only at the end, which always exports.",
        mark="L",
        default=0,
    )


class TrainerFailureSpec(ApiType):
    """When a trainer that failed is started again, and when the job has failed."""

    max_restarts: CountOrZero = field("Restarts after a failure of the trainer's own.", default=3)
    max_disruptions: CountOrZero = field(
        "Restarts after a lost node, a preemption or an eviction, which are nobody's fault.", default=50
    )
    backoff_seconds: CountOrZero = field(
        "Wait before the first restart, in seconds; doubles with each.", default=10
    )
    max_backoff_seconds: CountOrZero = field("Longest wait before a restart, in seconds.", default=600)
    hang_seconds: CountOrZero = field(
        "A trainer that makes no progress for so long while it is its turn is restarted, in seconds; 0: "
        "never. It is not its turn while it waits for groups, an evaluation or engines. A minibatch is "
        "progress, and so are bytes that are loaded, published or written: set more than the longest "
        "minibatch takes, and more than a model factory computes.",
        default=0,
    )
    fatal_exit_codes: Annotated[list[Annotated[int, Field(ge=1, le=255)]], Field(max_length=64)] = field(
        "Exit codes after which there is no restart. Ours: 64 usage, 65 data, model or numbers unusable, 78 "
        "configuration refused.",
        default=[64, 65, 78],
        list_type="atomic",
    )


class RolloutFailureSpec(ApiType):
    """When too few engines are too few."""

    min_available_percent: Percent = field("Share of the engines that should be ready.", default=25)
    below_minimum_seconds: CountOrZero = field(
        "How long fewer are borne before onBelowMinimum, in seconds.", default=900
    )
    on_below_minimum: Literal["Fail", "Continue"] = field(
        "Fail: the job has failed. Continue: it is reported as Degraded, and goes on.", default="Fail"
    )


class FailurePolicySpec(ApiType):
    """How failures are answered."""

    trainer: TrainerFailureSpec = field("Failures of the trainer.", default=TrainerFailureSpec())
    rollout: RolloutFailureSpec = field("Failures of engines and workers.", default=RolloutFailureSpec())
    dead_node_force_delete_seconds: CountOrZero = field(
        "Wait before pods on a dead node, of any group, are force-deleted so that others can take their "
        "place, in seconds.",
        default=120,
    )
    retain_pods_on_failure: bool = field(
        "Whether pods of a failed job stay, for their logs, until ttlSecondsAfterFinished.", default=True
    )
