"""How a file becomes a job, or a list of everything that is wrong with it."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl_api.job import AsyncRLJob
from asyncrl_api.parsing import (
    FieldError,
    SpecError,
    apply_overrides,
    load_documents,
    parse_job,
    parse_spec,
    validate,
)

SMALLEST = """\
apiVersion: asyncrl.dev/v1alpha1
kind: AsyncRLJob
metadata: {name: gsm8k}
spec:
  model: {source: "hf://Qwen/Qwen3-1.7B"}
  dataset: {source: "hf://openai/gsm8k"}
  reward: {type: Math}
  training: {batchSize: 64, maxSteps: 200}
  gpuBudget: {total: 8}
  checkpoint: {location: {claimName: checkpoints}}
"""


def load(folder: Path, text: str) -> list[Any]:
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return load_documents(path)


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    (document,) = load(tmp_path, SMALLEST)
    assert isinstance(document, dict)
    return document


def problems(document: Any) -> list[str]:
    return [str(error) for error in validate(document)]


# Loading


def test_the_smallest_manifest_is_a_job(document: dict[str, Any]) -> None:
    assert validate(document) == []
    job = parse_job(document)
    assert isinstance(job, AsyncRLJob) and job.spec.training.max_steps == 200


def test_json_is_yaml(tmp_path: Path) -> None:
    assert load(tmp_path, '{"a": [1, 1e-6, "x", true]}') == [{"a": [1, 1e-6, "x", True]}]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("5E3", 5000.0),
        ("010", 10),
        ("0x10", 16),
        ("yes", "yes"),
        ("off", "off"),
        ("None", "None"),
        ("12:30:45", "12:30:45"),
        ("2026-01-01", "2026-01-01"),
        ("true", True),
    ],
)
def test_scalars_are_read_as_yaml_1_2(tmp_path: Path, text: str, value: object) -> None:
    (document,) = load(tmp_path, f"a: {text}\n")
    assert document == {"a": value} and type(document["a"]) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_as_python_prints_it_is_that_number(number: float) -> None:
    value = apply_overrides({}, [f"a={number!r}"])["a"]
    assert type(value) is float and value == number


def test_a_file_may_hold_several_documents_and_empty_ones(tmp_path: Path) -> None:
    assert load(tmp_path, "---\na: 1\n---\n# nothing\n---\nb: 2\n---\n") == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n---\n"])
def test_a_file_without_a_document_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SpecError, match=r"job\.yaml: holds no document"):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spec:\n  a: 1\n  b: 2\n  a: 3\n", r'job\.yaml:4: found duplicate key "a"'),
        ("spec:\n  a: [1\n  b: 2\n", r"job\.yaml:3: expected ',' or '\]'"),
        ("a: 1\n---\nb: {\n", r"job\.yaml:4: expected the node content"),
        ("a:\n\tb: 1\n", r"job\.yaml:2: found character '\\t'"),
        ("a: !!python/object:os.system x\n", r"job\.yaml:1: could not determine a constructor"),
        ("a: \x00\n", r"job\.yaml: not YAML"),
    ],
)
def test_syntax_errors_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load(tmp_path, text)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(SpecError, match=r"job\.yaml: not YAML"):
        load_documents(path)


# What is no AsyncRLJob at all


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (None, ["manifest: is empty, but must be a map with apiVersion, kind, metadata and spec"]),
        ([1], ["manifest: is a list, but must be a map with apiVersion, kind, metadata and spec"]),
        ("x", ["manifest: is text, but must be a map with apiVersion, kind, metadata and spec"]),
        ({}, ["apiVersion: must be asyncrl.dev/v1alpha1", "kind: must be AsyncRLJob"]),
        (
            {"apiVersion": "batch/v1", "kind": "Job", "spec": {"template": {}}},
            ['apiVersion: "batch/v1": must be asyncrl.dev/v1alpha1', 'kind: "Job": must be AsyncRLJob'],
        ),
        (
            {"apiVersion": "asyncrl.dev/v1alpha1", "kind": "AsyncRLJob"},
            ["metadata: is required", "spec: is required"],
        ),
    ],
)
def test_other_documents_are_told_apart(document: Any, expected: list[str]) -> None:
    assert problems(document) == expected


# Fields


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("training.batchSize", "-1", ": -1: must be greater than or equal to 1"),
        ("training.batchSize", "'64'", ': "64": must be an integer, without quotes'),
        ("training.batchSize", "many", ': "many": must be an integer'),
        ("training.batchSize", "64.5", ": 64.5: must be an integer"),
        ("training.batchSize", "true", ": true: must be an integer"),
        ("training.batchSize", "3000000000", ": 3000000000: must be less than or equal to 1000000"),
        ("training.learningRate", "'1e-6'", ': "1e-6": must be a number, without quotes'),
        ("training.learningRate", ".inf", ": inf: must be a finite number"),
        ("sampling.temperature", "0", ": 0: must be greater than 0.0"),
        ("suspend", "yes", ': "yes": must be true or false'),
        ("model.revision", "123", ": 123: must be a string: put it in quotes"),
        ("model.revision", "[a]", ": must be a string, not a list"),
        ("model.revision", "a" * 254, f': "{"a" * 76}...: must have at most 253 characters'),
        ("model", "hf://org/name", ': "hf://org/name": must be a map'),
        ("rollout", "[]", ": must be a map, not a list"),
        ("rollout.podTemplate", "[]", ": must be a map, not a list"),
        ("rollout.engine.args", "--fast", ': "--fast": must be a list'),
        ("rollout.engine.args", "[--tp, 2]", "[1]: 2: must be a string: put it in quotes"),
        ("rollout.engine.args", f"[{'a, ' * 257}]", ": must have at most 256 entries, has 257"),
        ("failurePolicy.trainer.fatalExitCodes", "[64, 0]", "[1]: 0: must be greater than or equal to 1"),
        ("scheduling.nodeSelector", "{1: a}", ".1: names must be strings: put it in quotes"),
        ("scheduling", "{1: a}", ".1: names must be strings: put it in quotes"),
        ("scheduling.imagePullSecrets", "[{name: a}, {}]", "[1].name: is required"),
        ("scheduling.sharedMemory", "", ': "": must be a quantity of bytes such as 10Gi'),
        ("gpuBudget.gpuMemory", "80GB", ': "80GB": must be a quantity of bytes such as 80Gi, or empty'),
        ("checkpoint.location.claimName", "", ': "": must not be empty'),
        ("trainer.backend", "FSDP", ": \"FSDP\": must be 'DeepSpeed' or 'Emulated'"),
        ("staleness.order", "Oldest", ": \"Oldest\": must be 'OldestFirst' or 'FreshestFirst'"),
        ("dataset.parameters", "{a: .nan}", ".a: nan: must be a finite number"),
        ("dataset.parameters", f"{{a: {2**63}}}", f".a: {2**63}: must be an integer of 64 bits"),
        ("dataset.parameters", "{a: !!binary aGk=}", ".a: a bytes cannot be written as JSON"),
    ],
)
def test_a_wrong_field_is_named_with_value_and_rule(
    document: dict[str, Any], path: str, text: str, expected: str
) -> None:
    broken = apply_overrides(document, [f"spec.{path}={text}"])
    assert problems(broken) == [f"spec.{path}{expected}"]


def test_a_missing_field_is_named(document: dict[str, Any]) -> None:
    del document["spec"]["training"]["batchSize"]
    del document["spec"]["gpuBudget"]
    assert problems(document) == ["spec.training.batchSize: is required", "spec.gpuBudget: is required"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "spec.training.batchSzie=4",
            "spec.training.batchSzie: is not a known field; did you mean batchSize?",
        ),
        (
            "spec.trainer.gpus_per_node=4",
            "spec.trainer.gpus_per_node: is not a known field; did you mean gpusPerNode?",
        ),
        ("spec.trainig={}", "spec.trainig: is not a known field; did you mean training?"),
        ("spec.batchSize=4", "spec.batchSize: is not a known field; did you mean spec.training.batchSize?"),
        (
            "spec.everySteps=4",
            "spec.everySteps: is not a known field; "
            "did you mean spec.evaluation.everySteps or spec.checkpoint.everySteps?",
        ),
        ("spec.optimizer=Adam", "spec.optimizer: is not a known field"),
        ("metadata.lables={}", "metadata.lables: is not a known field; did you mean labels?"),
        ("specs={}", "specs: is not a known field; did you mean spec?"),
        (
            "spec.scheduling.imagePullSecrets=[{name: a, nam: b}]",
            "spec.scheduling.imagePullSecrets[0].nam: is not a known field; did you mean name?",
        ),
    ],
)
def test_an_unknown_field_is_refused_with_a_suggestion(
    document: dict[str, Any], override: str, expected: str
) -> None:
    assert problems(apply_overrides(document, [override])) == [expected]


@pytest.mark.parametrize(
    "path",
    ["evaluation", "model.secretRef", "training.seed", "rollout.podTemplate", "dataset.parameters.a.b"],
)
def test_null_is_refused_everywhere(document: dict[str, Any], path: str) -> None:
    message = f"spec.{path}: null is not allowed: write a value, or leave the field out"
    assert problems(apply_overrides(document, [f"spec.{path}=null"])) == [message]


def test_all_errors_come_at_once(document: dict[str, Any]) -> None:
    broken = apply_overrides(
        document, ["spec.training.batchSize=-1", "spec.reward.type=Maths", "spec.suspend=null", "spec.foo=1"]
    )
    with pytest.raises(SpecError) as caught:
        parse_job(broken)
    assert {error.path for error in caught.value.errors} == {
        "spec.training.batchSize",
        "spec.reward.type",
        "spec.suspend",
        "spec.foo",
    }
    assert str(caught.value).splitlines() == problems(broken)


def test_rules_across_fields_wait_until_the_fields_are_right(document: dict[str, Any]) -> None:
    rule_broken = apply_overrides(document, ["spec.training.minibatches=65"])
    assert [error.path for error in validate(rule_broken)] == ["spec.training.minibatches"]
    both_broken = apply_overrides(rule_broken, ["spec.training.seed=-1"])
    assert [error.path for error in validate(both_broken)] == ["spec.training.seed"]
    with pytest.raises(SpecError, match=r"training\.minibatches is 65, but must be at most"):
        parse_job(rule_broken)


@pytest.mark.parametrize("path", ["gradient_accumulation_steps", "zero_optimization.stage", "fp16"])
def test_what_the_trainer_rests_on_cannot_be_overridden(document: dict[str, Any], path: str) -> None:
    field = f"trainer.deepspeed.config.{path}"
    message = f"spec.{field}: {field} is set, but the trainer decides it from other fields: leave it out"
    assert problems(apply_overrides(document, [f"spec.{field}=3"])) == [message]


def test_other_settings_of_deepspeed_are_free(document: dict[str, Any]) -> None:
    offloaded = "{zero_optimization: {offload_optimizer: {device: cpu}}, bf16: {}}"
    assert problems(apply_overrides(document, [f"spec.trainer.deepspeed.config={offloaded}"])) == []


def test_a_spec_alone_can_be_parsed(document: dict[str, Any]) -> None:
    assert parse_spec(document["spec"]) == parse_job(document).spec
    with pytest.raises(SpecError, match="spec: must be a map, not a list"):
        parse_spec([])


def test_an_error_without_a_value_shows_none() -> None:
    assert str(FieldError("spec.a", "is required")) == "spec.a: is required"
    assert str(FieldError("spec.a", "must be 1", 2)) == "spec.a: 2: must be 1"


# Overrides


def test_overrides_are_yaml_and_leave_the_original_alone(document: dict[str, Any]) -> None:
    before = copy.deepcopy(document)
    changed = apply_overrides(
        document,
        [
            "spec.training.maxSteps=5",
            "spec.training.learningRate=1e-5",
            "spec.suspend=true",
            "spec.rollout.engine.args=[--a, '1=2']",
            "spec.scheduling.nodeSelector={kubernetes.io/os: linux}",
            "spec.workflow.systemPrompt=a=b",
            "spec.rollout.engine.image=",
        ],
    )
    assert document == before
    assert changed["spec"]["training"] == {"batchSize": 64, "maxSteps": 5, "learningRate": 1e-5}
    assert changed["spec"]["suspend"] is True
    assert changed["spec"]["rollout"]["engine"] == {"args": ["--a", "1=2"], "image": ""}
    assert changed["spec"]["scheduling"]["nodeSelector"] == {"kubernetes.io/os": "linux"}
    assert changed["spec"]["workflow"]["systemPrompt"] == "a=b"
    assert validate(changed) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("spec.suspend", '--set: "spec.suspend": must have the form path.to.field=value'),
        ("spec..suspend=5", '--set: "spec..suspend=5": must have the form path.to.field=value'),
        ("=5", '--set: "=5": must have the form path.to.field=value'),
        ("metadata.name.x=a", "metadata.name.x: cannot be set: metadata.name is text, not a map"),
        ("spec.suspend=[1", "--set spec.suspend:1: expected ',' or ']'"),
    ],
)
def test_overrides_that_cannot_be_applied_say_why(
    document: dict[str, Any], override: str, message: str
) -> None:
    with pytest.raises(SpecError) as caught:
        apply_overrides(document, [override])
    assert str(caught.value).startswith(message)


def test_a_list_is_not_gone_through() -> None:
    with pytest.raises(SpecError, match="a is a list, not a map"):
        apply_overrides({"a": [{}]}, ["a.0=1"])
    with pytest.raises(SpecError, match="the manifest is a list, not a map"):
        apply_overrides([], ["a=1"])


@given(
    path=st.lists(st.from_regex(r"[a-z][A-Za-z0-9]{0,8}", fullmatch=True), min_size=1, max_size=4),
    value=st.one_of(st.integers(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False)),
)
def test_what_is_set_is_found_there(path: list[str], value: float) -> None:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    found: Any = apply_overrides({}, [f"{'.'.join(path)}={text}"])
    for name in path:
        found = found[name]
    assert type(found) is type(value) and math.isclose(found, value, rel_tol=0.0)
