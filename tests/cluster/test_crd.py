"""The CRD as a real API server takes it: defaults, rules, columns, and what kubectl does with it."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from asyncrl_api.job import AsyncRLJob, to_manifest
from asyncrl_api.manifests import apply_overrides, load_documents, parse_job
from asyncrl_api.rules import all_rules, violations
from asyncrl_api.status import Status
from kube_fixture import Cluster
from rule_cases import BASE, CASES, Case
from status_samples import full_status

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))


class Server:
    """Jobs of one namespace over one connection: quicker than a kubectl for each."""

    def __init__(self, proxy: str, namespace: str) -> None:
        self._http = httpx.Client(base_url=proxy, timeout=30, trust_env=False)
        self.path = f"/apis/asyncrl.dev/v1alpha1/namespaces/{namespace}/asyncrljobs"

    def create(self, manifest: dict[str, Any], *, is_dry_run: bool = True) -> httpx.Response:
        query = {"fieldValidation": "Strict"} | ({"dryRun": "All"} if is_dry_run else {})
        return self._http.post(self.path, params=query, json=manifest)

    def update(self, manifest: dict[str, Any], *, is_dry_run: bool = True) -> httpx.Response:
        name = manifest["metadata"]["name"]
        return self._http.put(
            f"{self.path}/{name}", params={"dryRun": "All"} if is_dry_run else {}, json=manifest
        )

    def get(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._http.get(f"{self.path}/{name}").json()
        return found

    def put_status(self, manifest: dict[str, Any]) -> httpx.Response:
        return self._http.put(f"{self.path}/{manifest['metadata']['name']}/status", json=manifest)


@pytest.fixture(scope="module")
def proxy(cluster: Cluster) -> Iterator[str]:
    with cluster.proxy() as url:
        yield url


@pytest.fixture
def server(proxy: str, namespace: str) -> Server:
    return Server(proxy, namespace)


def causes(response: httpx.Response) -> list[str]:
    assert response.status_code == 422, response.text
    return [each["message"] for each in response.json()["details"]["causes"]]


def says(response: httpx.Response, message: str) -> bool:
    return any(message in cause for cause in causes(response))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_api_server_and_validate_agree_on_each_rule(server: Server, case: Case) -> None:
    accepted = server.create(apply_overrides(BASE, case.accepted))
    assert accepted.status_code == 201, accepted.text
    refused = server.create(apply_overrides(BASE, case.refused))
    assert says(refused, case.message), refused.text


def test_every_rule_is_tried() -> None:
    """The cases refuse by each rule that is no transition; transitions are tried field by field below."""
    tried = set()
    for case in CASES.values():
        manifest = to_manifest(_parsed(case.refused))
        tried |= {message for _, message in violations(manifest)}
    untried = [
        rule
        for rule in all_rules()
        if not rule.is_transition and not any(_is_made_by(rule.message_expression, each) for each in tried)
    ]
    assert untried == []


def _parsed(overrides: list[str]) -> Any:
    return AsyncRLJob.model_validate(apply_overrides(BASE, overrides))


def _is_made_by(expression: str, message: str) -> bool:
    """Whether a message is of an expression: all its words between the inserted values are there."""
    template = re.split(r"'\.format\(", expression)[0].strip("'")
    parts = [re.escape(part) for part in re.split(r"%[sd]", template)]
    return re.fullmatch(".*".join(parts), message) is not None


TRANSITIONS = {
    "spec.model": "spec.model.contextLength=4096",
    "spec.dataset": "spec.dataset.parameters={size: 10}",
    "spec.training.seed": "spec.training.seed=2",
    "spec.gpuBudget.resourceName": "spec.gpuBudget.resourceName=amd.com/gpu",
    "spec.gpuBudget.gpuMemory": "spec.gpuBudget.gpuMemory=80Gi",
    "spec.gpuBudget.allocation": "spec.gpuBudget.allocation=None",
    "spec.rollout.gpusPerReplica": "spec.rollout.gpusPerReplica=1",
    "spec.messaging": "spec.messaging.embedded.storage.size=20Gi",
    "spec.checkpoint.location": "spec.checkpoint.location.path=other",
    "spec.checkpoint.resume": "spec.checkpoint.resume=Never",
    "spec.checkpoint.resumePath": "spec.checkpoint.resumePath=x",
    "spec.scheduling.nodeSelector": "spec.scheduling.nodeSelector={pool: gpu}",
    "spec.scheduling.tolerations": "spec.scheduling.tolerations=[{key: gpu, operator: Exists}]",
    "spec.scheduling.affinity": "spec.scheduling.affinity={nodeAffinity: {}}",
    "spec.scheduling.topologyKey": "spec.scheduling.topologyKey=rack",
    "spec.scheduling.network": "spec.scheduling.network.mode=Host",
    "spec.scheduling.sharedMemory": "spec.scheduling.sharedMemory=32Gi",
    "spec.scheduling.serviceAccountName": "spec.scheduling.serviceAccountName=me",
    "spec.scheduling.imagePullSecrets": "spec.scheduling.imagePullSecrets=[{name: registry}]",
    "spec.scheduling.priorityClassName": "spec.scheduling.priorityClassName=high",
    "spec.training.maxSteps": "spec.training.maxSteps=199",
}
ONE_VALUE = {"spec.trainer.backend", "spec.scheduling.startOrder"}
"""Their type has no other value to change to."""
REFUSED_ANYWAY = {"spec.managedBy", "spec.scheduling.queueName", "spec.scheduling.gang"}
"""Nothing acts on them yet, so no value but the default is accepted at all."""


def test_every_transition_is_tried() -> None:
    paths = {f"{rule.path}{rule.field_path}" for rule in all_rules() if rule.is_transition}
    assert paths == TRANSITIONS.keys() | ONE_VALUE | REFUSED_ANYWAY


def test_what_is_immutable_is_refused_with_the_message_of_validate(server: Server) -> None:
    created = server.create(BASE, is_dry_run=False).json()
    old = to_manifest(parse_job(BASE))
    for path, override in TRANSITIONS.items():
        changed = apply_overrides(created, [override])
        ours = [
            message
            for _, message in violations(to_manifest(parse_job(apply_overrides(BASE, [override]))), old)
        ]
        assert ours, path
        response = server.update(changed)
        for message in ours:
            assert says(response, message), (path, response.text)


def test_placement_may_change_in_the_update_that_suspends_or_resumes(server: Server) -> None:
    created = server.create(BASE, is_dry_run=False).json()
    moved = apply_overrides(created, ["spec.suspend=true", "spec.scheduling.nodeSelector={pool: gpu}"])
    suspended = server.update(moved, is_dry_run=False)
    assert suspended.status_code == 200, suspended.text
    back = apply_overrides(suspended.json(), ["spec.suspend=false", "spec.scheduling.nodeSelector={}"])
    assert server.update(back).status_code == 200


def test_an_immutable_field_can_neither_appear_nor_vanish(server: Server) -> None:
    created = server.create(BASE, is_dry_run=False).json()
    appeared = apply_overrides(created, ["spec.model.secretRef.name=hub"])
    assert says(server.update(appeared), "model is immutable")


def test_unknown_fields_are_refused_and_numbers_stay_as_written(server: Server) -> None:
    unknown = server.create(apply_overrides(BASE, ["spec.training.batchsize=3"]))
    assert unknown.status_code == 400 and "batchsize" in unknown.text
    text = server.create(apply_overrides(BASE, ['spec.training.batchSize="64"']))
    assert text.status_code == 422
    created = server.create(apply_overrides(BASE, ["spec.training.learningRate=1e-6"]))
    assert created.json()["spec"]["training"]["learningRate"] == 1e-6


def test_defaults_are_those_of_the_types(server: Server) -> None:
    created = server.create(BASE).json()
    assert created["spec"] == to_manifest(parse_job(BASE))["spec"]
    assert created["status"] == {"observedGeneration": -1}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_accepted(server: Server, path: Path) -> None:
    jobs = [each for each in load_documents(path) if each.get("kind") == "AsyncRLJob"]
    for job in jobs:
        job = copy.deepcopy(job)
        job["metadata"].pop("namespace", None)
        answer = server.create(job)
        assert answer.status_code == 201, answer.text


def test_a_status_with_everything_in_it_is_kept_and_is_no_new_generation(server: Server) -> None:
    created = server.create(BASE, is_dry_run=False).json()
    status = full_status()
    assert set(status.to_json()) == {info.alias for info in Status.model_fields.values()}
    written = server.put_status({**created, "status": status.to_json()})
    assert written.status_code == 200, written.text
    now = server.get("gsm8k")
    assert now["metadata"]["generation"] == 1
    assert Status.model_validate(now["status"]) == status


@pytest.mark.parametrize("how", [["apply"], ["apply", "--server-side"]], ids=" ".join)
def test_applied_again_nothing_differs(cluster: Cluster, namespace: str, how: list[str]) -> None:
    for _ in range(3):
        cluster.kubectl("-n", namespace, *how, "-f", str(ROOT / "examples" / "quickstart.yaml"))
    assert cluster.get(namespace, "arl", "quickstart")["metadata"]["generation"] == 1
    cluster.kubectl("-n", namespace, "diff", "-f", str(ROOT / "examples" / "quickstart.yaml"))


def test_kubectl_explains_scales_and_lists(cluster: Cluster, namespace: str) -> None:
    assert "[L] Steps until the job is complete" in cluster.kubectl("explain", "arl.spec.training.maxSteps")
    manifest = {**apply_overrides(BASE, []), "kind": "AsyncRLJob"}
    cluster.apply(manifest, namespace=namespace)
    cluster.kubectl("-n", namespace, "scale", "arl/gsm8k", "--replicas=24")
    assert cluster.get(namespace, "arl", "gsm8k")["spec"]["gpuBudget"]["total"] == 24
    refused = cluster.run("kubectl", "-n", namespace, "scale", "arl/gsm8k", "--replicas=1")
    assert refused.returncode == 1 and "gpuBudget.total is 1, but must be at least" in refused.stderr
    status = json.dumps({"status": full_status().to_json()})
    cluster.kubectl(
        "-n", namespace, "patch", "arl", "gsm8k", "--subresource=status", "--type=merge", "-p", status
    )
    head, line = cluster.kubectl("-n", namespace, "get", "asyncrl").splitlines()
    assert head.split() == [
        "NAME",
        "PHASE",
        "STEP",
        "TRAINER",
        "ROLLOUT",
        "GPUS",
        "STALENESS",
        "REWARD",
        "AGE",
    ]
    assert line.split()[:8] == ["gsm8k", "Running", "410/2000", "1/1", "7/8", "16/16", "3", "0.412"]
    wide = cluster.kubectl("-n", namespace, "get", "arl", "-o", "wide").splitlines()[0]
    assert wide.split()[-3:] == ["ATTEMPT", "CHECKPOINT", "MESSAGE"]
