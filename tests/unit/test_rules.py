"""Every rule across fields: a manifest that it accepts, one that it refuses, and what it then says."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl_api.job import to_manifest
from asyncrl_api.parsing import apply_overrides, parse_job, validate
from asyncrl_api.rules import RULES, Rule, all_rules, immutability_rules, violations
from support.manifests.rule_cases import BASE, CASES, Case


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


@pytest.mark.parametrize(("was", "now"), [(a, b) for a in range(4) for b in range(4)])
def test_the_zero_stage_changes_only_where_a_checkpoint_can_be_read(was: int, now: int) -> None:
    said = update(
        f"spec.trainer.deepspeed.zeroStage={now}", before=(f"spec.trainer.deepspeed.zeroStage={was}",)
    )
    message = (
        f"trainer.deepspeed.zeroStage is {now} and was {was}, but may only change between 1 and 2, because "
        "no checkpoint of the job could be read: put it back, or create a new AsyncRLJob"
    )
    can_be_read = was == now or {was, now} == {1, 2}
    assert said == ([] if can_be_read else [("spec.trainer.deepspeed.zeroStage", message)])


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
    expected = f"{path} is immutable{value}: put it back, or create a new AsyncRLJob"
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
        "trainer.deepspeed.zeroStage=1",
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
    assert [rule.field_path for rule in RULES if rule.is_transition] == [".maxSteps", ".zeroStage"]


def test_rules_keep_to_what_both_evaluators_know() -> None:
    for rule in all_rules():
        for text in (rule.rule, rule.message_expression):
            assert "\n" not in text
            assert not re.search(r"quantity\(|\.split\(|\.\?|string\(", text), text
