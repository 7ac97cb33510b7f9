"""The types of the manifest: defaults, marks, descriptions, bounds."""

import json
import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl_api import job as job_module
from asyncrl_api.base import ApiType, parse_quantity
from asyncrl_api.job import AsyncRLJob, Metadata, Spec, to_manifest
from asyncrl_api.marks import block_of, field, marks, merge, split_live, tree
from asyncrl_api.parsing import SpecError, apply_overrides, parse_job, parse_spec, validate
from asyncrl_api.run_config import live_values, with_live_values
from support.manifests.smallest import SMALLEST

# Every field that has a default, as docs/reference.md shows it.
DEFAULTS: dict[str, Any] = {
    "apiVersion": "asyncrl.dev/v1alpha1",
    "kind": "AsyncRLJob",
    "metadata": {"name": "gsm8k"},
    "spec": {
        "model": {
            "source": "hf://Qwen/Qwen3-1.7B",
            "revision": "main",
            "dtype": "BFloat16",
            "contextLength": 8192,
            "parameterCount": 0,
        },
        "dataset": {
            "source": "hf://openai/gsm8k",
            "split": "train",
            "parameters": {},
            "promptField": "question",
            "answerField": "answer",
            "seed": 17,
        },
        "workflow": {"type": "SingleTurn", "systemPrompt": "", "maxTurns": 1},
        "reward": {"type": "Math", "url": "", "timeoutSeconds": 30, "maxAttempts": 3},
        "sampling": {
            "groupSize": 8,
            "maxNewTokens": 1024,
            "temperature": 1.0,
            "filter": "None",
            "maxDiscardsInARow": 1000,
        },
        "training": {
            "batchSize": 64,
            "maxSteps": 200,
            "minibatches": 4,
            "tokensPerMicroBatch": 16384,
            "learningRate": 1e-6,
            "schedule": {"type": "Constant", "warmupSteps": 0},
            "weightDecay": 0.01,
            "gradientClipping": 1.0,
            "seed": 1,
            "lora": {
                "rank": 0,
                "alpha": 32.0,
                "targetModules": [
                    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
                ],
            },
        },
        "algorithm": {
            "policyLoss": "DecoupledPPO",
            "advantage": "GroupNormalized",
            "clip": {},
            "importanceWeight": {"max": 5.0, "onExceed": "Mask"},
            "klCoefficient": 0.0,
            "entropyCoefficient": 0.0,
            "rewardScale": 1.0,
            "rewardShift": 0.0,
        },
        "staleness": {"maxVersions": 4, "target": "Auto", "onExceed": "Mask", "order": "OldestFirst"},
        "gpuBudget": {
            "total": 8,
            "resourceName": "nvidia.com/gpu",
            "gpuMemory": "",
            "allocation": "ExtendedResource",
            "mode": "Auto",
            "auto": {"initialRolloutPercent": 75, "cooldownSeconds": 600, "trainerResize": "AtCheckpoint"},
        },
        "rollout": {
            "engine": {"type": "SGLang", "image": "", "args": []},
            "gpusPerReplica": 0,
            "minReplicas": 1,
            "maxReplicas": 64,
            "maxConcurrency": 0,
            "interrupt": "Retract",
            "update": {"maxUnavailablePercent": 25},
            "podTemplate": {},
        },
        "trainer": {
            "backend": "DeepSpeed",
            "deepspeed": {"zeroStage": 2, "config": {}},
            "activationCheckpointing": "Auto",
            "image": "",
            "gpuGranularity": 1,
            "gpusPerNode": 8,
            "terminationGracePeriodSeconds": 300,
            "podTemplate": {},
        },
        "emulation": {"deviceModel": "", "speedup": 1.0},
        "weightSync": {
            "mode": "Direct",
            "stagingMegabytes": 0,
            "backend": "Auto",
            "bucketMegabytes": 256,
            "timeoutSeconds": 0,
        },
        "messaging": {
            "mode": "Embedded",
            "embedded": {"storage": {"type": "Ephemeral", "size": "10Gi"}},
            "shared": {"url": "", "subjectPrefix": ""},
        },
        "checkpoint": {
            "location": {"claimName": "checkpoints", "path": ""},
            "everySteps": 50,
            "everySeconds": 600,
            "keep": 3,
            "resume": "Auto",
            "resumePath": "",
            "exportEverySteps": 0,
        },
        "scheduling": {
            "queueName": "",
            "priorityClassName": "",
            "gang": {"provider": "None"},
            "startOrder": "TrainerFirst",
            "nodeSelector": {},
            "tolerations": [],
            "affinity": {},
            "topologyKey": "",
            "network": {"mode": "Pod", "rdmaResource": "", "rdmaCount": 0},
            "sharedMemory": "16Gi",
            "serviceAccountName": "",
            "imagePullSecrets": [],
        },
        "suspend": False,
        "managedBy": "",
        "activeDeadlineSeconds": 0,
        "pendingDeadlineSeconds": 0,
        "ttlSecondsAfterFinished": 3600,
        "failurePolicy": {
            "trainer": {
                "maxRestarts": 3,
                "maxDisruptions": 50,
                "backoffSeconds": 10,
                "maxBackoffSeconds": 600,
                "hangSeconds": 0,
                "maxSkippedUpdates": 10,
                "fatalExitCodes": [64, 65, 78],
            },
            "rollout": {"minAvailablePercent": 25, "belowMinimumSeconds": 900, "onBelowMinimum": "Fail"},
            "deadNodeForceDeleteSeconds": 120,
            "retainPodsOnFailure": True,
        },
    },
}

# The blocks that are absent by default, set.
OPTIONAL: dict[str, Any] = {
    "model": {"secretRef": {"name": "hub"}, "cache": {"claimName": "models"}},
    "dataset": {"secretRef": {"name": "hub"}},
    "workflow": {"class": "pkg.module:Class", "configMapRef": {"name": "code"}},
    "reward": {"function": "pkg.module:score", "configMapRef": {"name": "code"}},
    "algorithm": {
        "clip": {"low": 0.1, "high": 0.3, "dual": 3.0},
        "overlongPenalty": {"bufferTokens": 512, "penalty": 1.0},
        "rewardClip": 20.0,
    },
    "evaluation": {
        "source": "reasoning-gym://name",
        "split": "test",
        "parameters": {},
        "everySteps": 20,
        "samples": 200,
    },
    "gpuBudget": {"split": {"trainer": 4, "rollout": 4}},
    "messaging": {"shared": {"credentialsSecretRef": {"name": "nats"}}},
}

ALL_OF_IT = merge(DEFAULTS, {"spec": OPTIONAL})


def blocks(model: type[ApiType] = Spec) -> Iterator[type[ApiType]]:
    yield model
    for info in model.model_fields.values():
        below = block_of(info.annotation)
        if below and issubclass(below, ApiType):
            yield from blocks(below)


def paths(value: dict[str, Any], prefix: str = "") -> set[str]:
    below = (paths(each, f"{prefix}{name}.") for name, each in value.items() if isinstance(each, dict))
    return {f"{prefix}{name}" for name in value}.union(*below)


def test_the_smallest_manifest_gets_the_defaults_of_the_documentation() -> None:
    assert to_manifest(parse_job(SMALLEST)) == DEFAULTS


def test_every_field_of_the_documentation_is_there_and_no_other() -> None:
    assert set(marks(Spec)) == paths(ALL_OF_IT["spec"])


def test_optional_blocks_have_the_defaults_of_the_documentation() -> None:
    changed = apply_overrides(
        SMALLEST, ["spec.evaluation.source=reasoning-gym://name", "spec.algorithm.overlongPenalty={}"]
    )
    spec = parse_job(changed).spec
    dumped = to_manifest(parse_job(changed))["spec"]
    assert dumped["evaluation"] == OPTIONAL["evaluation"]
    assert dumped["algorithm"]["overlongPenalty"] == OPTIONAL["algorithm"]["overlongPenalty"]
    assert spec.algorithm.clip.dual is None and spec.gpu_budget.split is None


@pytest.mark.parametrize("manifest", [SMALLEST, DEFAULTS, ALL_OF_IT])
def test_a_job_survives_the_way_to_a_manifest_and_back(manifest: dict[str, Any]) -> None:
    job = parse_job(manifest)
    assert parse_job(to_manifest(job)) == job
    assert parse_job(json.loads(json.dumps(to_manifest(job)))) == job


def test_the_dump_of_a_complete_manifest_is_that_manifest() -> None:
    assert to_manifest(parse_job(ALL_OF_IT)) == ALL_OF_IT


def test_python_names_are_snake_case_and_wire_names_camel_case() -> None:
    spec = parse_job(ALL_OF_IT).spec
    assert spec.gpu_budget.total == 8
    assert spec.rollout.gpus_per_replica == 0
    assert spec.workflow.class_name == "pkg.module:Class"
    built = job_module.ModelSpec(source="hf://a/b", context_length=1)
    assert built.model_dump(by_alias=True)["contextLength"] == 1


def test_free_form_maps_keep_what_the_user_wrote() -> None:
    written = {
        "spec": {"containers": [{"name": "a", "env": [], "x": 1.5, "camelCase": {"snake_case": False}}]}
    }
    for path in (
        "rollout.podTemplate",
        "trainer.deepspeed.config",
        "dataset.parameters",
        "scheduling.affinity",
    ):
        block, _, name = path.rpartition(".")
        changed = apply_overrides(SMALLEST, [f"spec.{path}={json.dumps(written)}"])
        dumped = to_manifest(parse_job(changed))["spec"]
        for part in block.split("."):
            dumped = dumped[part]
        assert dumped[name] == written


def test_an_object_as_the_api_server_returns_it_is_read() -> None:
    metadata = {
        "name": "gsm8k",
        "namespace": "default",
        "uid": "6e0d",
        "generation": 2,
        "resourceVersion": "17",
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "labels": {"team": "math"},
        "managedFields": [{"manager": "kubectl", "fieldsV1": {"f:spec": {}}}],
    }
    job = parse_job({**DEFAULTS, "metadata": metadata, "status": {"phase": "Running"}})
    assert job.metadata.uid == "6e0d" and job.status == {"phase": "Running"}
    assert to_manifest(job)["metadata"] == metadata


@pytest.mark.parametrize("block", dict.fromkeys(blocks()), ids=lambda block: block.__name__)
def test_every_field_is_described_and_every_text_and_list_bounded(block: type[ApiType]) -> None:
    for name, info in block.model_fields.items():
        assert info.description and info.description.endswith("."), f"{block.__name__}.{name}"
    for name, schema in block.model_json_schema()["properties"].items():
        for variant in schema.get("anyOf", [schema]):
            if variant.get("type") == "string" and "enum" not in variant and "const" not in variant:
                assert "maxLength" in variant, f"{block.__name__}.{name}"
            if variant.get("type") == "array":
                assert "maxItems" in variant and schema["x-asyncrl-listType"], f"{block.__name__}.{name}"
            if variant.get("type") == "integer":
                assert {"minimum", "maximum"} <= set(variant), f"{block.__name__}.{name}"


def test_every_description_begins_with_its_mark() -> None:
    for top in tree(Spec):
        for node in top.walk():
            assert re.match(r"\[[ILUR](/[ILUR])*( unless suspended)?\] [A-Z0-9]", node.description), node.path


def test_marks_are_those_of_the_documentation() -> None:
    found = marks(Spec)
    expected = {
        "model.source": "I",
        "model.secretRef.name": "I",
        "dataset.parameters": "I",
        "workflow.class": "U",
        "reward.timeoutSeconds": "U",
        "sampling": "L/R",
        "sampling.groupSize": "R",
        "sampling.temperature": "L",
        "training": "I/L/R",
        "training.maxSteps": "L",
        "training.schedule.type": "R",
        "training.seed": "I",
        "algorithm.clip.dual": "R",
        "staleness.maxVersions": "L",
        "staleness.target": "L",
        "evaluation": "L/R",
        "evaluation.samples": "R",
        "evaluation.everySteps": "L",
        "gpuBudget.total": "L",
        "gpuBudget.allocation": "I",
        "gpuBudget.split": "L/R",
        "gpuBudget.split.trainer": "R",
        "gpuBudget.split.rollout": "L",
        "gpuBudget.auto.trainerResize": "L",
        "rollout.engine.args": "U",
        "rollout.gpusPerReplica": "I",
        "rollout.interrupt": "L",
        "trainer.backend": "I",
        "emulation.speedup": "I",
        "trainer.deepspeed.config": "R",
        "trainer.activationCheckpointing": "R",
        "weightSync.mode": "I",
        "weightSync.timeoutSeconds": "R",
        "messaging.embedded.storage.size": "I",
        "checkpoint.location.path": "I",
        "checkpoint.keep": "L",
        "scheduling.tolerations": "I",
        "suspend": "L",
        "managedBy": "I",
        "failurePolicy.trainer.fatalExitCodes": "L",
    }
    assert {path: found[path] for path in expected} == expected


def test_a_field_without_a_mark_is_our_mistake() -> None:
    class Unmarked(ApiType):
        size: int = field("Size.", default=1)

    with pytest.raises(ValueError, match=r"Unmarked\.size has no change mark"):
        tree(Unmarked)


def test_what_may_change_while_suspended_says_so() -> None:
    nodes = {node.path: node for top in tree(Spec) for node in top.walk()}
    free = {path for path, node in nodes.items() if node.is_free_while_suspended}
    assert free == {"scheduling.nodeSelector", "scheduling.tolerations", "scheduling.affinity"}
    assert nodes["scheduling.affinity"].description.startswith("[I unless suspended] ")


def enumerations() -> Iterator[tuple[str, str]]:
    for top in tree(Spec):
        for node in top.walk():
            if get_origin(node.info.annotation) is Literal:
                yield from ((node.path, value) for value in get_args(node.info.annotation))


def test_enumerations_are_those_of_the_documentation() -> None:
    found: dict[str, list[str]] = {}
    for path, value in enumerations():
        found.setdefault(path, []).append(value)
    assert {path: " ".join(values) for path, values in found.items()} == {
        "model.dtype": "BFloat16 Float32",
        "workflow.type": "SingleTurn MultiTurn Custom",
        "reward.type": "Math ReasoningGym Code Function Service",
        "sampling.filter": "None DropUniformGroups",
        "training.schedule.type": "Constant Linear Cosine",
        "algorithm.policyLoss": "DecoupledPPO PPO GSPO CISPO TIS",
        "algorithm.advantage": "GroupNormalized GroupCentered LeaveOneOut BatchNormalized",
        "algorithm.importanceWeight.onExceed": "Mask Clamp",
        "staleness.onExceed": "Mask Drop Keep",
        "staleness.order": "OldestFirst FreshestFirst",
        "gpuBudget.allocation": "ExtendedResource ResourceClaim None",
        "gpuBudget.mode": "Auto Manual",
        "gpuBudget.auto.trainerResize": "AtCheckpoint Never",
        "rollout.engine.type": "SGLang CPU Emulated",
        "rollout.interrupt": "Retract InPlace Drain",
        "trainer.backend": "DeepSpeed Emulated",
        "trainer.activationCheckpointing": "Auto Always Never",
        "weightSync.mode": "Direct Staged",
        "weightSync.backend": "Auto NCCL Gloo",
        "messaging.mode": "Embedded Shared",
        "messaging.embedded.storage.type": "Ephemeral Persistent",
        "checkpoint.resume": "Auto Never FromPath",
        "scheduling.gang.provider": "None Native Volcano KAI",
        "scheduling.startOrder": "TrainerFirst",
        "scheduling.network.mode": "Pod Host",
        "failurePolicy.rollout.onBelowMinimum": "Fail Continue",
    }


@pytest.mark.parametrize(
    "override",
    [
        "sampling.groupSize=0",
        "sampling.temperature=0",
        "training.batchSize=0",
        "training.learningRate=-1e-6",
        "training.learningRate=.inf",
        "training.seed=-1",
        "algorithm.clip.low=0",
        "algorithm.clip.dual=1.0",
        "algorithm.importanceWeight.max=0",
        "staleness.maxVersions=-1",
        "staleness.target=-1",
        "staleness.target=auto",
        "staleness.target=1.5",
        "staleness.target=true",
        "gpuBudget.total=0",
        "gpuBudget.auto.initialRolloutPercent=100",
        "rollout.minReplicas=0",
        "rollout.update.maxUnavailablePercent=0",
        "trainer.deepspeed.zeroStage=4",
        "checkpoint.keep=1",
        "failurePolicy.rollout.minAvailablePercent=101",
        "failurePolicy.trainer.fatalExitCodes=[256]",
        "activeDeadlineSeconds=2147483648",
        "scheduling.sharedMemory=''",
    ],
)
def test_a_value_out_of_bounds_is_refused_at_its_path(override: str) -> None:
    path = override.partition("=")[0]
    (error,) = validate(apply_overrides(SMALLEST, [f"spec.{override}"]))
    assert error.path.partition("[")[0] == f"spec.{path}"


def test_blocks_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Metadata(name="a").name = "b"


def test_job_module_exports_every_type_of_the_manifest() -> None:
    exported = {name for name in job_module.__all__ if isinstance(getattr(job_module, name), type)}
    assert exported == {block.__name__ for block in blocks(AsyncRLJob)}


def test_live_fields_are_those_marked_live() -> None:
    live, rest = split_live(parse_job(SMALLEST).spec)
    assert live["training"] == {"maxSteps": 200}
    assert live["sampling"] == {
        "maxNewTokens": 1024,
        "temperature": 1.0,
        "filter": "None",
        "maxDiscardsInARow": 1000,
    }
    assert live["staleness"] == DEFAULTS["spec"]["staleness"]
    assert "model" not in live and "evaluation" not in live
    assert "maxSteps" not in rest["training"] and "staleness" not in rest
    assert parse_spec(merge(rest, live)) == parse_spec(DEFAULTS["spec"])


def test_live_values_replace_live_fields_and_no_others() -> None:
    spec = parse_job(SMALLEST).spec
    values = live_values(spec)
    assert with_live_values(spec, values) == spec
    values |= {"training": {"maxSteps": 300}}
    assert with_live_values(spec, values).training.max_steps == 300
    with pytest.raises(SpecError, match="only fields marked L may change"):
        with_live_values(spec, merge(values, {"training": {"batchSize": 3, "minibatches": 1}}))


def test_of_an_evaluation_only_how_often_it_is_made_changes_live() -> None:
    evaluation = {"source": "reasoning-gym://chain_sum", "samples": 7}
    spec = parse_spec(merge(DEFAULTS["spec"], {"evaluation": evaluation}))
    values = live_values(spec)
    assert values["evaluation"] == {"everySteps": 20}
    changed = with_live_values(spec, merge(values, {"evaluation": {"everySteps": 3}})).evaluation
    assert changed is not None and (changed.every_steps, changed.samples) == (3, 7)
    with pytest.raises(SpecError, match=r"spec\.evaluation\.samples"):
        with_live_values(spec, merge(values, {"evaluation": {"samples": 8}}))


def test_live_values_of_a_block_that_comes_with_the_next_attempt_do_not_keep_the_others_out() -> None:
    spec = parse_job(SMALLEST).spec
    later = {"evaluation": {"everySteps": 3}, "gpuBudget": {"split": {"rollout": 2}}}
    changed = with_live_values(spec, merge(live_values(spec), {**later, "training": {"maxSteps": 300}}))
    assert changed.evaluation is None and changed.gpu_budget.split is None
    assert changed.training.max_steps == 300


def test_merge_goes_into_maps_and_replaces_all_else() -> None:
    under = {"a": {"b": 1, "c": [1]}, "d": 1}
    assert merge(under, {"a": {"c": [2]}, "d": {"e": 1}}) == {"a": {"b": 1, "c": [2]}, "d": {"e": 1}}
    assert under == {"a": {"b": 1, "c": [1]}, "d": 1}


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("80Gi", 80 * 2**30),
        ("1.5G", 1_500_000_000),
        ("0.5Ki", 512),
        ("7", 7),
        ("1k", 1000),
        ("1.0001k", 1001),
        ("2Pi", 2**51),
    ],
)
def test_quantities_are_bytes(text: str, num_bytes: int) -> None:
    assert parse_quantity(text) == num_bytes


@pytest.mark.parametrize("text", ["", "80GB", "-1Gi", "80 Gi", "1e9", "Gi", "80Gi\n", ".5Gi"])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a quantity"):
        parse_quantity(text)


@given(st.integers(0, 10**6), st.sampled_from(["Ki", "Mi", "Gi", "Ti"]))
def test_a_larger_unit_is_1024_smaller_ones(number: int, unit: str) -> None:
    smaller = {"Ki": "", "Mi": "Ki", "Gi": "Mi", "Ti": "Gi"}[unit]
    assert parse_quantity(f"{number}{unit}") == parse_quantity(f"{number * 1024}{smaller}")
