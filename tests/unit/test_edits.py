"""An edit of each field leads to what its mark says, and an upgrade of the types leads to nothing.

Every field of the API is tried: edited, and where it is optional added and removed.
"""

import copy
from collections.abc import Mapping
from typing import Any, get_args

import pytest

from asyncrl_api.job import AsyncRLJob, EvaluationSpec, Metadata, Spec, TrainingSpec, to_manifest
from asyncrl_api.marks import FieldNode, field
from asyncrl_api.rules import violations
from asyncrl_operator.decide.desired import DeletePod
from asyncrl_operator.decide.edits import (
    ROLLOUT_MARKS,
    TRAINER_MARKS,
    changed_fields,
    current_templates,
    rollout_hash,
    trainer_edit,
    trainer_hash,
)
from asyncrl_operator.decide.observed import Values
from support.cluster.model_cluster import ModelCluster, make_spec
from support.manifests.field_edits import BARE, FULL, NODES, Edit, edits_of, put, wire

EDITS = {f"{edit.node.path} {edit.kind}": edit for edit in edits_of(BARE, FULL)}
each_edit = pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)


def is_below_a_size(node: FieldNode) -> bool:
    return any(node.path == path or node.path.startswith(f"{path}.") for path in SIZES)


SIZES = {path for path, node in NODES.items() if node.is_size}


def test_every_field_is_tried() -> None:
    """The exception is a choice with only one value."""
    edited = {edit.node.path for edit in EDITS.values() if edit.kind == "edited"}
    rest = {path: node for path, node in NODES.items() if not node.children and path not in edited}
    assert set(rest) == {"scheduling.startOrder"}
    assert all(len(get_args(node.info.annotation)) == 1 for node in rest.values())
    assert sorted(SIZES) == ["gpuBudget.split"] and len(EDITS) > 120
    assert {node.mark for node in NODES.values() if node.is_optional} >= {"L/R", "R", "U", "I"}


@each_edit
def test_an_edit_changes_what_its_mark_says(edit: Edit) -> None:
    marks = set() if is_below_a_size(edit.node) else set(edit.node.mark.split("/"))
    for wanted, name in ((TRAINER_MARKS, trainer_hash), (ROLLOUT_MARKS, rollout_hash)):
        paths = changed_fields(edit.spec, edit.before, wanted)
        assert bool(paths) is bool(marks & set(wanted))
        assert all(f"{path}.".startswith(f"{edit.node.path}.") for path in paths)
        assert (name(edit.spec) != name(Spec.model_validate(edit.before))) is bool(paths)
    newest = rollout_hash(edit.spec)
    rolls = not marks.isdisjoint(ROLLOUT_MARKS)
    assert current_templates(edit.spec, {"then": edit.before}) == ({newest} if rolls else {newest, "then"})


@each_edit
def test_an_edit_of_an_immutable_field_is_refused_and_no_other_for_its_mark(edit: Edit) -> None:
    def manifest(values: Values) -> dict[str, Any]:
        return to_manifest(AsyncRLJob(metadata=Metadata(name="job"), spec=Spec.model_validate(values)))

    before, after = manifest(edit.before), manifest(edit.after)
    new = {each.message for each in violations(after, before)} - {each.message for each in violations(after)}
    has_rule_of_its_own = {"training.maxSteps", "trainer.deepspeed.zeroStage"}
    assert bool(new) is (edit.node.mark == "I") or edit.node.path in has_rule_of_its_own


def running(values: Values) -> ModelCluster:
    """Return a cluster whose job runs."""
    cluster = ModelCluster(Spec.model_validate(values))
    cluster.run_until_still()
    assert cluster.phase == "Running"
    return cluster


@pytest.fixture(scope="module")
def clusters() -> dict[str, ModelCluster]:
    return {"added": running(BARE), "removed": running(FULL), "edited": running(FULL)}


@each_edit
def test_the_operator_does_what_the_mark_says(clusters: Mapping[str, ModelCluster], edit: Edit) -> None:
    if edit.node.mark == "I" or edit.node.path == "suspend":
        return  # refused, or the end of all pods
    cluster = copy.deepcopy(clusters[edit.kind])
    cluster.replace(edit.spec)
    outcomes = [cluster.pass_once() for _ in range(2)]
    attempt, is_size = cluster.status.attempt, is_below_a_size(edit.node)
    assert attempt is not None
    assert (attempt.last_reason == "ConfigChanged") is ("R" in edit.node.mark and not is_size)
    rolled = any(isinstance(each, DeletePod) for outcome in outcomes for each in outcome.deletions)
    assert rolled is (edit.node.mark == "U")


# -- upgrades of the types


class LaterTraining(TrainingSpec):
    """The block in a later version of the types."""

    batch_size: int = field("", mark="L")
    minibatches: int = field("", mark="R", default=16)
    max_steps: int = field("", mark="R")
    momentum: float = field("", mark="R", default=0.9)
    parts: list[str] = field("", mark="U", default=["a"])


class LaterEvaluation(EvaluationSpec):
    split: str = field("", mark="U", default="validation")


class LaterBlock(TrainingSpec):
    """A new block, whose default differs from the defaults of its fields."""

    batch_size: int = field("", mark="R", default=1)
    max_steps: int = field("", mark="U", default=1)


class Later(Spec):
    training: LaterTraining = field("")
    evaluation: LaterEvaluation | None = field("", mark="L", default=None)
    block: LaterBlock = field("", default=LaterBlock(batch_size=7, max_steps=7))


def later(**training: Any) -> Later:
    """Return what a later version reads from an object that the API server has stored with its defaults."""
    return Later.model_validate({**BARE, "training": {**BARE["training"], **training}})


def test_a_field_that_is_new_counts_as_unchanged_while_it_has_its_default() -> None:
    assert changed_fields(later(), BARE, "LURI") == []
    assert changed_fields(later(momentum=0.5), BARE, "LURI") == ["training.momentum"]
    assert changed_fields(later(parts=["b"]), BARE, TRAINER_MARKS) == []
    assert changed_fields(later(parts=["b"]), BARE, ROLLOUT_MARKS) == ["training.parts"]
    block = Later.model_validate({**BARE, "block": {"batchSize": 1, "maxSteps": 7}})
    assert changed_fields(block, BARE, "LURI") == ["block.batchSize"]
    absent = put(BARE, "algorithm", None)
    assert changed_fields(make_spec(), absent, "LURI") == [], "a whole block that is new"


def test_a_field_that_is_gone_counts_as_unchanged() -> None:
    began = wire(later(momentum=0.5, parts=["b"]))
    assert changed_fields(make_spec(), began, "LURI") == []
    with_block = {**put(BARE, "training.momentum", 0.5), "curriculum": {"stages": [1, 2]}}
    assert changed_fields(make_spec(), with_block, "LURI") == []


def test_a_default_that_has_changed_acts_on_new_objects_alone() -> None:
    assert BARE["training"]["minibatches"] == 4, "stored as a value, and 16 is the default now"
    assert changed_fields(later(), BARE, "LURI") == []
    assert changed_fields(later(minibatches=16), BARE, "LURI") == ["training.minibatches"]
    new = put(BARE, "training.minibatches", None)
    assert Later.model_validate(new).training.minibatches == 16


def test_a_field_with_another_mark_is_compared_under_the_new_one() -> None:
    assert changed_fields(later(batchSize=5), BARE, TRAINER_MARKS) == []
    assert changed_fields(make_spec(training={"batchSize": 5}), BARE, TRAINER_MARKS) == ["training.batchSize"]
    assert changed_fields(later(maxSteps=10), BARE, TRAINER_MARKS) == ["training.maxSteps"]
    assert changed_fields(make_spec(training={"maxSteps": 10}), BARE, TRAINER_MARKS) == []
    assert rollout_hash(later()) != rollout_hash(make_spec()), "though no value differs"


def test_values_are_compared_as_in_json() -> None:
    """A free form keeps what a user wrote, and Python takes true for 1."""

    def changed(one: Any, other: Any) -> bool:
        spec = make_spec(trainer={"podTemplate": {"a": [{"b": other}]}})
        return changed_fields(spec, put(BARE, "trainer.podTemplate", {"a": [{"b": one}]}), "R") != []

    assert changed(1, True) and changed(False, 0) and changed([1], [1, 2]) and changed({"a": 1}, {})
    assert changed(None, 0) and changed("1", 1)
    assert not changed(1, 1.0) and not changed({"a": [True]}, {"a": [True]})


# -- what is told, and what is known where a configuration is gone


def test_the_user_is_told_which_fields_were_changed() -> None:
    spec = make_spec(training={"learningRate": 1e-5}, sampling={"groupSize": 4})
    told = trainer_edit(spec, BARE, "")
    assert told == "changed: spec.sampling.groupSize, spec.training.learningRate"
    many = make_spec(algorithm={"overlongPenalty": {}, "clip": {"low": 0.1, "high": 0.1}, "rewardScale": 2.0})
    many = many.model_copy(update={"training": spec.training})
    assert trainer_edit(many, BARE, "").endswith(" and 1 more")
    assert trainer_edit(make_spec(), BARE, "made by another version") == ""


def test_without_its_configuration_the_hash_of_an_attempt_decides() -> None:
    spec = make_spec()
    assert trainer_edit(spec, None, trainer_hash(spec)) == ""
    assert trainer_edit(spec, None, "5f3c") == "a field marked R was changed"
    assert current_templates(spec, {}) == {rollout_hash(spec)}


# -- upgrades of the operator


def as_of_another_version(cluster: ModelCluster, **remembered: Any) -> None:
    """Rewrite what an operator has left as one with other types and other hashes would have left it."""
    attempt = cluster.status.attempt
    assert attempt is not None and cluster.rollout is not None
    began = {**cluster.values, **remembered}
    cluster.status = cluster.status.model_copy(
        update={"attempt": attempt.model_copy(update={"config_hash": "1e240ab0c9"})}
    )
    cluster.attempts_began = {attempt.number: began}
    cluster.templates_began = {"c8b54ddde4": began}
    cluster.rollout = type(cluster.rollout)(cluster.rollout.name, cluster.rollout.replicas, "c8b54ddde4")
    for pod in list(cluster.pods.values()):
        if pod.group == "rollout":
            cluster.pods[pod.name] = type(pod)(**{**vars(pod), "template": "c8b54ddde4"})


def pods_of(cluster: ModelCluster, group: str) -> set[str]:
    return {pod.uid for pod in cluster.pods.values() if pod.group == group}


def test_a_job_of_an_earlier_operator_is_taken_over_as_it_runs() -> None:
    lacking = put(BARE, "algorithm.rewardShift", None)["algorithm"]
    for remembered in ({}, {"algorithm": lacking}, {"curriculum": {"stages": 3}}):
        cluster = running(BARE)
        as_of_another_version(cluster, **remembered)
        before, events = set(cluster.pods.values()), list(cluster.events)
        cluster.run_until_still()
        assert set(cluster.pods.values()) == before and cluster.events == events
        assert cluster.condition("Ready") == "True/Running"
        (group,) = (each for each in cluster.status.groups if each.name == "rollout")
        assert group.updated == group.ready == 6
        assert cluster.rollout is not None and cluster.rollout.template == rollout_hash(cluster.spec)
        cluster.delete_pod("gsm8k-rollout-0")
        cluster.run_until_still()
        assert cluster.pods["gsm8k-rollout-0"].template == rollout_hash(cluster.spec)
        assert "c8b54ddde4" in cluster.templates_began, "the others still read it"


def test_a_job_that_was_taken_over_takes_edits_as_any_other() -> None:
    cluster = running(BARE)
    as_of_another_version(cluster)
    cluster.run_until_still()
    engines = pods_of(cluster, "rollout")
    cluster.edit(training={"learningRate": 1e-5})
    cluster.run_until_still()
    assert pods_of(cluster, "rollout") == engines
    assert cluster.status.attempt is not None and cluster.status.attempt.number == 2
    cluster.edit(rollout={"engine": {"args": ["--x"]}})
    cluster.run_until_still()
    assert not pods_of(cluster, "rollout") & engines and cluster.status.attempt.number == 2
    assert "c8b54ddde4" not in cluster.templates_began


def test_an_edit_made_while_the_operator_was_upgraded_acts() -> None:
    cluster = running(BARE)
    engines = pods_of(cluster, "rollout")
    as_of_another_version(cluster)
    cluster.edit(training={"learningRate": 1e-5}, reward={"timeoutSeconds": 7})
    cluster.run_until_still()
    assert cluster.status.attempt is not None and cluster.status.attempt.number == 2
    assert not pods_of(cluster, "rollout") & engines


def test_an_edit_between_the_status_and_the_job_of_an_attempt_is_not_taken_for_another() -> None:
    """The hash in the status is then that of a spec that the attempt never had."""
    cluster = ModelCluster(make_spec(training={"learningRate": 1e-5}))
    cluster.pass_once(dies_after=1)
    assert cluster.status.attempt is not None and not cluster.jobs
    cluster.edit(training={"learningRate": 1e-6})
    cluster.run_until_still()
    assert cluster.status.attempt.number == 1
    cluster.edit(training={"learningRate": 1e-5})
    cluster.run_until_still()
    assert cluster.status.attempt.number == 2
