"""What a pass sees of the caches."""

import json
from typing import Any

import pytest

from asyncrl_operator.api_server.informer import Entry
from asyncrl_operator.api_server.kept_fields import KeptPod
from asyncrl_operator.api_server.observe import Child, observe, outlived_configs
from asyncrl_operator.decide.desired import DesiredTrainer
from asyncrl_operator.decide.edits import current_templates, rollout_hash, trainer_edit
from asyncrl_operator.decide.observed import Observed, Pod, StatefulSet, TrainerJob
from asyncrl_operator.render.manifests import render_rollout, render_trainer
from asyncrl_operator.resources import CONFIG_MAPS, JOBS, STATEFUL_SETS, Resource
from asyncrl_operator.workqueue import Key
from support.manifests.rendered_jobs import DEFAULTS, job_of

KEY, UID = Key("ns", "gsm8k"), "u1"


def child(resource: Resource, name: str, owner: str = UID, **content: Any) -> Child:
    labels = content.pop("labels", {})
    value = json.dumps({"metadata": {"name": name, "labels": labels}, **content}).encode()
    return Child(resource, Entry("ns", name, f"uid-{name}", 1, "gsm8k", owner, False, value))


def pod(name: str, job_uid: str = UID, **fields: Any) -> Entry[KeptPod]:
    kept = KeptPod(job_uid, Pod(name, f"uid-{name}", "rollout", **fields))
    return Entry("ns", name, f"uid-{name}", 1, "gsm8k", "set", False, kept)


def test_a_pass_sees_its_own_children_and_the_pods_of_an_earlier_job_of_its_name() -> None:
    failed = [{"type": "FailureTarget", "status": "True", "reason": "x", "message": "exit code 3"}]
    children = [
        child(JOBS, "gsm8k-trainer-2", labels={"asyncrl.dev/attempt": "2"}, conditions=failed),
        child(JOBS, "gsm8k-trainer-9", owner="u0", labels={"asyncrl.dev/attempt": "9"}),
        child(STATEFUL_SETS, "gsm8k-rollout", labels={"asyncrl.dev/template": "t"}, spec={"replicas": 4}),
        child(STATEFUL_SETS, "gsm8k-nats", owner="u0", spec={"replicas": 1}),
    ]
    seen = observe(KEY, UID, children, [pod("a"), pod("b", job_uid="u0")], None)
    assert seen.trainer_jobs == (TrainerJob("gsm8k-trainer-2", 2, is_failed=True, message="exit code 3"),)
    assert seen.rollout == StatefulSet("gsm8k-rollout", 4, "t") and seen.messaging is None
    assert [(each.name, each.is_ours) for each in seen.pods] == [("a", True), ("b", False)]
    assert seen.has_children and seen.nodes is None


def test_a_report_that_is_not_understood_is_as_good_as_none() -> None:
    text = '{"attempt": 1, "step": 4, "maxSteps": 9, "state": "Training"}'
    good = child(CONFIG_MAPS, "gsm8k-report", data={"report": text})
    report = observe(KEY, UID, [good], [], None).report
    assert report is not None and report.step == 4
    bad = child(CONFIG_MAPS, "gsm8k-report", data={"report": "{}"})
    assert observe(KEY, UID, [bad], [], None).report is None
    foreign = child(CONFIG_MAPS, "gsm8k-report", owner="u0", data={"report": text})
    assert observe(KEY, UID, [foreign], [], None).report is None


def test_a_pass_knows_with_which_spec_each_attempt_and_template_began(
    caplog: pytest.LogCaptureFixture,
) -> None:
    job = job_of("everything")
    manifests = render_trainer(job, DEFAULTS, DesiredTrainer(3, 2)) + render_rollout(job, DEFAULTS, 2, 1)
    children = [
        child(CONFIG_MAPS, each["metadata"]["name"], data=each["data"])
        for each in manifests
        if each["kind"] == "ConfigMap"
    ]
    earlier = {"config.json": '{"spec": {"fieldOfAnotherVersion": 1}, "broker": "x"}'}
    children += [
        child(CONFIG_MAPS, "gsm8k-config-2", data=earlier),
        child(CONFIG_MAPS, "gsm8k-config-1", owner="u0", data=earlier),
        child(CONFIG_MAPS, "gsm8k-live", data={"live.json": "{}"}),
    ]
    seen = observe(KEY, UID, children, [], None)
    assert seen.attempts_began[2] == {"fieldOfAnotherVersion": 1} and set(seen.attempts_began) == {2, 3}
    assert trainer_edit(job.spec, seen.attempts_began[3], "") == ""
    assert list(seen.templates_began) == [rollout_hash(job.spec)]
    assert current_templates(job.spec, {"x": seen.templates_began[rollout_hash(job.spec)]}) > {"x"}
    assert not caplog.records
    for data in ({}, {"config.json": "["}, {"config.json": "[]"}, {"config.json": '{"spec": null}'}):
        broken = [child(CONFIG_MAPS, "gsm8k-config-3", data=data), child(CONFIG_MAPS, "gsm8k-config-x")]
        assert observe(KEY, UID, broken, [], None).attempts_began == {}
    assert "ConfigMap gsm8k-config-3 is not understood" in caplog.text


def test_a_configuration_goes_when_nothing_will_read_it() -> None:
    names = [
        "config-1",
        "config-2",
        "config-3",
        "rollout-old",
        "rollout-gone",
        "rollout-set",
        "rollout-new",
        "live",
    ]
    children = [child(CONFIG_MAPS, f"gsm8k-{name}") for name in names]
    children.append(child(CONFIG_MAPS, "gsm8k-config-0", owner="u0"))
    seen = Observed(
        trainer_jobs=(TrainerJob("gsm8k-trainer-2", 2),),
        rollout=StatefulSet("gsm8k-rollout", 2, "set"),
        pods=(
            Pod("a", "1", "rollout", template="old"),
            Pod("b", "2", "rollout", template="gone", phase="Failed"),
            Pod("c", "3", "rollout", template="gone", is_ours=False),
        ),
    )
    found = outlived_configs(KEY, UID, children, seen, attempt=3, template="new")
    assert [entry.name for entry in found] == ["gsm8k-config-1", "gsm8k-rollout-gone"]
