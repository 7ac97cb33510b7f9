"""The CRD on a real API server says the same as `asyncrl validate` about every field, rule and edit."""

import copy
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from asyncrl_api.crdgen import PLURAL
from asyncrl_api.job import API_VERSION, Spec, to_manifest
from asyncrl_api.job_status import Status
from asyncrl_api.marks import tree
from asyncrl_api.parsing import apply_overrides, load_documents, parse_job, validate
from asyncrl_api.rules import all_rules, violations
from support.cluster.control_plane import Cluster, making_namespace
from support.cluster.status_samples import full_status
from support.manifests.rule_cases import BASE, CASES, Case

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))


class Server:
    """Jobs of one namespace over one connection: quicker than a kubectl for each."""

    def __init__(self, proxy: str, namespace: str) -> None:
        self._http = httpx.Client(base_url=proxy, timeout=30, trust_env=False)
        self._path = f"/apis/{API_VERSION}/namespaces/{namespace}/{PLURAL}"

    def judge(self, manifest: dict[str, Any]) -> httpx.Response:
        """Return what the server says about a new job, without creating it."""
        query = {"fieldValidation": "Strict", "dryRun": "All"}
        return self._http.post(self._path, params=query, json=manifest)

    def create(self, *overrides: str) -> dict[str, Any]:
        """Make a job of a name of its own, and return it."""
        named = apply_overrides(BASE, [f"metadata.name=j{uuid.uuid4().hex[:8]}", *overrides])
        return _ok(self._http.post(self._path, json=named))

    def judge_update(self, manifest: dict[str, Any]) -> httpx.Response:
        return self._http.put(self._of(manifest), params={"dryRun": "All"}, json=manifest)

    def update(self, manifest: dict[str, Any]) -> dict[str, Any]:
        return _ok(self._http.put(self._of(manifest), json=manifest))

    def update_status(self, manifest: dict[str, Any]) -> dict[str, Any]:
        return _ok(self._http.put(f"{self._of(manifest)}/status", json=manifest))

    def scale(self, manifest: dict[str, Any]) -> dict[str, Any]:
        return _ok(self._http.get(f"{self._of(manifest)}/scale"))

    def _of(self, manifest: dict[str, Any]) -> str:
        return f"{self._path}/{manifest['metadata']['name']}"


def _ok(response: httpx.Response) -> dict[str, Any]:
    assert response.is_success, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.fixture(scope="module")
def server(cluster: Cluster) -> Iterator[Server]:
    """One namespace for all: most tests make nothing, and each job that is made has a name of its own."""
    with cluster.proxy() as url, making_namespace(cluster) as name:
        yield Server(url, name)


def refusals(response: httpx.Response) -> list[tuple[str, str]]:
    """Return the field and the words of each thing that is refused."""
    assert response.status_code == 422, response.text
    return [(each["field"], each["message"]) for each in response.json()["details"]["causes"]]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_both_evaluators_agree_on_a_rule(server: Server, case: Case) -> None:
    accepted = apply_overrides(BASE, case.accepted)
    assert _ok(server.judge(accepted))["spec"] == to_manifest(parse_job(accepted))["spec"]
    found = refusals(server.judge(apply_overrides(BASE, case.refused)))
    # The root is where the rule about the name sits: a rule can name fields of spec and status alone.
    field = "<nil>" if case.path == "metadata.name" else case.path
    assert (field, f"Invalid value: {case.message}") in found
    # A name that no object may have is refused once more, by the server's own rule.
    assert [each for each, _ in found if each != "metadata.name"] == [field]


VALUES = [-1, 0, 2**31, 0.5, 1e300, "", "Nonsense", "x" * 300, "x" * 20_000, "10Gi\n", True]
VALUES += [[], ["a"] * 100, ["a"] * 300, [1, 1], [{}], [{"name": f"s{i}"} for i in range(20)], {}, {"x": 1}]


@pytest.mark.parametrize("block", tree(Spec, "spec."), ids=lambda block: block.name)
def test_the_schema_takes_what_the_types_take(server: Server, block: Any) -> None:
    for node in block.walk():
        for value in VALUES:
            manifest = with_value(node.path, value)
            ours, theirs = validate(manifest), server.judge(manifest)
            assert (ours == []) == theirs.is_success, (node.path, value, ours, theirs.text)


def with_value(path: str, value: Any) -> dict[str, Any]:
    manifest = here = copy.deepcopy(BASE)
    *above, name = path.split(".")
    for each in above:
        here = here.setdefault(each, {})
    here[name] = value
    return manifest


TRANSITIONS = {
    "spec.model": "spec.model.contextLength=4096",
    "spec.dataset": "spec.dataset.parameters={size: 10}",
    "spec.training.seed": "spec.training.seed=2",
    "spec.training.lora": "spec.training.lora.rank=8",
    "spec.emulation": "spec.emulation.speedup=2",
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
    "spec.trainer.deepspeed.zeroStage": "spec.trainer.deepspeed.zeroStage=3",
    "spec.training.maxSteps": "spec.training.maxSteps=199",
    "spec.weightSync.mode": "spec.weightSync.mode=Staged",
    "spec.weightSync.stagingMegabytes": "spec.weightSync.stagingMegabytes=100",
}
ONE_VALUE = {"spec.trainer.backend", "spec.scheduling.startOrder"}
"""Their type has no other value to change to."""
REFUSED_ANYWAY = {"spec.managedBy", "spec.scheduling.queueName", "spec.scheduling.gang"}
"""Nothing acts on them yet, so no value but the default is accepted at all."""


def test_every_transition_is_tried() -> None:
    paths = {f"{rule.path}{rule.field_path}" for rule in all_rules() if rule.is_transition}
    assert paths == TRANSITIONS.keys() | ONE_VALUE | REFUSED_ANYWAY


def test_an_edit_is_refused_in_the_words_of_validate(server: Server) -> None:
    sized = "spec.weightSync.stagingMegabytes=1000"  # without which no mode but Direct is one
    base, created = apply_overrides(BASE, [sized]), server.create(sized)
    old = to_manifest(parse_job(base))
    for path, override in TRANSITIONS.items():
        new = to_manifest(parse_job(apply_overrides(base, [override])))
        ((our_field, ours),) = violations(new, old)
        ((their_field, theirs),) = refusals(server.judge_update(apply_overrides(created, [override])))
        assert our_field == their_field == path
        assert theirs.endswith(f": {ours}"), theirs  # after "Invalid value", and the value of a scalar


@pytest.mark.parametrize(
    "edit", ["sampling.temperature=0.7", "reward.maxAttempts=5", "training.batchSize=32"]
)
def test_fields_that_are_not_immutable_may_change(server: Server, edit: str) -> None:
    edited = apply_overrides(server.create(), [f"spec.{edit}"])
    assert server.update(edited)["metadata"]["generation"] == 2


def test_placement_may_change_in_the_update_that_suspends_or_resumes(server: Server) -> None:
    moved = ["spec.suspend=true", "spec.scheduling.nodeSelector={pool: gpu}"]
    suspended = server.update(apply_overrides(server.create(), moved))
    back = apply_overrides(suspended, ["spec.suspend=false", "spec.scheduling.nodeSelector={}"])
    resumed = server.update(back)
    again = server.judge_update(apply_overrides(resumed, moved[1:]))
    assert [field for field, _ in refusals(again)] == ["spec.scheduling.nodeSelector"]


def test_an_immutable_field_can_neither_appear_nor_vanish(server: Server) -> None:
    secret = "spec.model.secretRef.name=hub"
    appeared = apply_overrides(server.create(), [secret])
    vanished = server.create(secret)
    del vanished["spec"]["model"]["secretRef"]
    for edited in (appeared, vanished):
        assert [field for field, _ in refusals(server.judge_update(edited))] == ["spec.model"]


def test_a_field_that_there_is_not_is_refused(server: Server) -> None:
    answer = server.judge(apply_overrides(BASE, ["spec.training.batchsize=3"]))
    assert answer.status_code == 400
    assert 'unknown field "spec.training.batchsize"' in answer.json()["message"]


def test_numbers_are_kept_and_a_whole_one_is_an_integer(server: Server) -> None:
    created = server.create("spec.training.learningRate=1e-6", "spec.training.maxSteps=3.0")
    training = created["spec"]["training"]
    assert training["learningRate"] == 1e-6
    assert isinstance(training["maxSteps"], int)


def test_a_job_without_a_status_is_not_taken_for_one_that_is_done(server: Server) -> None:
    assert server.create()["status"] == {"observedGeneration": -1}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_accepted(server: Server, path: Path) -> None:
    for job in load_documents(path):
        if job["kind"] == "AsyncRLJob":
            job["metadata"].pop("namespace", None)
            _ok(server.judge(job))


def test_a_status_with_everything_in_it_is_kept_and_is_no_new_generation(server: Server) -> None:
    created = server.create()
    status = full_status()
    assert set(status.to_json()) == {info.alias for info in Status.model_fields.values()}
    written = server.update_status({**created, "status": status.to_json()})
    assert Status.model_validate(written["status"]) == status
    assert written["metadata"]["generation"] == 1
    assert server.scale(created)["status"] == {"replicas": 16, "selector": "asyncrl.dev/job=gsm8k"}
