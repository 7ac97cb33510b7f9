"""The parsers of operator and command line: what a case does to each, and the real objects it begins as."""

import json
from pathlib import Path
from typing import Any

from asyncrl_api.job_status import Status
from asyncrl_api.parsing import SpecError, load_documents, parse_job
from asyncrl_api.report import Report, read_report
from asyncrl_api.structural import status_schema
from asyncrl_operator.api_server.informer import Entry
from asyncrl_operator.api_server.kept_fields import compact, trim_node, trim_pod
from asyncrl_operator.api_server.observe import Child, observe
from asyncrl_operator.decide.observed import Observed
from asyncrl_operator.decide.planner import plan
from asyncrl_operator.decide.status import JobObject, read_status
from asyncrl_operator.local.progress import render_end, render_line
from asyncrl_operator.resources import CONFIG_MAPS, JOBS, Json
from asyncrl_operator.workqueue import Key
from support.cluster.status_samples import full_status
from support.cluster.structural_values import faults
from support.fuzz.target import Target
from support.manifests.smallest import SMALLEST
from support.messages.samples import make_job
from support.paths import EXAMPLES

JOB = JobObject("gsm8k", "u1", 1, make_job().spec)
KEY = Key("ns", "gsm8k")
SCHEMA = status_schema()
NOW = 1_800_000_000.0
ATTEMPT = {
    "number": 1,
    "jobName": "gsm8k-trainer-1",
    "configHash": "x",
    "gpus": 1,
    "startTime": "2026-01-02T03:04:05Z",
}
BEFORE = Status.model_validate({"attempt": ATTEMPT})


def _report(case: bytes) -> None:
    """What an operator does with a report: the status that it makes of it must be one that the CRD takes."""
    report = read_report(case).report
    if report is None:
        return
    status = BEFORE
    for now in (NOW, NOW + 1000):
        status = plan(JOB, status, Observed(report=report), now).status
    assert not list(faults(SCHEMA, status.to_json()))
    render_line(report)
    render_end(report, folder="f", metrics="m")


def _status(case: bytes) -> None:
    status, _ = read_status(json.loads(case))
    after = plan(JOB, status, Observed(), NOW).status
    assert not list(faults(SCHEMA, after.to_json()))


def _kept(trim: Any) -> Any:
    def run(case: bytes) -> None:
        body = json.loads(case)
        if isinstance(body, dict):
            metadata: Json = {"name": "x", "uid": "1", "resourceVersion": "1", "namespace": "n"}
            given = body.get("metadata")
            body["metadata"] = (given if isinstance(given, dict) else {}) | metadata
            kept = trim(body)
            if trim is trim_pod:
                entry = Entry("n", "x", "1", 1, "gsm8k", "u1", False, kept)
                after = plan(JOB, BEFORE, observe(KEY, "u1", [], [entry], None), NOW).status
                assert not list(faults(SCHEMA, after.to_json()))

    return run


def _children(case: bytes) -> None:
    text = case.decode(errors="replace")
    for name in ("gsm8k-report", "gsm8k-config-1", "gsm8k-rollout-x"):
        for data in ({"report": text, "config.json": text}, None):
            value = json.dumps({"metadata": {"name": name}, "data": data}).encode()
            entry = Entry("ns", name, "1", 1, "gsm8k", "u1", False, value)
            observe(KEY, "u1", [Child(CONFIG_MAPS, entry)], [], None)


def _trainer_job(case: bytes) -> None:
    body = json.loads(case)
    if isinstance(body, dict):
        metadata = body.get("metadata")
        body["metadata"] = (metadata if isinstance(metadata, dict) else {}) | {"name": "j", "uid": "1"}
        entry = Entry("ns", "j", "1", 1, "gsm8k", "u1", False, compact(body))
        observe(KEY, "u1", [Child(JOBS, entry)], [], None)


def _manifest(folder: Path) -> Any:
    def run(case: bytes) -> None:
        path = folder / "job.yaml"
        path.write_bytes(case)
        for document in load_documents(path):
            parse_job(document)

    return run


def _document(case: bytes) -> None:
    parse_job(json.loads(case))


POD: Json = {
    "metadata": {
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "deletionTimestamp": "2026-01-01T00:00:00Z",
        "labels": {"asyncrl.dev/group": "trainer", "asyncrl.dev/attempt": "2", "asyncrl.dev/job-uid": "u1"},
        "annotations": {"asyncrl.dev/gpus": "4"},
        "ownerReferences": [{"kind": "Job", "name": "j", "uid": "2", "controller": True}],
    },
    "spec": {"nodeName": "n1"},
    "status": {
        "phase": "Running",
        "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}],
        "containerStatuses": [
            {"name": "t", "state": {"terminated": {"exitCode": 1, "reason": "Error"}}},
            {"name": "u", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no"}}},
        ],
    },
}
REPORT = Report.model_validate(
    {
        "attempt": 1,
        "step": 7,
        "max_steps": 9,
        "state": "Training",
        "message": "m",
        "reward": 0.5,
        "staleness_mean": 0.5,
        "staleness_p95": 1,
        "tokens_per_second": 10.0,
        "wait_share": 0.1,
        "remaining_seconds": 9.0,
        "time": "2026-01-02T03:04:05+00:00",
        "seconds_without_progress": 0.0,
        "last_checkpoint": {"step": 4, "path": "/c", "time": "2026-01-02T03:04:05+00:00"},
        "last_evaluation": {
            "step": 4,
            "accuracy": 0.5,
            "num_prompts": 4,
            "lowest_version": 1,
            "highest_version": 1,
        },
    }
)


def targets(folder: Path) -> list[Target]:
    """Return the targets; `folder` is for files."""
    node = {"metadata": POD["metadata"], "status": {"conditions": POD["status"]["conditions"]}}
    job = {
        "metadata": POD["metadata"],
        "status": {"conditions": [{"type": "Failed", "status": "True", "message": "x"}]},
    }
    report = REPORT.model_dump_json(by_alias=True, exclude_none=True).encode()
    status = json.dumps(full_status().to_json()).encode()
    smallest = json.dumps(SMALLEST).encode()
    examples = [json.dumps(*load_documents(path)).encode() for path in sorted(EXAMPLES.glob("*.yaml"))]
    no_json = (json.JSONDecodeError, UnicodeDecodeError, RecursionError)
    return [
        Target("report", [report], _report),
        Target("status", [status], _status, no_json),
        Target(
            "pod",
            [json.dumps(POD).encode()],
            _kept(trim_pod),
            no_json,
        ),
        Target(
            "node",
            [json.dumps(node).encode()],
            _kept(trim_node),
            no_json,
        ),
        Target(
            "trainer-job",
            [json.dumps(job).encode()],
            _trainer_job,
            no_json,
        ),
        Target("config-map", [b'{"spec": {"training": {}}, "x": 1}', report], _children),
        Target("manifest", [smallest], _manifest(folder), (SpecError,), cases=100),
        # What is in one, without the YAML library, which takes nearly all of a manifest's time.
        Target("manifest-document", [smallest, *examples], _document, (SpecError, *no_json)),
    ]
