"""What keeps the job going: messaging, checkpoints, and reactions to failure."""

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
    """Where an embedded server keeps its streams."""

    type: Literal["Ephemeral", "Persistent"] = field(
        "Ephemeral: in the pod; streams that are lost with it are made again from the checkpoint. "
        "Persistent: on a PersistentVolumeClaim of the server's own.",
        default="Ephemeral",
    )
    size: Quantity = field("Space for the streams.", default="10Gi")


class EmbeddedSpec(ApiType):
    """A NATS server that belongs to the job."""

    storage: StorageSpec = field("Where the server keeps its streams.", default=StorageSpec())


class SharedSpec(ApiType):
    """A NATS server that other jobs use too."""

    url: Text = field("Address, for example nats://host:4222; required in mode Shared.", default="")
    credentials_secret_ref: SecretReference | None = field(
        "Secret with the NATS credentials file; absent: the server asks for none.", default=None
    )
    subject_prefix: OptionalSubject = field(
        "Prefix of the job's subjects, for an account that may use no others; JetStream's own subjects do "
        "not get it.",
        default="",
    )


class MessagingSpec(ApiType):
    """What carries tickets and trajectories: NATS JetStream."""

    mode: Literal["Embedded", "Shared"] = field(
        "Embedded: a server is started for the job. Shared: the job uses an existing one.",
        default="Embedded",
    )
    embedded: EmbeddedSpec = field("Settings of mode Embedded.", default=EmbeddedSpec())
    shared: SharedSpec = field("Settings of mode Shared.", default=SharedSpec())


class LocationSpec(ClaimReference):
    """A folder on a PersistentVolumeClaim."""

    path: Text = field("Folder on the claim; empty: the job's <namespace>/<name>.", default="")


class CheckpointSpec(ApiType):
    """The checkpoints that a restarted trainer continues from."""

    location: LocationSpec = field("Where checkpoints, the ledger and exports are kept.", mark="I")
    every_steps: Count = field("Steps between checkpoints.", mark="L", default=50)
    every_seconds: Count = field(
        "Longest time between checkpoints, in seconds: one is made after the step in which it is reached. It "
        "bounds what a killed trainer has to do again. While a disruption of the trainer is announced, a "
        "checkpoint is made after each step.",
        mark="L",
        default=600,
    )
    keep: Annotated[int, Field(ge=2, le=10_000)] = field(
        "Number of checkpoints that are kept; the two newest can be restored.", mark="L", default=3
    )
    resume: Literal["Auto", "Never", "FromPath"] = field(
        "What a new job starts from. Auto: a checkpoint of this very object, if there is one. Never: no "
        "checkpoint. FromPath: the checkpoint at resumePath.",
        mark="I",
        default="Auto",
    )
    resume_path: Text = field(
        "Folder of a checkpoint on the claim; used with resume FromPath.", mark="I", default=""
    )
    export_every_steps: CountOrZero = field(
        "Steps between exports of the policy as a Hugging Face folder; 0: only the export at the end, which "
        "is always made.",
        mark="L",
        default=0,
    )


class TrainerFailureSpec(ApiType):
    """When a failed trainer is restarted, and when the job has failed instead."""

    max_restarts: CountOrZero = field(
        "Maximum number of restarts after failures of the trainer itself. A step that cannot be trained is "
        "tried twice before its prompt groups are discarded, which does not count.",
        default=3,
    )
    max_disruptions: CountOrZero = field(
        "Maximum number of restarts after lost nodes, preemptions and evictions, which are nobody's fault.",
        default=50,
    )
    backoff_seconds: CountOrZero = field(
        "Wait before the first restart, in seconds; it doubles with each further one.", default=10
    )
    max_backoff_seconds: CountOrZero = field("Longest wait before a restart, in seconds.", default=600)
    hang_seconds: CountOrZero = field(
        "A trainer that makes no progress for so long while it is its turn is restarted, in seconds; 0: "
        "never. It is not its turn while it waits for groups, an evaluation or engines. A minibatch is "
        "progress, and so are bytes that are loaded, published or written: set more than the longest "
        "minibatch takes, and more than a model factory computes.",
        default=0,
    )
    max_skipped_updates: CountOrZero = field(
        "Number of optimizer updates in a row that may be skipped because their gradient is not finite; one "
        "more ends the job. A skipped update leaves the policy as it is.",
        default=10,
    )
    fatal_exit_codes: Annotated[list[Annotated[int, Field(ge=1, le=255)]], Field(max_length=64)] = field(
        "Exit codes after which the trainer is not restarted. Ours are 64 (usage), 65 (data, model or "
        "numbers unusable) and 78 (configuration refused).",
        default=[64, 65, 78],
        list_type="atomic",
    )


class RolloutFailureSpec(ApiType):
    """What happens when too few engines are ready."""

    min_available_percent: Percent = field(
        "Share of the engines that should be ready, in percent.", default=25
    )
    below_minimum_seconds: CountOrZero = field(
        "Seconds for which fewer engines may be ready before onBelowMinimum applies.", default=900
    )
    on_below_minimum: Literal["Fail", "Continue"] = field(
        "Fail: the job fails. Continue: it goes on and is reported as Degraded.", default="Fail"
    )


class FailurePolicySpec(ApiType):
    """How the operator reacts to failures."""

    trainer: TrainerFailureSpec = field("Failures of the trainer.", default=TrainerFailureSpec())
    rollout: RolloutFailureSpec = field("Failures of engines and workers.", default=RolloutFailureSpec())
    dead_node_force_delete_seconds: CountOrZero = field(
        "Seconds before pods of any group on a dead node are force-deleted, so that others can take their "
        "place.",
        default=120,
    )
    retain_pods_on_failure: bool = field(
        "Whether a failed job's pods stay until ttlSecondsAfterFinished, so that their logs can be read.",
        default=True,
    )
