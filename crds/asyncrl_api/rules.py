"""Rules across fields, written once in CEL: the API server evaluates them, and so does `asyncrl validate`.

They are in the dialect of Kubernetes: `self` is the object at the rule's path with its defaults applied, and
`oldSelf` is what it was before an update; a property whose name is a CEL keyword is escaped
(`self.__function__`). Both evaluators must agree, so rules use only the standard library and compare
integers with integers. Messages insert integers with `'%d'.format([n])`: with `string(n)` the API server
assumes a result of any length and refuses the rule as too costly (measured on 1.36).
"""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import cel

from asyncrl_api.job import Spec
from asyncrl_api.marks import FieldNode, tree


@dataclass(frozen=True)
class Rule:
    """One entry of `x-kubernetes-validations`."""

    path: str
    """Where the rule sits: `spec.training`; empty for the root."""
    rule: str
    """CEL: true where the object is right."""
    message_expression: str
    """CEL: one line that names the field, the value, the rule and the remedy."""
    field_path: str = ""
    """The field below `path` that the message is about: `.minibatches`; `fieldPath` in the CRD."""

    @property
    def is_transition(self) -> bool:
        """Whether the rule compares an update with what was there before."""
        return "oldSelf" in self.rule


class Violation(NamedTuple):
    """A rule that a manifest breaks."""

    path: str
    message: str


def _rule(path: str, field: str, rule: str, message: str, *values: str) -> Rule:
    """Return a rule with the CEL expressions `values` (all integers, or all strings) in its message."""
    text = f"'{message}'"
    return Rule(path, rule, f"{text}.format([{', '.join(values)}])" if values else text, f".{field}")


_NAME = _rule(
    "",
    "metadata.name",
    # It starts with a letter because Services are named after it, whose names must be RFC 1035 labels.
    "self.metadata.name.size() <= 40 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
    'the name "%s" must be a DNS label (a-z, 0-9, -; a letter first) of at most 40 characters, '
    "because pods and Services are named after it",
    "self.metadata.name",
)


MODEL_SOURCES = {"hf": "hf://org/name", "file": "file:///path", "package": "package://package/folder"}
"""An example of a model's source for each scheme; `module:factory` is possible besides."""
ROW_SOURCES = {"hf": "hf://org/set", "file": "file://rows.jsonl", "reasoning-gym": "reasoning-gym://name"}
"""An example of a source of rows, for training and for evaluation, for each scheme; likewise."""


def _source(path: str, forms: Mapping[str, str]) -> Rule:
    examples = ", ".join([*forms.values(), "module:factory"])
    name = "[A-Za-z_][A-Za-z0-9_]*"
    return _rule(
        path,
        "source",
        f"self.source.matches('^(({'|'.join(forms)})://[^[:cntrl:]]+|[A-Za-z_][A-Za-z0-9_.]*:{name})$')",
        f'{path.removeprefix("spec.")}.source is "%s", but must have one of the forms {examples}',
        "self.source",
    )


_SOURCES = (
    _source("spec.model", MODEL_SOURCES),
    _source("spec.dataset", ROW_SOURCES),
    _source("spec.evaluation", ROW_SOURCES),
)

_IS_OBJECT = "matches('^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_.]*$')"

# What a discriminator selects must be there; what it does not select is ignored.
_SELECTED = (
    _rule(
        "spec.workflow",
        "class",
        f"self.type != 'Custom' || (has(self.class) && self.class.{_IS_OBJECT})",
        'workflow.type Custom needs workflow.class in the form pkg.module:Class, but it is "%s"',
        "has(self.class) ? self.class : ''",
    ),
    _rule(
        "spec.workflow",
        "maxTurns",
        # With one turn nobody hears the feedback: whoever writes this forgot maxTurns.
        "self.type != 'MultiTurn' || self.maxTurns >= 2",
        "workflow.type MultiTurn needs workflow.maxTurns of at least 2, but it is %d: raise it, or use "
        "SingleTurn",
        "self.maxTurns",
    ),
    _rule(
        "spec.reward",
        "function",
        f"self.type != 'Function' || (has(self.__function__) && self.__function__.{_IS_OBJECT})",
        'reward.type Function needs reward.function in the form pkg.module:function, but it is "%s"',
        "has(self.__function__) ? self.__function__ : ''",
    ),
    _rule(
        "spec.reward",
        "url",
        "self.type != 'Service' || self.url.matches('^https?://[^[:cntrl:]]+$')",
        'reward.type Service needs reward.url in the form http://host:port/path, but it is "%s"',
        "self.url",
    ),
    _rule(
        "spec.messaging",
        "shared.url",
        "self.mode != 'Shared' || self.shared.url != ''",
        "messaging.mode Shared needs messaging.shared.url, but it is empty: write for example nats://host:4222",
    ),
    _rule(
        "spec.checkpoint",
        "resumePath",
        "self.resume != 'FromPath' || self.resumePath != ''",
        "checkpoint.resume FromPath needs checkpoint.resumePath, but it is empty: name a checkpoint folder",
    ),
    _rule(
        "spec.checkpoint",
        "location.path",
        # Beside the claim there is only what goes with the pod. The value is left out of the message, which
        # may hold no line break.
        "!self.location.path.matches('(^|/)[.][.](/|$)|[[:cntrl:]]')",
        'checkpoint.location.path must name a folder on the claim: no part of it may be "..", and no '
        "character a line break or another control character",
    ),
    _rule(
        "spec.checkpoint",
        "resumePath",
        "!self.resumePath.matches('[[:cntrl:]]')",
        "checkpoint.resumePath contains a line break or another control character: leave it out",
    ),
    _rule(
        "spec.gpuBudget",
        "mode",
        "self.mode != 'Manual' || has(self.split)",
        "gpuBudget.mode Manual needs gpuBudget.split, but it is missing: write {trainer: N, rollout: M}",
    ),
    _rule(
        "spec.scheduling.network",
        "rdmaResource",
        "self.rdmaCount == 0 || self.rdmaResource != ''",
        "scheduling.network.rdmaCount is %d, but rdmaResource is empty: name the extended resource",
        "self.rdmaCount",
    ),
)

_STALENESS = (
    _rule(
        "spec.staleness",
        "target",
        "type(self.target) == int ? self.target >= 0 && self.target <= self.maxVersions : "
        "self.target == 'Auto'",
        'staleness.target is "%s", but must be Auto or an integer from 0 to staleness.maxVersions, which '
        "bounds how far sampling may run ahead in any case: lower it, or write Auto",
        "self.target",
    ),
)

_TRAINING = (
    _rule(
        "spec.training",
        "minibatches",
        "self.minibatches <= self.batchSize",
        "training.minibatches is %d, but must be at most training.batchSize, %d, because every optimizer "
        "update needs a prompt group: lower it",
        "self.minibatches",
        "self.batchSize",
    ),
    _rule(
        "spec.training",
        "maxSteps",
        "self.maxSteps >= oldSelf.maxSteps",
        "training.maxSteps is %d and was %d, but may only grow: put it back, or suspend the job to stop it",
        "self.maxSteps",
        "oldSelf.maxSteps",
    ),
    _rule(
        "spec",
        "training.tokensPerMicroBatch",
        "self.model.contextLength <= self.training.tokensPerMicroBatch",
        "training.tokensPerMicroBatch is %d, but must be at least model.contextLength, %d, because the "
        "longest sample must fit: raise it",
        "self.training.tokensPerMicroBatch",
        "self.model.contextLength",
    ),
    _rule(
        "spec",
        "sampling.maxNewTokens",
        "self.sampling.maxNewTokens < self.model.contextLength",
        "sampling.maxNewTokens is %d, but must be less than model.contextLength, %d, because the prompt "
        "needs room: lower it",
        "self.sampling.maxNewTokens",
        "self.model.contextLength",
    ),
    _rule(
        "spec",
        "sampling.groupSize",
        "self.sampling.groupSize >= 2 || self.algorithm.advantage == 'BatchNormalized'",
        "sampling.groupSize is 1, but algorithm.advantage %s compares the samples of a group: raise it, or "
        "use BatchNormalized",
        "self.algorithm.advantage",
    ),
    _rule(
        "spec.sampling",
        "filter",
        "self.groupSize >= 2 || self.filter == 'None'",
        "sampling.filter %s would drop every prompt group, because sampling.groupSize is 1: raise groupSize, "
        "or use None",
        "self.filter",
    ),
    _rule(
        "spec",
        "algorithm.overlongPenalty.bufferTokens",
        "!has(self.algorithm.overlongPenalty) || "
        "self.algorithm.overlongPenalty.bufferTokens <= self.sampling.maxNewTokens",
        "algorithm.overlongPenalty.bufferTokens is %d, but must be at most sampling.maxNewTokens, %d: "
        "lower it",
        "self.algorithm.overlongPenalty.bufferTokens",
        "self.sampling.maxNewTokens",
    ),
    _rule(
        "spec",
        "rollout.maxConcurrency",
        "self.rollout.maxConcurrency == 0 || self.rollout.maxConcurrency >= self.sampling.groupSize",
        "rollout.maxConcurrency is %d, but must be 0 (adaptive) or at least sampling.groupSize, %d, because "
        "an engine samples whole groups: raise it",
        "self.rollout.maxConcurrency",
        "self.sampling.groupSize",
    ),
)

# A checkpoint can be divided anew for another stage if both stages divide the optimizer alone. Stage 0 does
# not divide it, and stage 3 divides the weights too: what one of them has written, no other can read.
_STAGE = "self.zeroStage == oldSelf.zeroStage || (self.zeroStage in [1, 2] && oldSelf.zeroStage in [1, 2])"

_CHECKPOINT = (
    _rule(
        "spec.trainer.deepspeed",
        "zeroStage",
        _STAGE,
        "trainer.deepspeed.zeroStage is %d and was %d, but may only change between 1 and 2, because no "
        "checkpoint of the job could be read: put it back, or create a new AsyncRLJob",
        "self.zeroStage",
        "oldSelf.zeroStage",
    ),
)

# 0 stands for a size that the operator derives, and counts as 1 here: if the derived size does not fit, the
# job is Stalled with reason BudgetTooSmall.
_REPLICA = "(self.rollout.gpusPerReplica > 0 ? self.rollout.gpusPerReplica : 1)"
_NOT_MANUAL = "self.gpuBudget.mode != 'Manual' || !has(self.gpuBudget.split)"
_TRAINER = "self.gpuBudget.split.trainer"
_ROLLOUT = "self.gpuBudget.split.rollout"

_BUDGET = (
    _rule(
        "spec.rollout",
        "minReplicas",
        "self.minReplicas <= self.maxReplicas",
        "rollout.minReplicas is %d, but must be at most rollout.maxReplicas, %d: lower it",
        "self.minReplicas",
        "self.maxReplicas",
    ),
    _rule(
        "spec",
        "rollout.gpusPerReplica",
        "self.rollout.gpusPerReplica <= self.trainer.gpusPerNode",
        "rollout.gpusPerReplica is %d, but must be at most trainer.gpusPerNode, %d, because an engine cannot "
        "span nodes: lower it",
        "self.rollout.gpusPerReplica",
        "self.trainer.gpusPerNode",
    ),
    _rule(
        "spec",
        "gpuBudget.total",
        f"self.gpuBudget.total >= self.trainer.gpuGranularity + self.rollout.minReplicas * {_REPLICA}",
        "gpuBudget.total is %d, but must be at least trainer.gpuGranularity, %d, plus rollout.minReplicas, "
        "%d, times rollout.gpusPerReplica, %d: raise it",
        "self.gpuBudget.total",
        "self.trainer.gpuGranularity",
        "self.rollout.minReplicas",
        _REPLICA,
    ),
    _rule(
        "spec.gpuBudget",
        "split",
        "self.mode != 'Manual' || !has(self.split) || self.split.trainer + self.split.rollout <= self.total",
        "gpuBudget.split is %d + %d, but must be at most gpuBudget.total, %d: lower it, or raise the total",
        "self.split.trainer",
        "self.split.rollout",
        "self.total",
    ),
    _rule(
        "spec",
        "gpuBudget.split.trainer",
        f"{_NOT_MANUAL} || {_TRAINER} % self.trainer.gpuGranularity == 0",
        "gpuBudget.split.trainer is %d, but must be a multiple of trainer.gpuGranularity, %d",
        _TRAINER,
        "self.trainer.gpuGranularity",
    ),
    _rule(
        "spec",
        "gpuBudget.split.trainer",
        f"{_NOT_MANUAL} || {_TRAINER} <= self.trainer.gpusPerNode "
        f"|| {_TRAINER} % self.trainer.gpusPerNode == 0",
        "gpuBudget.split.trainer is %d, but must be at most trainer.gpusPerNode, %d, or a multiple of it, "
        "because all pods of the trainer are equal",
        _TRAINER,
        "self.trainer.gpusPerNode",
    ),
    _rule(
        "spec",
        "gpuBudget.split.rollout",
        f"{_NOT_MANUAL} || {_ROLLOUT} % {_REPLICA} == 0",
        "gpuBudget.split.rollout is %d, but must be a multiple of rollout.gpusPerReplica, %d",
        _ROLLOUT,
        _REPLICA,
    ),
    _rule(
        "spec",
        "gpuBudget.split.rollout",
        f"{_NOT_MANUAL} || {_ROLLOUT} >= self.rollout.minReplicas * {_REPLICA}",
        "gpuBudget.split.rollout is %d, but must be at least rollout.minReplicas, %d, times "
        "rollout.gpusPerReplica, %d: raise it",
        _ROLLOUT,
        "self.rollout.minReplicas",
        _REPLICA,
    ),
)

# Arguments that the operator passes itself, or that would give an engine more processes than weight groups
# count.
_OWN_ARGUMENT = (
    "matches('^--(config|host|port|gpus|model|model-path|nnodes|node-rank|"
    "tp|tp-size|tensor-parallel-size|dp|dp-size|data-parallel-size|pp|pp-size|pipeline-parallel-size)(=.*)?$')"
)

_ENGINE = (
    _rule(
        "spec.rollout",
        "engine.args",
        f"!self.engine.args.exists(a, a.{_OWN_ARGUMENT})",
        'rollout.engine.args has "%s", which the operator decides: leave it out; for tensor-parallel engines '
        "set rollout.gpusPerReplica; data- and pipeline-parallel engines are not supported",
        f"self.engine.args.filter(a, a.{_OWN_ARGUMENT})[0]",
    ),
    _rule(
        "spec.rollout",
        "gpusPerReplica",
        "self.engine.type != 'CPU' || self.gpusPerReplica <= 1",
        "rollout.gpusPerReplica is %d, but rollout.engine.type CPU is one process, which cannot be split: "
        "use 1, or SGLang",
        "self.gpusPerReplica",
    ),
    _rule(
        "spec",
        "weightSync.backend",
        "self.weightSync.backend != 'NCCL' || self.gpuBudget.allocation != 'None'",
        "weightSync.backend NCCL needs GPUs, but gpuBudget.allocation is None: use Auto or Gloo",
    ),
    _rule(
        "spec",
        "weightSync.backend",
        "self.weightSync.backend != 'NCCL' || self.rollout.engine.type != 'CPU'",
        "weightSync.backend NCCL needs engines on GPUs, but rollout.engine.type is CPU: use Auto or Gloo",
    ),
)

_EMULATION = (
    _rule(
        "spec",
        "emulation.deviceModel",
        "(self.emulation.deviceModel != '') == (self.trainer.backend == 'Emulated') && "
        "(self.emulation.deviceModel != '') == (self.rollout.engine.type == 'Emulated')",
        'emulation.deviceModel is "%s", trainer.backend is %s and rollout.engine.type is %s, but devices are '
        "emulated all or none: name a device model and set both to Emulated, or none of them",
        "self.emulation.deviceModel",
        "self.trainer.backend",
        "self.rollout.engine.type",
    ),
    _rule(
        "spec",
        "training.lora.rank",
        "self.trainer.backend != 'Emulated' || self.training.lora.rank == 0",
        "training.lora.rank is %d, but adapters cannot be trained with trainer.backend Emulated: use rank 0",
        "self.training.lora.rank",
    ),
)

_ADAPTERS = (
    _rule(
        "spec.training.lora",
        "targetModules",
        "self.rank == 0 || self.targetModules.size() > 0",
        "training.lora.targetModules is empty, but training.lora.rank is %d: name a layer, or use rank 0",
        "self.rank",
    ),
    _rule(
        "spec",
        "training.lora.rank",
        "self.training.lora.rank == 0 || self.trainer.deepspeed.zeroStage < 3",
        "training.lora.rank is %d, but adapters cannot be trained with trainer.deepspeed.zeroStage 3: use "
        "stage 2 or less",
        "self.training.lora.rank",
    ),
    _rule(
        "spec",
        "rollout.interrupt",
        "self.training.lora.rank == 0 || self.rollout.interrupt != 'InPlace'",
        "rollout.interrupt InPlace is not possible with training.lora.rank %d, because the KV cache belongs "
        "to one adapter: use Retract or Drain",
        "self.training.lora.rank",
    ),
)

_WEIGHT_BYTES = "(self.model.dtype == 'BFloat16' ? 2 : 4)"

_STAGING = (
    _rule(
        "spec",
        "weightSync.stagingMegabytes",
        "self.weightSync.mode != 'Staged' || self.weightSync.stagingMegabytes > 0 || "
        "self.model.parameterCount > 0",
        "weightSync.stagingMegabytes and model.parameterCount are 0, but weightSync.mode Staged keeps a copy "
        "of the policy in memory, whose size must be known: set one of them",
    ),
    _rule(
        "spec",
        "weightSync.stagingMegabytes",
        "self.weightSync.mode != 'Staged' || self.weightSync.stagingMegabytes == 0 || "
        f"self.weightSync.stagingMegabytes * 1048576 >= self.model.parameterCount * {_WEIGHT_BYTES}",
        "weightSync.stagingMegabytes is %d, but must hold the %d parameters of model.parameterCount, of %d "
        "bytes each: raise it, or use 0, which derives it",
        "self.weightSync.stagingMegabytes",
        "self.model.parameterCount",
        _WEIGHT_BYTES,
    ),
    _rule(
        "spec",
        "weightSync.mode",
        "self.weightSync.mode != 'Staged' || self.training.lora.rank == 0",
        "weightSync.mode Staged is not possible with training.lora.rank %d: adapters are small, and no "
        "engine pauses for them in mode Direct: use that",
        "self.training.lora.rank",
    ),
    _rule(
        "spec",
        "weightSync.mode",
        "self.weightSync.mode != 'Staged' || self.trainer.backend != 'Emulated'",
        "weightSync.mode Staged is not possible with trainer.backend Emulated, which has no weights: use "
        "Direct",
    ),
)

# A field that nothing acts on yet is refused, never ignored.
_NOT_YET = (
    _rule(
        "spec.gpuBudget",
        "allocation",
        "self.allocation != 'ResourceClaim'",
        "gpuBudget.allocation ResourceClaim is not supported yet: use ExtendedResource",
    ),
    _rule(
        "spec.scheduling",
        "queueName",
        "self.queueName == ''",
        'scheduling.queueName is "%s", but Kueue is not supported yet: leave it empty',
        "self.queueName",
    ),
    _rule(
        "spec.scheduling",
        "gang.provider",
        "self.gang.provider == 'None'",
        "scheduling.gang.provider %s is not supported yet: use None",
        "self.gang.provider",
    ),
    _rule(
        "spec",
        "managedBy",
        "self.managedBy == ''",
        'managedBy is "%s", but other controllers are not supported yet: leave it empty',
        "self.managedBy",
    ),
)

RULES = (
    _NAME,
    *_SOURCES,
    *_SELECTED,
    *_STALENESS,
    *_TRAINING,
    *_CHECKPOINT,
    *_BUDGET,
    *_ENGINE,
    *_EMULATION,
    *_ADAPTERS,
    *_STAGING,
    *_NOT_YET,
)
"""All rules except those that follow from change marks."""


@functools.cache
def immutability_rules() -> tuple[Rule, ...]:
    """Return the transition rules that the marks I stand for; an immutable block needs only one."""
    return tuple(rule for node in tree(Spec) for rule in _immutability(node))


def all_rules() -> tuple[Rule, ...]:
    """Return every rule of the CRD."""
    return RULES + immutability_rules()


def violations(manifest: Mapping[str, Any], old: Mapping[str, Any] | None = None) -> list[Violation]:
    """Return the rules of the API server that `manifest` breaks; the manifest must fit the types.

    Args:
        manifest: with all defaults, as `to_manifest` gives it.
        old: the object that is to be updated; without it transition rules are left out, as for a new one.
    """
    scope = functools.cache(functools.partial(_scope, _escape(manifest), _escape(old)))
    return [
        Violation(f"{rule.path}{rule.field_path}".removeprefix("."), message)
        for rule in all_rules()
        if (message := _message(rule, scope(rule.path))) is not None
    ]


def _immutability(node: FieldNode) -> Iterator[Rule]:
    field = node.path
    if node.is_free_while_suspended:
        yield _rule(
            "spec",
            field,
            f"self.suspend || oldSelf.suspend || self.{field} == oldSelf.{field}",
            f"{field} may only change while the job is suspended: set suspend in the same update",
        )
    elif any(each.mark != "I" or each.is_free_while_suspended for each in node.walk()):
        for child in node.children:
            yield from _immutability(child)
    else:
        # No rule is evaluated on a field that appears or vanishes: its parent would need the rule.
        assert not node.is_optional, f"{field} is optional and immutable, but its block is not"
        was, value = (' and was "%s"', ".format([oldSelf])") if node.is_scalar else ("", "")
        message = f"'{field} is immutable{was}: put it back, or create a new AsyncRLJob'{value}"
        yield Rule(f"spec.{field}", "self == oldSelf", message)


class _Scope(NamedTuple):
    """The values that the rules of one path see."""

    names: frozenset[str]
    context: cel.Context


def _scope(manifest: Any, old: Any, path: str) -> _Scope:
    values = {"self": _at(manifest, path), "oldSelf": _at(old, path)}
    present = {name: value for name, value in values.items() if value is not None}
    return _Scope(frozenset(present), cel.Context(present, {"format": _format}))


def _message(rule: Rule, scope: _Scope) -> str | None:
    """Return the message of `rule` if the manifest breaks it; None if not, or if the path is absent."""
    needed = {"self", "oldSelf"} if rule.is_transition else {"self"}
    if not needed <= scope.names or _compile(rule.rule).execute(scope.context):
        return None
    return str(_compile(rule.message_expression).execute(scope.context))


_compile = functools.cache(cel.compile)


def _format(template: str, values: list[Any]) -> str:
    """The function `format` of Kubernetes' CEL; messages use only its %d and %s."""
    return template % tuple(values)


def _at(manifest: Any, path: str) -> Any:
    for name in filter(None, path.split(".")):
        if manifest is None:
            return None
        manifest = manifest.get(name)
    return manifest


# https://kubernetes.io/docs/reference/using-api/cel/#escaping
_KEYWORD = re.compile(
    "true|false|null|in|as|break|const|continue|else|for|function|if|import|let|loop|package|namespace|return"
)


def _escape(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            f"__{key}__" if _KEYWORD.fullmatch(key) else key: _escape(below) for key, below in value.items()
        }
    return value
