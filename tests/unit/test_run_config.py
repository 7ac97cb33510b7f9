"""The files that processes of a job read: the run configuration, and the report of how it stands."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_api.names import NatsAddress
from asyncrl_api.report import CheckpointReport, EvaluationReport, Report
from asyncrl_api.run_config import RunConfig
from support.messages.samples import make_job


def make_config(*overrides: str, **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "namespace": "team",
        "name": "gsm8k",
        "uid": "6e0d",
        "spec": make_job(*overrides).spec,
        "nats": NatsAddress(url="nats://nats:4222", credentials_file="/etc/nats/user.creds"),
        "job_folder": Path("/job"),
        "live_file": Path("/job/live.json"),
        "report_file": Path("/job/report.json"),
        "model_cache": Path("/cache"),
        "import_paths": (Path("/code"), Path("/more")),
    }
    return RunConfig(**(settings | changes))


@pytest.mark.parametrize(
    "overrides", [[], ["evaluation.source=file://rows.jsonl", "dataset.parameters={a: [1, 1e-6, {b: x}]}"]]
)
def test_a_configuration_survives_its_file(tmp_path: Path, overrides: list[str]) -> None:
    config, path = make_config(*overrides), tmp_path / "config.json"
    config.save(path)
    assert RunConfig.load(path) == config
    assert json.loads(path.read_text())["nats"] == {
        "url": "nats://nats:4222",
        "credentialsFile": "/etc/nats/user.creds",
    }
    assert [each.name for each in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"name": "gsm8k"}'])
def test_a_configuration_that_cannot_be_read_is_refused_by_its_path(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ExitError) as refused:
        RunConfig.load(path)
    assert refused.value.code == ExitCode.REFUSED
    assert str(refused.value).startswith(f"run configuration {path}: ")


def test_a_field_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    make_config().save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "subject_prefix": "x"}))
    with pytest.raises(ExitError, match="subject_prefix"):
        RunConfig.load(path)


def test_streams_on_a_shared_server_are_told_apart_by_the_objects_uid() -> None:
    """A job that was deleted and made again must not find the streams of the one before."""
    assert make_config().names.job == "team_gsm8k"
    shared = make_config("messaging={mode: Shared, shared: {url: 'nats://all:4222'}}")
    assert shared.names.job == "team_gsm8k_6e0d"


REPORT = Report(attempt=2, step=7, max_steps=9, state="Training")


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    evaluation = EvaluationReport(step=5, accuracy=0.5, num_prompts=2, lowest_version=4, highest_version=5)
    told = {
        "reward": 0.25,
        "staleness_max": 0,
        "last_evaluation": evaluation,
        "last_checkpoint": CheckpointReport(step=5, path="checkpoints/5", time="2026-01-01T00:00:00Z"),
    }
    path = tmp_path / "report.json"
    for report in (REPORT, REPORT.model_copy(update=told)):
        report.save(path)
        assert Report.load(path) == report
        assert [each.name for each in tmp_path.iterdir()] == ["report.json"]
    assert json.loads(path.read_text())["lastEvaluation"]["numPrompts"] == 2


def test_there_is_no_report_before_the_first(tmp_path: Path) -> None:
    assert Report.load(tmp_path / "report.json") is None


def test_a_report_that_is_replaced_is_the_old_one_until_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    REPORT.save(path)

    def look_instead(scratch: Path, target: Path) -> Path:
        assert Report.load(target) == REPORT
        assert Report.load(scratch) == REPORT.model_copy(update={"step": 8})
        return target

    monkeypatch.setattr(Path, "replace", look_instead)
    REPORT.model_copy(update={"step": 8}).save(path)
    assert Report.load(path) == REPORT


def test_a_report_and_a_configuration_do_not_change() -> None:
    changed: Any = REPORT
    with pytest.raises(ValidationError, match="frozen"):
        changed.step = 8
