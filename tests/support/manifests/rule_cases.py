"""Manifests that each rule accepts and refuses, for both of its evaluators: ours and the API server."""

from typing import Any, NamedTuple

from asyncrl_api.parsing import apply_overrides
from support.manifests.smallest import SMALLEST

BASE: dict[str, Any] = apply_overrides(SMALLEST, ["spec.gpuBudget.total=16"])


class Case(NamedTuple):
    accepted: list[str]
    refused: list[str]
    path: str
    message: str


MANUAL = "spec.gpuBudget.mode=Manual"

STAGED = "spec.weightSync.mode=Staged"

CASES = {
    "staged weights need a size": Case(
        [STAGED, "spec.model.parameterCount=1000"],
        [STAGED],
        "spec.weightSync.stagingMegabytes",
        "weightSync.stagingMegabytes and model.parameterCount are 0, but weightSync.mode Staged keeps a copy "
        "of the policy in memory, whose size must be known: set one of them",
    ),
    "staged weights fit": Case(
        [STAGED, "spec.weightSync.stagingMegabytes=2000", "spec.model.parameterCount=1000000000"],
        [STAGED, "spec.weightSync.stagingMegabytes=1907", "spec.model.parameterCount=1000000000"],
        "spec.weightSync.stagingMegabytes",
        "weightSync.stagingMegabytes is 1907, but must hold the 1000000000 parameters of "
        "model.parameterCount, of 2 bytes each: raise it, or use 0, which derives it",
    ),
    "adapters are not staged": Case(
        [STAGED, "spec.weightSync.stagingMegabytes=1"],
        [STAGED, "spec.weightSync.stagingMegabytes=1", "spec.training.lora.rank=8"],
        "spec.weightSync.mode",
        "weightSync.mode Staged is not possible with training.lora.rank 8: adapters are small, and no engine "
        "pauses for them in mode Direct: use that",
    ),
    "emulated weights are not staged": Case(
        [STAGED, "spec.weightSync.stagingMegabytes=1"],
        [
            *(STAGED, "spec.weightSync.stagingMegabytes=1", "spec.emulation.deviceModel=h200"),
            *("spec.trainer.backend=Emulated", "spec.rollout.engine.type=Emulated"),
        ],
        "spec.weightSync.mode",
        "weightSync.mode Staged is not possible with trainer.backend Emulated, which has no weights: use "
        "Direct",
    ),
    "staleness target": Case(
        ["spec.staleness.target=4"],
        ["spec.staleness.target=5"],
        "spec.staleness.target",
        'staleness.target is "5", but must be Auto or an integer from 0 to staleness.maxVersions, which '
        "bounds how far sampling may run ahead in any case: lower it, or write Auto",
    ),
    "name is a label": Case(
        ["metadata.name=math-7b"],
        ["metadata.name=Math.7b"],
        "metadata.name",
        'the name "Math.7b" must be a DNS label (a-z, 0-9, -; a letter first) of at most 40 characters, '
        "because pods and Services are named after it",
    ),
    "name begins with a letter": Case(
        ["metadata.name=a"],
        ["metadata.name=7b"],
        "metadata.name",
        'the name "7b" must be a DNS label (a-z, 0-9, -; a letter first) of at most 40 characters, '
        "because pods and Services are named after it",
    ),
    "name is short": Case(
        [f"metadata.name={'a' * 40}"],
        [f"metadata.name={'a' * 41}"],
        "metadata.name",
        f'the name "{"a" * 41}" must be a DNS label (a-z, 0-9, -; a letter first) of at most 40 '
        "characters, because "
        "pods and Services are named after it",
    ),
    "model source": Case(
        ["spec.model.source=my.models:tiny"],
        ["spec.model.source=Qwen/Qwen3-1.7B"],
        "spec.model.source",
        'model.source is "Qwen/Qwen3-1.7B", but must have one of the forms hf://org/name, file:///path, '
        "package://package/folder, module:factory",
    ),
    "dataset source": Case(
        ["spec.dataset.source=reasoning-gym://leg_counting"],
        ["spec.dataset.source=package://rows"],
        "spec.dataset.source",
        'dataset.source is "package://rows", but must have one of the forms hf://org/set, file://rows.jsonl, '
        "reasoning-gym://name, module:factory",
    ),
    "evaluation source": Case(
        ["spec.evaluation.source=file://rows.jsonl"],
        ["spec.evaluation.source=hf:/openai/gsm8k"],
        "spec.evaluation.source",
        'evaluation.source is "hf:/openai/gsm8k", but must have one of the forms hf://org/set, '
        "file://rows.jsonl, "
        "reasoning-gym://name, module:factory",
    ),
    "Custom needs a class": Case(
        ["spec.workflow={type: Custom, class: 'pkg.module:Class'}"],
        ["spec.workflow.type=Custom"],
        "spec.workflow.class",
        'workflow.type Custom needs workflow.class in the form pkg.module:Class, but it is ""',
    ),
    "a class is in a module": Case(
        ["spec.workflow={type: SingleTurn, class: Ignored}"],
        ["spec.workflow={type: Custom, class: Class}"],
        "spec.workflow.class",
        'workflow.type Custom needs workflow.class in the form pkg.module:Class, but it is "Class"',
    ),
    "MultiTurn has turns": Case(
        ["spec.workflow={type: MultiTurn, maxTurns: 2}"],
        ["spec.workflow.type=MultiTurn"],
        "spec.workflow.maxTurns",
        "workflow.type MultiTurn needs workflow.maxTurns of at least 2, but it is 1: raise it, or use "
        "SingleTurn",
    ),
    "Function needs a function": Case(
        ["spec.reward={type: Function, function: 'pkg.module:score'}"],
        ["spec.reward.type=Function"],
        "spec.reward.function",
        'reward.type Function needs reward.function in the form pkg.module:function, but it is ""',
    ),
    "a function is in a module": Case(
        ["spec.reward={type: Math, function: ignored}"],
        ["spec.reward={type: Function, function: score.py}"],
        "spec.reward.function",
        'reward.type Function needs reward.function in the form pkg.module:function, but it is "score.py"',
    ),
    "Service needs a URL": Case(
        ["spec.reward={type: Service, url: 'http://judge:8000/score'}"],
        ["spec.reward.type=Service"],
        "spec.reward.url",
        'reward.type Service needs reward.url in the form http://host:port/path, but it is ""',
    ),
    "Shared needs a URL": Case(
        ["spec.messaging={mode: Shared, shared: {url: 'nats://nats:4222'}}"],
        ["spec.messaging.mode=Shared"],
        "spec.messaging.shared.url",
        "messaging.mode Shared needs messaging.shared.url, but it is empty: write for example nats://host:4222",
    ),
    "FromPath needs a path": Case(
        ["spec.checkpoint.resume=FromPath", "spec.checkpoint.resumePath=old/step-50"],
        ["spec.checkpoint.resume=FromPath"],
        "spec.checkpoint.resumePath",
        "checkpoint.resume FromPath needs checkpoint.resumePath, but it is empty: name a checkpoint folder",
    ),
    "location stays on the claim": Case(
        ["spec.checkpoint.location.path=team-a/..b/x..", "spec.checkpoint.location.path=/a/b/"],
        ["spec.checkpoint.location.path=../tmp/x"],
        "spec.checkpoint.location.path",
        'checkpoint.location.path must name a folder on the claim: no part of it may be "..", and no '
        "character a line break or another control character",
    ),
    "location stays on the claim further down": Case(
        ["spec.checkpoint.location.path=a/b"],
        ["spec.checkpoint.location.path=a/.."],
        "spec.checkpoint.location.path",
        'checkpoint.location.path must name a folder on the claim: no part of it may be "..", and no '
        "character a line break or another control character",
    ),
    "location is one line": Case(
        ["spec.checkpoint.location.path=ä b"],
        ['spec.checkpoint.location.path="a\\nb"'],
        "spec.checkpoint.location.path",
        'checkpoint.location.path must name a folder on the claim: no part of it may be "..", and no '
        "character a line break or another control character",
    ),
    "location has no NUL": Case(
        ["spec.checkpoint.location.path=a"],
        ['spec.checkpoint.location.path="a\\0"'],
        "spec.checkpoint.location.path",
        'checkpoint.location.path must name a folder on the claim: no part of it may be "..", and no '
        "character a line break or another control character",
    ),
    "resumePath is one line": Case(
        ["spec.checkpoint.resume=FromPath", "spec.checkpoint.resumePath=../runs/a/checkpoints/step-000050"],
        ['spec.checkpoint.resumePath="a\\nb"'],
        "spec.checkpoint.resumePath",
        "checkpoint.resumePath contains a line break or another control character: leave it out",
    ),
    "Manual needs a split": Case(
        [MANUAL, "spec.gpuBudget.split={trainer: 4, rollout: 12}"],
        [MANUAL],
        "spec.gpuBudget.mode",
        "gpuBudget.mode Manual needs gpuBudget.split, but it is missing: write {trainer: N, rollout: M}",
    ),
    "RDMA count needs a resource": Case(
        ["spec.scheduling.network={rdmaCount: 1, rdmaResource: rdma/hca}"],
        ["spec.scheduling.network.rdmaCount=1"],
        "spec.scheduling.network.rdmaResource",
        "scheduling.network.rdmaCount is 1, but rdmaResource is empty: name the extended resource",
    ),
    "minibatches are not empty": Case(
        ["spec.training.minibatches=64"],
        ["spec.training.minibatches=65"],
        "spec.training.minibatches",
        "training.minibatches is 65, but must be at most training.batchSize, 64, because every optimizer "
        "update needs a prompt group: lower it",
    ),
    "the longest sample fits a micro-batch": Case(
        ["spec.training.tokensPerMicroBatch=8192"],
        ["spec.training.tokensPerMicroBatch=8191"],
        "spec.training.tokensPerMicroBatch",
        "training.tokensPerMicroBatch is 8191, but must be at least model.contextLength, 8192, because the "
        "longest sample must fit: raise it",
    ),
    "the prompt has room": Case(
        ["spec.sampling.maxNewTokens=8191"],
        ["spec.sampling.maxNewTokens=8192"],
        "spec.sampling.maxNewTokens",
        "sampling.maxNewTokens is 8192, but must be less than model.contextLength, 8192, because the prompt "
        "needs room: lower it",
    ),
    "group advantages need groups": Case(
        ["spec.sampling.groupSize=1", "spec.algorithm.advantage=BatchNormalized"],
        ["spec.sampling.groupSize=1", "spec.algorithm.advantage=LeaveOneOut"],
        "spec.sampling.groupSize",
        "sampling.groupSize is 1, but algorithm.advantage LeaveOneOut compares the samples of a group: "
        "raise it, or use BatchNormalized",
    ),
    "a filter leaves something": Case(
        ["spec.sampling={groupSize: 2, filter: DropUniformGroups}"],
        [
            "spec.sampling={groupSize: 1, filter: DropUniformGroups}",
            "spec.algorithm.advantage=BatchNormalized",
        ],
        "spec.sampling.filter",
        "sampling.filter DropUniformGroups would drop every prompt group, because sampling.groupSize is 1: "
        "raise groupSize, or use None",
    ),
    "the overlong buffer is part of the response": Case(
        ["spec.algorithm.overlongPenalty.bufferTokens=1024"],
        ["spec.algorithm.overlongPenalty.bufferTokens=1025"],
        "spec.algorithm.overlongPenalty.bufferTokens",
        "algorithm.overlongPenalty.bufferTokens is 1025, but must be at most sampling.maxNewTokens, "
        "1024: lower it",
    ),
    "an engine holds a group": Case(
        ["spec.rollout.maxConcurrency=8"],
        ["spec.rollout.maxConcurrency=7"],
        "spec.rollout.maxConcurrency",
        "rollout.maxConcurrency is 7, but must be 0 (adaptive) or at least sampling.groupSize, 8, because an "
        "engine samples whole groups: raise it",
    ),
    "replicas are in order": Case(
        ["spec.rollout.minReplicas=4", "spec.rollout.maxReplicas=4"],
        ["spec.rollout.minReplicas=5", "spec.rollout.maxReplicas=4"],
        "spec.rollout.minReplicas",
        "rollout.minReplicas is 5, but must be at most rollout.maxReplicas, 4: lower it",
    ),
    "an engine fits a node": Case(
        ["spec.rollout.gpusPerReplica=8"],
        ["spec.rollout.gpusPerReplica=9"],
        "spec.rollout.gpusPerReplica",
        "rollout.gpusPerReplica is 9, but must be at most trainer.gpusPerNode, 8, because an "
        "engine cannot span nodes: lower it",
    ),
    "the budget holds the smallest job": Case(
        [
            "spec.gpuBudget.total=5",
            "spec.trainer.gpuGranularity=1",
            "spec.rollout={minReplicas: 2, gpusPerReplica: 2}",
        ],
        [
            "spec.gpuBudget.total=5",
            "spec.trainer.gpuGranularity=2",
            "spec.rollout={minReplicas: 2, gpusPerReplica: 2}",
        ],
        "spec.gpuBudget.total",
        "gpuBudget.total is 5, but must be at least trainer.gpuGranularity, 2, plus rollout.minReplicas, "
        "2, times rollout.gpusPerReplica, 2: raise it",
    ),
    "a derived engine counts as one GPU": Case(
        ["spec.gpuBudget.total=4", "spec.rollout.minReplicas=3"],
        ["spec.gpuBudget.total=4", "spec.rollout.minReplicas=4"],
        "spec.gpuBudget.total",
        "gpuBudget.total is 4, but must be at least trainer.gpuGranularity, 1, plus rollout.minReplicas, "
        "4, times rollout.gpusPerReplica, 1: raise it",
    ),
    "the split fits the budget": Case(
        ["spec.gpuBudget.split={trainer: 8, rollout: 9}"],
        [MANUAL, "spec.gpuBudget.split={trainer: 8, rollout: 9}"],
        "spec.gpuBudget.split",
        "gpuBudget.split is 8 + 9, but must be at most gpuBudget.total, 16: lower it, or raise the total",
    ),
    "the trainer has its granularity": Case(
        [MANUAL, "spec.gpuBudget.split={trainer: 4, rollout: 12}", "spec.trainer.gpuGranularity=4"],
        [MANUAL, "spec.gpuBudget.split={trainer: 4, rollout: 12}", "spec.trainer.gpuGranularity=3"],
        "spec.gpuBudget.split.trainer",
        "gpuBudget.split.trainer is 4, but must be a multiple of trainer.gpuGranularity, 3",
    ),
    "the trainer takes whole nodes": Case(
        [MANUAL, "spec.gpuBudget.split={trainer: 12, rollout: 4}", "spec.trainer.gpusPerNode=4"],
        [MANUAL, "spec.gpuBudget.split={trainer: 12, rollout: 4}"],
        "spec.gpuBudget.split.trainer",
        "gpuBudget.split.trainer is 12, but must be at most trainer.gpusPerNode, 8, or a multiple of it, "
        "because all pods of the trainer are equal",
    ),
    "rollout has whole replicas": Case(
        [MANUAL, "spec.gpuBudget.split={trainer: 4, rollout: 12}", "spec.rollout.gpusPerReplica=4"],
        [MANUAL, "spec.gpuBudget.split={trainer: 4, rollout: 10}", "spec.rollout.gpusPerReplica=4"],
        "spec.gpuBudget.split.rollout",
        "gpuBudget.split.rollout is 10, but must be a multiple of rollout.gpusPerReplica, 4",
    ),
    "rollout has its fewest replicas": Case(
        [
            MANUAL,
            "spec.gpuBudget.split={trainer: 4, rollout: 8}",
            "spec.rollout={minReplicas: 2, gpusPerReplica: 4}",
        ],
        [
            MANUAL,
            "spec.gpuBudget.split={trainer: 4, rollout: 8}",
            "spec.rollout={minReplicas: 3, gpusPerReplica: 4}",
        ],
        "spec.gpuBudget.split.rollout",
        "gpuBudget.split.rollout is 8, but must be at least rollout.minReplicas, 3, times "
        "rollout.gpusPerReplica, 4: raise it",
    ),
    "an engine's own arguments": Case(
        ["spec.rollout.engine.args=[--tp-comm, --mem-fraction-static, '0.8']"],
        ["spec.rollout.engine.args=[--mem-fraction-static, '0.8', --dp-size=2]"],
        "spec.rollout.engine.args",
        'rollout.engine.args has "--dp-size=2", which the operator decides: leave it out; for '
        "tensor-parallel engines set rollout.gpusPerReplica; data- and pipeline-parallel engines are not "
        "supported",
    ),
    "a CPU engine is one process": Case(
        ["spec.rollout.engine.type=CPU", "spec.rollout.gpusPerReplica=1"],
        ["spec.rollout.engine.type=CPU", "spec.rollout.gpusPerReplica=2"],
        "spec.rollout.gpusPerReplica",
        "rollout.gpusPerReplica is 2, but rollout.engine.type CPU is one process, which cannot be split: "
        "use 1, or SGLang",
    ),
    "NCCL needs GPUs": Case(
        ["spec.weightSync.backend=NCCL"],
        ["spec.weightSync.backend=NCCL", "spec.gpuBudget.allocation=None"],
        "spec.weightSync.backend",
        "weightSync.backend NCCL needs GPUs, but gpuBudget.allocation is None: use Auto or Gloo",
    ),
    "NCCL needs engines on GPUs": Case(
        ["spec.weightSync.backend=Gloo", "spec.rollout.engine.type=CPU"],
        ["spec.weightSync.backend=NCCL", "spec.rollout.engine.type=CPU"],
        "spec.weightSync.backend",
        "weightSync.backend NCCL needs engines on GPUs, but rollout.engine.type is CPU: use Auto or Gloo",
    ),
    "devices are emulated all or none": Case(
        [
            "spec.trainer.backend=Emulated",
            "spec.rollout.engine.type=Emulated",
            "spec.emulation={deviceModel: areal-7b, speedup: 10}",
        ],
        ["spec.trainer.backend=Emulated", "spec.emulation={deviceModel: areal-7b}"],
        "spec.emulation.deviceModel",
        'emulation.deviceModel is "areal-7b", trainer.backend is Emulated and rollout.engine.type is SGLang, '
        "but devices are emulated all or none: name a device model and set both to Emulated, or none of them",
    ),
    "emulated trainers have no adapters": Case(
        [
            "spec.trainer.backend=Emulated",
            "spec.rollout.engine.type=Emulated",
            "spec.emulation={deviceModel: areal-7b}",
        ],
        [
            "spec.trainer.backend=Emulated",
            "spec.rollout.engine.type=Emulated",
            "spec.emulation={deviceModel: areal-7b}",
            "spec.training.lora={rank: 8, targetModules: [q_proj]}",
        ],
        "spec.training.lora.rank",
        "training.lora.rank is 8, but adapters cannot be trained with trainer.backend Emulated: use rank 0",
    ),
    "adapters have their places": Case(
        ["spec.training.lora={rank: 8, targetModules: [q_proj]}"],
        ["spec.training.lora={rank: 8, targetModules: []}"],
        "spec.training.lora.targetModules",
        "training.lora.targetModules is empty, but training.lora.rank is 8: name a layer, or use rank 0",
    ),
    "adapters are whole on each rank": Case(
        ["spec.training.lora.rank=8", "spec.trainer.deepspeed.zeroStage=2"],
        ["spec.training.lora.rank=8", "spec.trainer.deepspeed.zeroStage=3"],
        "spec.training.lora.rank",
        "training.lora.rank is 8, but adapters cannot be trained with trainer.deepspeed.zeroStage 3: use "
        "stage 2 or less",
    ),
    "each adapter has its own KV cache": Case(
        ["spec.training.lora.rank=8", "spec.rollout.interrupt=Drain"],
        ["spec.training.lora.rank=8", "spec.rollout.interrupt=InPlace"],
        "spec.rollout.interrupt",
        "rollout.interrupt InPlace is not possible with training.lora.rank 8, because the KV cache belongs "
        "to one adapter: use Retract or Drain",
    ),
    "no resource claims yet": Case(
        ["spec.gpuBudget.allocation=None"],
        ["spec.gpuBudget.allocation=ResourceClaim"],
        "spec.gpuBudget.allocation",
        "gpuBudget.allocation ResourceClaim is not supported yet: use ExtendedResource",
    ),
    "no Kueue yet": Case(
        ["spec.scheduling.queueName="],
        ["spec.scheduling.queueName=team-a"],
        "spec.scheduling.queueName",
        'scheduling.queueName is "team-a", but Kueue is not supported yet: leave it empty',
    ),
    "no gangs yet": Case(
        ["spec.scheduling.gang.provider=None"],
        ["spec.scheduling.gang.provider=Volcano"],
        "spec.scheduling.gang.provider",
        "scheduling.gang.provider Volcano is not supported yet: use None",
    ),
    "no other controller yet": Case(
        ["spec.managedBy="],
        ["spec.managedBy=kueue.x-k8s.io/multikueue"],
        "spec.managedBy",
        'managedBy is "kueue.x-k8s.io/multikueue", but other controllers are not supported yet: leave it '
        "empty",
    ),
}
