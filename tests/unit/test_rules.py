"""Every rule across fields: a manifest that it accepts, one that it refuses, and what it then says."""

import re
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl_api.job import to_manifest
from asyncrl_api.manifests import apply_overrides, parse_job, validate
from asyncrl_api.rules import RULES, Rule, all_rules, immutability_rules, violations

BASE: dict[str, Any] = {
    "apiVersion": "asyncrl.dev/v1alpha1",
    "kind": "AsyncRLJob",
    "metadata": {"name": "gsm8k"},
    "spec": {
        "model": {"source": "hf://Qwen/Qwen3-1.7B"},
        "dataset": {"source": "hf://openai/gsm8k"},
        "training": {"batchSize": 64, "maxSteps": 200},
        "gpuBudget": {"total": 16},
        "checkpoint": {"location": {"claimName": "checkpoints"}},
    },
}


class Case(NamedTuple):
    accepted: list[str]
    refused: list[str]
    path: str
    message: str


MANUAL = "spec.gpuBudget.mode=Manual"

CASES = {
    "name is a label": Case(
        ["metadata.name=math-7b"],
        ["metadata.name=Math.7b"],
        "metadata.name",
        'the name "Math.7b" must be a DNS label (a-z, 0-9, -; a letter first) of at most 40 characters, '
        "for pods "
        "and Services are named after it",
    ),
    "name begins with a letter": Case(
        ["metadata.name=a"],
        ["metadata.name=7b"],
        "metadata.name",
        'the name "7b" must be a DNS label (a-z, 0-9, -; a letter first) of at most 40 characters, for '
        "pods and "
        "Services are named after it",
    ),
    "name is short": Case(
        [f"metadata.name={'a' * 40}"],
        [f"metadata.name={'a' * 41}"],
        "metadata.name",
        f'the name "{"a" * 41}" must be a DNS label (a-z, 0-9, -; a letter first) of at most 40 '
        "characters, for "
        "pods and Services are named after it",
    ),
    "model source": Case(
        ["spec.model.source=my.models:tiny"],
        ["spec.model.source=Qwen/Qwen3-1.7B"],
        "spec.model.source",
        'model.source is "Qwen/Qwen3-1.7B", which has none of the forms hf://org/name, file:///path, '
        "package://package/folder, module:factory",
    ),
    "dataset source": Case(
        ["spec.dataset.source=reasoning-gym://leg_counting"],
        ["spec.dataset.source=package://rows"],
        "spec.dataset.source",
        'dataset.source is "package://rows", which has none of the forms hf://org/set, file://rows.jsonl, '
        "reasoning-gym://name, module:factory",
    ),
    "evaluation source": Case(
        ["spec.evaluation.source=file://rows.jsonl"],
        ["spec.evaluation.source=hf:/openai/gsm8k"],
        "spec.evaluation.source",
        'evaluation.source is "hf:/openai/gsm8k", which has none of the forms hf://org/set, '
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
        "messaging.mode Shared needs messaging.shared.url, but it is empty: write nats://host:4222, say",
    ),
    "FromPath needs a path": Case(
        ["spec.checkpoint.resume=FromPath", "spec.checkpoint.resumePath=old/step-50"],
        ["spec.checkpoint.resume=FromPath"],
        "spec.checkpoint.resumePath",
        "checkpoint.resume FromPath needs checkpoint.resumePath, but it is empty: name a checkpoint folder",
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
        "training.minibatches is 65, but must be at most training.batchSize, 64, for an optimizer update "
        "needs a prompt group: lower it",
    ),
    "the longest sample fits a micro-batch": Case(
        ["spec.training.tokensPerMicroBatch=8192"],
        ["spec.training.tokensPerMicroBatch=8191"],
        "spec.training.tokensPerMicroBatch",
        "training.tokensPerMicroBatch is 8191, but must be at least model.contextLength, 8192, for the "
        "longest sample must fit: raise it",
    ),
    "the prompt has room": Case(
        ["spec.sampling.maxNewTokens=8191"],
        ["spec.sampling.maxNewTokens=8192"],
        "spec.sampling.maxNewTokens",
        "sampling.maxNewTokens is 8192, but must be less than model.contextLength, 8192, for the prompt "
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
        "sampling.filter DropUniformGroups would drop every prompt group, for sampling.groupSize is 1: raise "
        "groupSize, or use None",
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
        "rollout.maxConcurrency is 7, but must be 0 (adaptive) or at least sampling.groupSize, 8, for an "
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
        "rollout.gpusPerReplica is 9, but must be at most trainer.gpusPerNode, 8, for an engine cannot "
        "span nodes: lower it",
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
        "for the pods of the trainer are equal",
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


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_rule_accepts_what_is_right_and_refuses_what_is_not(case: Case) -> None:
    assert validate(apply_overrides(BASE, case.accepted)) == []
    (error,) = validate(apply_overrides(BASE, case.refused))
    assert (error.path, error.rule) == (case.path, case.message)


@pytest.mark.parametrize(
    "rule", [rule for rule in RULES if not rule.is_transition], ids=lambda rule: rule.rule
)
def test_every_rule_has_a_case(rule: Rule) -> None:
    text = re.escape(rule.message_expression.split("'")[1])
    pattern = re.sub(r"%[ds]", ".*", text)
    assert any(re.fullmatch(pattern, case.message) for case in CASES.values())


def test_what_the_manifest_allows_explicitly_is_accepted() -> None:
    on_cpus = ["spec.gpuBudget.allocation=None", "spec.model.dtype=BFloat16"]
    synchronous = ["spec.rollout.interrupt=Drain", "spec.staleness.maxVersions=0"]
    assert validate(apply_overrides(BASE, on_cpus + synchronous)) == []


def test_several_rules_are_reported_at_once() -> None:
    broken = apply_overrides(BASE, ["metadata.name=A", "spec.training.minibatches=65", "spec.managedBy=me"])
    assert [error.path for error in validate(broken)] == [
        "metadata.name",
        "spec.training.minibatches",
        "spec.managedBy",
    ]


@given(
    total=st.integers(1, 40),
    trainer=st.integers(1, 24),
    rollout=st.integers(1, 24),
    granularity=st.integers(1, 4),
    gpus_per_node=st.sampled_from([4, 8]),
    gpus_per_replica=st.integers(0, 4),
    min_replicas=st.integers(1, 4),
)
def test_a_manual_split_is_accepted_exactly_if_it_can_be_carried_out(
    total: int,
    trainer: int,
    rollout: int,
    granularity: int,
    gpus_per_node: int,
    gpus_per_replica: int,
    min_replicas: int,
) -> None:
    job = apply_overrides(
        BASE,
        [
            f"spec.gpuBudget={{total: {total}, mode: Manual, split: {{trainer: {trainer}, rollout: "
            f"{rollout}}}}}",
            f"spec.trainer={{gpuGranularity: {granularity}, gpusPerNode: {gpus_per_node}}}",
            f"spec.rollout={{gpusPerReplica: {gpus_per_replica}, minReplicas: {min_replicas}}}",
        ],
    )
    replica = max(1, gpus_per_replica)
    trainer_can_run = trainer % granularity == 0 and (
        trainer <= gpus_per_node or trainer % gpus_per_node == 0
    )
    rollout_can_run = rollout % replica == 0 and rollout // replica >= min_replicas
    assert (validate(job) == []) == (trainer_can_run and rollout_can_run and trainer + rollout <= total)


def update(*overrides: str, before: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """Return what is said when a job is updated."""
    old = to_manifest(parse_job(apply_overrides(BASE, before)))
    new = to_manifest(parse_job(apply_overrides(BASE, overrides)))
    return [(each.path, each.message) for each in violations(new, old)]


def test_an_update_that_changes_nothing_is_accepted() -> None:
    assert update() == []


def test_steps_may_grow_but_not_shrink() -> None:
    assert update("spec.training.maxSteps=201") == []
    assert update("spec.training.maxSteps=199") == [
        (
            "spec.training.maxSteps",
            "training.maxSteps is 199 and was 200, but may only grow: put it back, or suspend the job to "
            "stop it",
        )
    ]


@pytest.mark.parametrize(
    ("override", "path", "was"),
    [
        ("model.contextLength=4096", "model", None),
        ("model.secretRef.name=hub", "model", None),
        ("dataset.parameters={size: 10}", "dataset", None),
        ("training.seed=2", "training.seed", "1"),
        ("gpuBudget.resourceName=amd.com/gpu", "gpuBudget.resourceName", "nvidia.com/gpu"),
        ("gpuBudget.gpuMemory=80Gi", "gpuBudget.gpuMemory", ""),
        ("gpuBudget.allocation=None", "gpuBudget.allocation", "ExtendedResource"),
        ("rollout.gpusPerReplica=1", "rollout.gpusPerReplica", "0"),
        ("messaging.embedded.storage.size=20Gi", "messaging", None),
        ("checkpoint.location.path=other", "checkpoint.location", None),
        ("checkpoint.resume=Never", "checkpoint.resume", "Auto"),
        ("checkpoint.resumePath=x", "checkpoint.resumePath", ""),
        ("scheduling.network.mode=Host", "scheduling.network", None),
        ("scheduling.imagePullSecrets=[{name: registry}]", "scheduling.imagePullSecrets", None),
        ("scheduling.sharedMemory=32Gi", "scheduling.sharedMemory", "16Gi"),
    ],
)
def test_immutable_fields_cannot_change(override: str, path: str, was: str | None) -> None:
    value = "" if was is None else f' and was "{was}"'
    expected = f"{path} is immutable{value}: put it back, or make a new AsyncRLJob"
    assert update(f"spec.{override}") == [(f"spec.{path}", expected)]


def test_an_optional_immutable_field_cannot_vanish() -> None:
    ((path, _),) = update(before=("spec.model.cache.claimName=models",))
    assert path == "spec.model"


@pytest.mark.parametrize(
    "override",
    [
        "workflow.systemPrompt=Think.",
        "sampling.groupSize=4",
        "training.batchSize=32",
        "algorithm.clip.dual=3.0",
        "evaluation.source=hf://openai/gsm8k",
        "gpuBudget.total=32",
        "gpuBudget.mode=Auto",
        "rollout.podTemplate={spec: {}}",
        "trainer.deepspeed.zeroStage=3",
        "checkpoint.keep=2",
        "suspend=true",
        "failurePolicy.trainer.maxRestarts=0",
    ],
)
def test_other_fields_can_change(override: str) -> None:
    assert update(f"spec.{override}") == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("nodeSelector", "{pool: gpu}"),
        ("tolerations", "[{key: gpu, operator: Exists}]"),
        ("affinity", "{nodeAffinity: {}}"),
    ],
)
def test_placement_changes_only_with_suspend(field: str, value: str) -> None:
    moved, suspended = f"spec.scheduling.{field}={value}", "spec.suspend=true"
    message = f"scheduling.{field} may only change while the job is suspended: set suspend in the same update"
    assert update(moved) == [(f"spec.scheduling.{field}", message)]
    assert update(moved, suspended) == []
    assert update(moved, suspended, before=(suspended,)) == []
    assert update(moved, before=(suspended,)) == []


def test_transitions_are_marked_and_told_apart() -> None:
    assert all(rule.is_transition for rule in immutability_rules())
    assert [rule.field_path for rule in RULES if rule.is_transition] == [".maxSteps"]


def test_rules_keep_to_what_both_evaluators_know() -> None:
    for rule in all_rules():
        for text in (rule.rule, rule.message_expression):
            assert "\n" not in text
            assert not re.search(r"quantity\(|\.split\(|\.\?|string\(", text), text
