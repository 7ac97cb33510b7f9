"""What the job runs on: GPU budget, rollout and trainer groups, weight sync, scheduling."""

from typing import Annotated, Any, Literal

from pydantic import Field

from asyncrl_api.base import (
    ApiType,
    Arguments,
    Count,
    CountOrZero,
    FreeForm,
    Name,
    OptionalQuantity,
    Quantity,
    SecretReference,
    Text,
)
from asyncrl_api.marks import field


class SplitSpec(ApiType):
    """How the GPUs are shared in mode Manual; the sum is at most the budget."""

    trainer: Count = field(
        "GPUs of the trainer: a multiple of trainer.gpuGranularity, and either at most trainer.gpusPerNode "
        "or a multiple of it.",
        mark="R",
    )
    rollout: Count = field(
        "GPUs of the rollout group: enough for whole replicas, at least rollout.minReplicas of them.",
        mark="L",
    )


class AutoSplitSpec(ApiType):
    """How the operator shares out the GPUs in mode Auto; its decision is in status.split."""

    initial_rollout_percent: Annotated[int, Field(ge=1, le=99)] = field(
        "Share of the budget, in percent, that rollout starts with, before anything is measured.",
        default=75,
    )
    cooldown_seconds: Count = field(
        "Shortest time between two changes of the split, in seconds.", default=600
    )
    trainer_resize: Literal["AtCheckpoint", "Never"] = field(
        "Whether the number of the trainer's GPUs may change, which restarts the trainer from a checkpoint.",
        default="AtCheckpoint",
    )


class GPUBudgetSpec(ApiType):
    """How many GPUs the job may hold, and who decides how they are used."""

    total: Count = field(
        "GPUs of trainer and rollout together, which the job never exceeds; `kubectl scale` changes it. With "
        "allocation None it counts process slots.",
        mark="L",
    )
    resource_name: Name = field(
        "Extended resource that stands for one GPU.", mark="I", default="nvidia.com/gpu", min_length=1
    )
    gpu_memory: OptionalQuantity = field(
        "Memory of one GPU, for example 80Gi; together with model.parameterCount it lets the operator derive "
        "the tensor-parallel size and the smallest trainer. Empty: unknown.",
        mark="I",
        default="",
    )
    allocation: Literal["ExtendedResource", "ResourceClaim", "None"] = field(
        "How pods request GPUs. ExtendedResource: as the resource resourceName. ResourceClaim: not supported "
        "yet. None: they request none, and the job runs on CPUs.",
        mark="I",
        default="ExtendedResource",
    )
    mode: Literal["Auto", "Manual"] = field(
        "Auto: the operator splits the budget and moves GPUs according to what it measures. Manual: `split` "
        "holds.",
        mark="L",
        default="Auto",
    )
    split: SplitSpec | None = field(
        "The split; required in mode Manual, ignored in mode Auto.", default=None, is_size=True
    )
    auto: AutoSplitSpec = field("Settings of mode Auto.", mark="L", default=AutoSplitSpec())


class EngineSpec(ApiType):
    """The inference engine."""

    type: Literal["SGLang", "CPU", "Emulated"] = field(
        "SGLang, asyncrl's own engine for small models on CPUs (CPU), or one that takes the time that "
        "`emulation` says and samples random tokens (Emulated).",
        default="SGLang",
    )
    image: Text = field("Container image; empty: the one that the operator was installed with.", default="")
    args: Arguments = field("Further command-line arguments of the engine.", default=[], list_type="atomic")


class UpdateSpec(ApiType):
    """How rollout pods are replaced when their template changes."""

    max_unavailable_percent: Annotated[int, Field(ge=1, le=100)] = field(
        "Share of the rollout pods, in percent, that an update may take down at a time.", default=25
    )


class RolloutSpec(ApiType):
    """The group that samples: one engine and one worker per replica."""

    engine: EngineSpec = field("The inference engine.", mark="U", default=EngineSpec())
    gpus_per_replica: Annotated[int, Field(ge=0, le=1024)] = field(
        "GPUs of one engine, its tensor-parallel size; at most trainer.gpusPerNode. 0: derived from "
        "model.parameterCount and gpuBudget.gpuMemory, or 1 if these are unknown.",
        mark="I",
        default=0,
    )
    min_replicas: Annotated[int, Field(ge=1, le=10_000)] = field(
        "Minimum number of engines.", mark="L", default=1
    )
    max_replicas: Annotated[int, Field(ge=1, le=10_000)] = field(
        "Maximum number of engines, however large the budget is.", mark="L", default=64
    )
    max_concurrency: CountOrZero = field(
        "Maximum number of samples of one engine at a time; 0: adapted to its KV cache use and queue.",
        mark="L",
        default=0,
    )
    interrupt: Literal["Retract", "InPlace", "Drain"] = field(
        "What happens to unfinished samples when new weights arrive. Retract: they go on, with a recomputed "
        "KV cache (AReaL, arXiv 2505.24298, section 3.1). InPlace: they go on with the old KV cache. Drain: "
        "they are finished first.",
        mark="L",
        default="Retract",
    )
    update: UpdateSpec = field("How pods are replaced.", mark="L", default=UpdateSpec())
    pod_template: FreeForm = field(
        "PodTemplateSpec that is merged over the operator's (strategic merge); fields that the operator owns "
        "may not be set.",
        mark="U",
        default={},
    )


class DeepSpeedSpec(ApiType):
    """Settings of DeepSpeed."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = field(
        "What is partitioned over the ranks (ZeRO, arXiv 1910.02054). 0: nothing. 1: the optimizer state. 2: "
        "the gradients too. 3: the weights too. It may only change between 1 and 2.",
        default=2,
    )
    config: FreeForm = field("DeepSpeed configuration that is merged over the derived one.", default={})


ActivationCheckpointing = Literal["Auto", "Always", "Never"]


class TrainerSpec(ApiType):
    """The group that trains."""

    backend: Literal["DeepSpeed", "Emulated"] = field(
        "Training framework. Emulated: none; steps take the time that `emulation` says, and change nothing.",
        mark="I",
        default="DeepSpeed",
    )
    deepspeed: DeepSpeedSpec = field("Settings of DeepSpeed.", mark="R", default=DeepSpeedSpec())
    activation_checkpointing: ActivationCheckpointing = field(
        "Whether the backward pass computes activations once more, layer by layer, instead of keeping them: "
        "about a third more computation for far less memory, which bounds training.tokensPerMicroBatch. "
        "Auto: Always on GPUs, Never on CPUs.",
        mark="R",
        default="Auto",
    )
    image: Text = field(
        "Container image; empty: the one that the operator was installed with.", mark="R", default=""
    )
    gpu_granularity: Annotated[int, Field(ge=1, le=10_000)] = field(
        "The number of the trainer's GPUs is a multiple of this.", mark="R", default=1
    )
    gpus_per_node: Annotated[int, Field(ge=1, le=1024)] = field(
        "GPUs of a node; a trainer with more takes whole nodes, one pod on each.", mark="R", default=8
    )
    termination_grace_period_seconds: Count = field(
        "Time for a last checkpoint between SIGTERM and SIGKILL, in seconds.", mark="R", default=300
    )
    pod_template: FreeForm = field(
        "PodTemplateSpec that is merged over the operator's (strategic merge); fields that the operator owns "
        "may not be set.",
        mark="R",
        default={},
    )


class EmulationSpec(ApiType):
    """Devices that take their time and compute nothing; everything around them is what trains."""

    device_model: Text = field(
        "Device model: the name of one that comes with asyncrl, or the path of a YAML file in the pods. "
        "Empty: the devices are real.",
        default="",
    )
    speedup: Annotated[float, Field(gt=0, le=1000)] = field(
        "Seconds of the devices in a second; the rest of the job does not run faster.", default=1.0
    )


class WeightSyncSpec(ApiType):
    """How new weights reach the engines."""

    mode: Literal["Direct", "Staged"] = field(
        "Direct: by a broadcast into the engines' own memory, for which they pause. Staged: a receiver "
        "beside each engine takes them over TCP while the engine samples, what has changed or the whole, and "
        "keeps a copy in memory, which the engine loads; it pauses for the load alone.",
        mark="I",
        default="Direct",
    )
    staging_megabytes: Annotated[int, Field(ge=0, le=16_777_216)] = field(
        "Size of the volume in memory that holds the copy of mode Staged, in megabytes; 0: derived from "
        "model.parameterCount.",
        mark="I",
        default=0,
    )
    backend: Literal["Auto", "NCCL", "Gloo"] = field(
        "Library for collective communication. Auto: NCCL on GPUs, Gloo on CPUs.", default="Auto"
    )
    bucket_megabytes: Annotated[int, Field(ge=1, le=65_536)] = field(
        "Size of the pieces in which weights are sent, in megabytes; the trainer needs GPU memory for two of "
        "them, an engine for one.",
        default=256,
    )
    timeout_seconds: CountOrZero = field(
        "Seconds that one transfer may take before engines that have not answered are left out; 0: derived "
        "from the size of the model.",
        default=0,
    )


class GangSpec(ApiType):
    """Whether all pods are scheduled at once or not at all."""

    provider: Literal["None", "Native", "Volcano", "KAI"] = field(
        "Gang scheduler. Only None is supported yet: the trainer starts first, and gives its GPUs back if it "
        "does not fit.",
        default="None",
    )


class NetworkSpec(ApiType):
    """The network of the pods."""

    mode: Literal["Pod", "Host"] = field(
        "Host uses the node's network, if the operator was installed with permission for it.", default="Pod"
    )
    rdma_resource: Name = field("Extended resource of an RDMA device, for example rdma/hca.", default="")
    rdma_count: Annotated[int, Field(ge=0, le=1024)] = field(
        "RDMA devices per pod; needs rdmaResource.", default=0
    )


class SchedulingSpec(ApiType):
    """Where the pods of both groups go."""

    queue_name: Name = field("Kueue queue. Not supported yet: must be empty.", default="")
    priority_class_name: Name = field("PriorityClass of the pods; empty: the cluster's default.", default="")
    gang: GangSpec = field("Gang scheduling.", default=GangSpec())
    start_order: Literal["TrainerFirst"] = field(
        "Rollout pods are created once the trainer runs, so that half a job never holds GPUs for nothing.",
        default="TrainerFirst",
    )
    node_selector: Annotated[dict[Name, Text], Field(max_length=64)] = field(
        "Labels that a node must have to run the pods.", default={}, free_while_suspended=True
    )
    tolerations: Annotated[list[dict[str, Any]], Field(max_length=64)] = field(
        "Taints that the pods tolerate, as in a pod spec.",
        default=[],
        list_type="atomic",
        free_while_suspended=True,
    )
    affinity: FreeForm = field(
        "Affinity of the pods, as in a pod spec.", default={}, free_while_suspended=True
    )
    topology_key: Name = field(
        "Node label of a network domain, such as a rack, that the pods of a group should share; empty: none.",
        default="",
    )
    network: NetworkSpec = field("The network of the pods.", default=NetworkSpec())
    shared_memory: Quantity = field("Size of /dev/shm in trainer and engine pods.", default="16Gi")
    service_account_name: Name = field(
        "ServiceAccount of the pods, for example for access to buckets; empty: one is created for the job.",
        default="",
    )
    image_pull_secrets: Annotated[list[SecretReference], Field(max_length=16)] = field(
        "Secrets for pulling images.", default=[], list_type="atomic"
    )
