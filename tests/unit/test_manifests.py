"""What a job is made of: whole objects as golden files, and what must hold of every one of them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from asyncrl_api.marks import merge
from asyncrl_api.parsing import SpecError, parse_job
from asyncrl_api.run_config import RunConfig
from asyncrl_operator.decide.desired import DesiredTrainer
from asyncrl_operator.layout import plan
from asyncrl_operator.local.local_run import LocalPlaces
from asyncrl_operator.render.manifests import render_credentials, render_rollout, render_trainer
from asyncrl_operator.render.messaging import worker_permissions
from support.manifests.rendered_jobs import BASE, DEFAULTS, SHAPES, job_of, render_all

GOLDEN = Path(__file__).parent / "golden"
"""Written again by ASYNCRL_WRITE_GOLDEN=1 pytest tests/unit/test_manifests.py; read the difference."""


def dump(objects: list[dict[str, Any]], path: Path) -> None:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    with path.open("w") as file:
        yaml.dump_all(sorted(objects, key=lambda each: (each["kind"], each["metadata"]["name"])), file)


@pytest.mark.parametrize("shape", SHAPES)
def test_objects_are_as_before(shape: str, tmp_path: Path) -> None:
    golden = GOLDEN / f"{shape}.yaml"
    path = golden if os.environ.get("ASYNCRL_WRITE_GOLDEN") else tmp_path / "now.yaml"
    dump(render_all(job_of(shape)), path)
    assert path.read_text() == golden.read_text()


def pods(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each["spec"]["template"] for each in objects if each["kind"] in ("Job", "StatefulSet")]


@pytest.mark.parametrize("shape", SHAPES)
def test_what_holds_of_every_object_and_pod(shape: str) -> None:
    job = job_of(shape)
    objects = render_all(job)
    assert len({(each["kind"], each["metadata"]["name"]) for each in objects}) == len(objects)
    for each in objects:
        (owner,) = each["metadata"]["ownerReferences"]
        assert owner["uid"] == job.metadata.uid and owner["controller"] and owner["blockOwnerDeletion"]
        assert each["metadata"]["labels"]["asyncrl.dev/job"] == "gsm8k"
    for pod in pods(objects):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] and pod["metadata"]["annotations"]["asyncrl.dev/gpus"]
        is_trainer = pod["metadata"]["labels"]["asyncrl.dev/group"] == "trainer"
        assert spec["automountServiceAccountToken"] is is_trainer
        leaves = {each["key"]: each.get("tolerationSeconds") for each in spec["tolerations"]}
        assert leaves["node.kubernetes.io/unreachable"] == leaves["node.kubernetes.io/not-ready"] == 30
        mounted = {mount["name"] for each in spec["containers"] for mount in each["volumeMounts"]}
        claims = {"store"}  # of the StatefulSet, where it is persistent
        assert mounted - claims == {each["name"] for each in spec["volumes"]} - claims


def test_commands_are_those_of_one_machine() -> None:
    """Except for paths and addresses, they are the same programs with the same options in the same order."""
    job = job_of("cpu")
    local = plan(job, LocalPlaces("config.json", "nats.conf", {}), attempt=3)
    words = {each.name.rpartition("-")[2]: each.command for each in local.processes}
    for pod in pods(render_all(job)):
        for container in pod["spec"]["containers"]:
            here = words[container["name"]]
            assert [w for w in container["command"] if w.startswith("-")] == [
                w for w in here if w.startswith("-")
            ]
            assert container["command"][:2] == list(here[:2])


def test_a_trainer_on_two_nodes_finds_its_first_pod_and_knows_its_place() -> None:
    _, job = render_trainer(job_of("two-nodes"), DEFAULTS, DesiredTrainer(3, 16))
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (2, 2)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    command = " ".join(container["command"])
    assert (
        "--ranks 8 --node $(JOB_COMPLETION_INDEX) --nodes 2 --host gsm8k-trainer-3-0.gsm8k-trainer" in command
    )
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}


def overlaid(**template: Any) -> list[dict[str, Any]]:
    job = parse_job(merge(BASE, {"spec": {"rollout": {"podTemplate": template}}}))
    return render_rollout(job, DEFAULTS, 1, 1)


@pytest.mark.parametrize(
    ("template", "path"),
    [
        (
            {"spec": {"containers": [{"name": "engine", "command": ["sh"]}]}},
            "spec.containers[engine].command",
        ),
        ({"spec": {"containers": [{"name": "worker", "image": "x"}]}}, "spec.containers[worker].image"),
        (
            {"spec": {"containers": [{"name": "worker", "env": [{"name": "POD_NAME", "value": "x"}]}]}},
            "POD_NAME",
        ),
        (
            {"spec": {"containers": [{"name": "engine", "resources": {"limits": {"nvidia.com/gpu": "4"}}}]}},
            "resources.limits.nvidia.com/gpu",
        ),
        ({"spec": {"volumes": [{"name": "shm", "emptyDir": {}}]}}, "spec.volumes[shm]"),
        ({"spec": {"restartPolicy": "Never"}}, "spec.restartPolicy"),
        ({"metadata": {"labels": {"asyncrl.dev/job": "other"}}}, "metadata.labels.asyncrl.dev/job"),
        ({"metadata": {"labels": {"kueue.x-k8s.io/queue-name": "q"}}}, "kueue.x-k8s.io/queue-name"),
        ({"metadata": {"labels": {"app.kubernetes.io/name": "q"}}}, "app.kubernetes.io/name"),
        ({"metadata": {"annotations": {"asyncrl.dev/gpus": "0"}}}, "metadata.annotations.asyncrl.dev/gpus"),
        ({"metadata": {"name": "other"}}, "metadata.name"),
        ({"metadata": {"namespace": "other"}}, "metadata.namespace"),
        ({"spec": {"subdomain": "other"}}, "spec.subdomain"),
        ({"spec": {"hostname": "other"}}, "spec.hostname"),
        ({"spec": {"setHostnameAsFQDN": True}}, "spec.setHostnameAsFQDN"),
        ({"spec": {"terminationGracePeriodSeconds": 1}}, "spec.terminationGracePeriodSeconds"),
        ({"spec": {"serviceAccountName": "other"}}, "spec.serviceAccountName"),
        ({"spec": {"automountServiceAccountToken": True}}, "spec.automountServiceAccountToken"),
        ({"spec": {"containers": [{"name": "engine", "args": ["x"]}]}}, "spec.containers[engine].args"),
    ],
)
def test_what_is_the_operators_cannot_be_overlaid(template: dict[str, Any], path: str) -> None:
    with pytest.raises(SpecError) as caught:
        overlaid(**template)
    assert path in str(caught.value) and "spec.rollout.podTemplate." in str(caught.value)


def test_an_overlay_adds_and_merges() -> None:
    sidecar = {"name": "logger", "image": "fluent:1", "command": ["fluent"]}
    _, group = overlaid(
        metadata={"labels": {"team": "a"}},
        spec={
            "containers": [
                {
                    "name": "engine",
                    "env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
                    "resources": {"limits": {"memory": "64Gi"}},
                },
                sidecar,
            ],
            "volumes": [{"name": "logs", "emptyDir": {}}],
            "tolerations": [{"key": "spot", "operator": "Exists"}],
        },
    )
    pod = group["spec"]["template"]
    engine, worker, logger = pod["spec"]["containers"]
    assert {"name": "NCCL_DEBUG", "value": "INFO"} in engine["env"] and len(engine["env"]) > 1
    assert engine["resources"]["limits"] == {"nvidia.com/gpu": "1", "memory": "64Gi"}
    assert (worker["name"], logger) == ("worker", sidecar)
    assert pod["metadata"]["labels"]["team"] == "a" and len(pod["spec"]["tolerations"]) == 3


@pytest.mark.parametrize(
    ("containers", "message"),
    [
        ([{"env": []}], "containers[0]: must be a map with name: entries are merged by it"),
        (["engine"], "containers[0]: must be a map with name"),
        ([{"name": {"a": "b"}}], "containers[0]: must be a map with name"),
        (
            [{"name": "engine", "tty": True}, {"name": "engine"}],
            "containers[1].name: engine appears twice",
        ),
        (
            [{"name": "engine", "env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}],
            "containers[engine].env[1].name: A appears twice",
        ),
    ],
)
def test_a_list_that_cannot_be_merged_is_refused_and_not_guessed(containers: list[Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        overlaid(spec={"containers": containers})
    assert f"spec.rollout.podTemplate.spec.{message}" in str(caught.value)


def test_an_overlay_adds_secrets_to_those_of_the_spec() -> None:
    more = {"secretRef": {"name": "tracking"}}
    spec: dict[str, Any] = {
        "model": {"secretRef": {"name": "hub"}},
        "dataset": {"secretRef": {"name": "data"}},
        "trainer": {"podTemplate": {"spec": {"containers": [{"name": "trainer", "envFrom": [more]}]}}},
    }
    _, job = render_trainer(parse_job(merge(BASE, {"spec": spec})), DEFAULTS, DesiredTrainer(1, 2))
    (trainer,) = job["spec"]["template"]["spec"]["containers"]
    assert [each["secretRef"]["name"] for each in trainer["envFrom"]] == ["hub", "data", "tracking"]
    _, group = render_rollout(parse_job(merge(BASE, {"spec": spec})), DEFAULTS, 1, 1)
    for container in group["spec"]["template"]["spec"]["containers"]:
        assert [each["secretRef"]["name"] for each in container["envFrom"]] == ["hub"], (
            "data are the trainer's"
        )


def test_no_final_exit_codes_make_no_rule_of_them() -> None:
    """The API server refuses a rule with an empty list."""
    spec: dict[str, Any] = {"failurePolicy": {"trainer": {"fatalExitCodes": []}}}
    _, job = render_trainer(parse_job(merge(BASE, {"spec": spec})), DEFAULTS, DesiredTrainer(1, 2))
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert "onPodConditions" in rule


def test_a_worker_is_given_its_own_password_and_no_other() -> None:
    """It also gets the rights to this job's names, which are those of its run configuration."""
    secrets = iter(["t-secret", "w-secret"])
    job = job_of("cpu")
    secret = render_credentials(job, lambda: next(secrets))["stringData"]
    assert json.loads(secret["worker.json"]) == {"user": "worker", "password": "w-secret"}
    assert json.loads(secret["trainer.json"]) == {"user": "trainer", "password": "t-secret"}
    config, group = render_rollout(job, DEFAULTS, 1, 1)
    volumes = {each["name"]: each for each in group["spec"]["template"]["spec"]["volumes"]}
    assert [item["key"] for item in volumes["credentials"]["secret"]["items"]] == ["worker.json"]
    names = RunConfig.model_validate_json(config["data"]["config.json"]).names
    _, worker = json.loads(secret["nats.conf"])["authorization"]["users"]
    assert worker["permissions"] == worker_permissions(names)
