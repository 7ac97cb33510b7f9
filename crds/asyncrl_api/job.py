"""AsyncRLJob: the one source of CRD, defaults, validation and reference.

Its blocks are declared in `sampling_spec` (model to evaluation), `training_spec`, `placement_spec` and
`operations_spec`; rules across fields are in `rules`.
"""

from typing import Any, Final, Literal

from asyncrl_api.base import (
    ApiType,
    ClaimReference,
    ConfigMapReference,
    CountOrZero,
    Name,
    SecretReference,
)
from asyncrl_api.marks import field
from asyncrl_api.operations_spec import (
    CheckpointSpec,
    EmbeddedSpec,
    FailurePolicySpec,
    LocationSpec,
    MessagingSpec,
    RolloutFailureSpec,
    SharedSpec,
    StorageSpec,
    TrainerFailureSpec,
)
from asyncrl_api.placement_spec import (
    AutoSplitSpec,
    DeepSpeedSpec,
    EmulationSpec,
    EngineSpec,
    GangSpec,
    GPUBudgetSpec,
    NetworkSpec,
    RolloutSpec,
    SchedulingSpec,
    SplitSpec,
    TrainerSpec,
    UpdateSpec,
    WeightSyncSpec,
)
from asyncrl_api.sampling_spec import (
    DatasetSpec,
    EvaluationSpec,
    ModelSpec,
    RewardSpec,
    SamplingSpec,
    WorkflowSpec,
)
from asyncrl_api.training_spec import (
    AlgorithmSpec,
    ClipSpec,
    ImportanceWeightSpec,
    LoRASpec,
    OverlongPenaltySpec,
    ScheduleSpec,
    StalenessSpec,
    TrainingSpec,
)

__all__ = [
    "API_VERSION",
    "KIND",
    "AlgorithmSpec",
    "AsyncRLJob",
    "AutoSplitSpec",
    "CheckpointSpec",
    "ClaimReference",
    "ClipSpec",
    "ConfigMapReference",
    "DatasetSpec",
    "DeepSpeedSpec",
    "EmbeddedSpec",
    "EmulationSpec",
    "EngineSpec",
    "EvaluationSpec",
    "FailurePolicySpec",
    "GPUBudgetSpec",
    "GangSpec",
    "ImportanceWeightSpec",
    "LoRASpec",
    "LocationSpec",
    "MessagingSpec",
    "Metadata",
    "ModelSpec",
    "NetworkSpec",
    "OverlongPenaltySpec",
    "RewardSpec",
    "RolloutFailureSpec",
    "RolloutSpec",
    "SamplingSpec",
    "ScheduleSpec",
    "SchedulingSpec",
    "SecretReference",
    "SharedSpec",
    "Spec",
    "SplitSpec",
    "StalenessSpec",
    "StorageSpec",
    "TrainerFailureSpec",
    "TrainerSpec",
    "TrainingSpec",
    "UpdateSpec",
    "WeightSyncSpec",
    "WorkflowSpec",
    "to_manifest",
]

API_VERSION: Final = "asyncrl.dev/v1alpha1"
KIND: Final = "AsyncRLJob"


class Spec(ApiType):
    """What the user wants."""

    model: ModelSpec = field("The language model that is trained.", mark="I")
    dataset: DatasetSpec = field("The prompts that the policy is trained on.", mark="I")
    workflow: WorkflowSpec = field("How one sample is made.", mark="U", default=WorkflowSpec())
    reward: RewardSpec = field("How responses are scored.", mark="U", default=RewardSpec())
    sampling: SamplingSpec = field("How the policy is sampled.", default=SamplingSpec())
    training: TrainingSpec = field("Batches and the optimizer.")
    algorithm: AlgorithmSpec = field("The loss.", mark="R", default=AlgorithmSpec())
    staleness: StalenessSpec = field(
        "How far sampling may run ahead of training.", mark="L", default=StalenessSpec()
    )
    evaluation: EvaluationSpec | None = field(
        "Evaluation on held-out prompts. Absent: there is none.", mark="R", default=None
    )
    gpu_budget: GPUBudgetSpec = field("How many GPUs the job may hold, and who decides how they are used.")
    rollout: RolloutSpec = field("The group that samples.", default=RolloutSpec())
    trainer: TrainerSpec = field("The group that trains.", default=TrainerSpec())
    emulation: EmulationSpec = field(
        "Emulated devices, with rollout.engine.type and trainer.backend Emulated.",
        mark="I",
        default=EmulationSpec(),
    )
    weight_sync: WeightSyncSpec = field(
        "How new weights reach the engines.", mark="R", default=WeightSyncSpec()
    )
    messaging: MessagingSpec = field(
        "What carries tickets and trajectories.", mark="I", default=MessagingSpec()
    )
    checkpoint: CheckpointSpec = field("The checkpoints that a restarted trainer continues from.")
    scheduling: SchedulingSpec = field("Where the pods go.", mark="I", default=SchedulingSpec())
    suspend: bool = field(
        "True stops all pods, the trainer's once it has written a checkpoint; false continues from there.",
        mark="L",
        default=False,
    )
    managed_by: Name = field(
        "Controller that acts on the object instead of this operator. Not supported yet: must be empty.",
        mark="I",
        default="",
    )
    active_deadline_seconds: CountOrZero = field(
        "Seconds that the job may be active before it fails; 0: no deadline.", mark="L", default=0
    )
    pending_deadline_seconds: CountOrZero = field(
        "Seconds that the job's pods may wait to start before the job fails; 0: no deadline.",
        mark="L",
        default=0,
    )
    ttl_seconds_after_finished: CountOrZero = field(
        "Seconds after the job's end until its children (never the AsyncRLJob) are deleted; 0: at once.",
        mark="L",
        default=3600,
    )
    failure_policy: FailurePolicySpec = field(
        "How the operator reacts to failures.", mark="L", default=FailurePolicySpec()
    )


class Metadata(ApiType):
    """Kubernetes' ObjectMeta: name and labels are the user's, the API server fills in the rest."""

    name: Name
    namespace: Name | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    uid: str | None = None
    generation: int | None = None
    resource_version: str | None = None
    generate_name: str | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    deletion_grace_period_seconds: int | None = None
    self_link: str | None = None
    finalizers: list[str] | None = None
    owner_references: list[dict[str, Any]] | None = None
    managed_fields: list[dict[str, Any]] | None = None


class AsyncRLJob(ApiType):
    """Asynchronous reinforcement learning of a language model."""

    api_version: Literal["asyncrl.dev/v1alpha1"] = API_VERSION
    kind: Literal["AsyncRLJob"] = KIND
    metadata: Metadata
    spec: Spec
    status: dict[str, Any] | None = None
    """The status that the operator wrote last; users do not write it."""


def to_manifest(job: AsyncRLJob) -> dict[str, Any]:
    """Return the manifest of `job` with all defaults; absent fields stay absent, since nulls are refused."""
    return job.model_dump(by_alias=True, exclude_none=True)
