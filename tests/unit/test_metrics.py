"""metrics.jsonl, one line per step whatever restarts, and the report beside it."""

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from asyncrl_api.report import EvaluationReport, Report
from asyncrl_runtime.trainer import metrics as metrics_module
from asyncrl_runtime.trainer.metrics import RECENT_STEPS, Metrics

NOW = datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)


@pytest.fixture
def metrics(tmp_path: Path) -> Metrics:
    return open_metrics(tmp_path)


def open_metrics(folder: Path) -> Metrics:
    report = Report(attempt=2, step=0, max_steps=100, state="Training")
    return Metrics(folder, folder / "report.json", report, lambda: NOW)


def step(number: int, **values: Any) -> dict[str, Any]:
    return {"step": number, "step_seconds": 2.0, "wait_seconds": 0.5, "num_tokens": 100, **values}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def report(folder: Path) -> Report:
    found = Report.load(folder / "report.json")
    assert found is not None
    return found


def test_a_step_is_a_line_with_its_time_and_all_that_was_measured(metrics: Metrics, tmp_path: Path) -> None:
    metrics.log_step(step(1, loss=0.25, discards={"stale": 2}))
    metrics.log_step(step(2))
    first, second = lines(tmp_path)
    assert first == {"time": "2026-01-02T03:04:05.678+00:00", **step(1, loss=0.25, discards={"stale": 2})}
    assert second["step"] == 2


def test_the_report_says_how_the_last_steps_went(metrics: Metrics, tmp_path: Path) -> None:
    metrics.log_step(step(9))
    metrics.log_step(
        step(
            10,
            step_seconds=6.0,
            wait_seconds=3.5,
            reward_mean=0.5,
            staleness_mean=1.25,
            staleness_p50=1.0,
            staleness_p95=2.0,
            staleness_max=3.0,
        )
    )
    found = report(tmp_path)
    assert (found.attempt, found.step, found.max_steps, found.state) == (2, 10, 100, "Training")
    assert (found.reward, found.staleness_mean, found.staleness_max) == (0.5, 1.25, 3)
    assert (found.staleness_p50, found.staleness_p95) == (1, 2)
    assert found.tokens_per_second == 200 / 8
    assert found.wait_share == 4 / 8
    assert found.remaining_seconds == 90 * 4.0
    assert found.time == "2026-01-02T03:04:05+00:00"


def test_the_masked_share_is_of_all_tokens_of_the_last_steps(metrics: Metrics) -> None:
    metrics.log_step(step(1, num_tokens=300, num_live_tokens=240))
    metrics.log_step(step(2, num_tokens=100, num_live_tokens=100))
    assert metrics.report.masked_share == pytest.approx(0.15)


def test_rates_are_those_of_recent_steps_alone(metrics: Metrics) -> None:
    metrics.log_step(step(1, step_seconds=1e6, num_tokens=10**9))
    for number in range(2, RECENT_STEPS + 2):
        metrics.log_step(step(number))
    assert metrics.report.tokens_per_second == 50 and metrics.report.wait_share == 0.25


def test_skipped_updates_are_counted_over_the_recent_steps(metrics: Metrics) -> None:
    metrics.log_step(step(1, skipped_updates=2))
    metrics.log_step(step(2, skipped_updates=1))
    assert metrics.report.skipped_updates == 3
    for number in range(3, RECENT_STEPS + 2):
        metrics.log_step(step(number))
    assert metrics.report.skipped_updates == 1


def test_a_step_that_measured_nothing_makes_no_rates(metrics: Metrics, tmp_path: Path) -> None:
    """A repeated step may take no time and have no tokens; the report stays readable."""
    metrics.log_step({"step": 1, "step_seconds": 0.0, "wait_seconds": 0.0})
    found = report(tmp_path)
    assert (found.tokens_per_second, found.wait_share, found.reward) == (None, None, None)
    assert found.staleness_max == 0
    assert found.staleness_p50 is found.staleness_p95 is None


def test_an_update_changes_what_it_names_and_keeps_the_rest(metrics: Metrics, tmp_path: Path) -> None:
    evaluation = EvaluationReport(step=0, accuracy=0.5, num_prompts=4, lowest_version=0, highest_version=0)
    metrics.log_step(step(1, reward_mean=0.5))
    metrics.update(state="Evaluating", first_evaluation=evaluation)
    assert report(tmp_path) == metrics.report
    assert (metrics.report.state, metrics.report.reward) == ("Evaluating", 0.5)
    assert metrics.report.first_evaluation == evaluation
    assert not (tmp_path / "metrics.jsonl").read_text().count("Evaluating")


def test_evaluations_have_a_file_of_their_own(metrics: Metrics, tmp_path: Path) -> None:
    metrics.log_evaluation({"step": 0, "accuracy": 0.25})
    metrics.log_evaluation({"step": 20, "accuracy": 0.5})
    found = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["accuracy"] for line in found] == [0.25, 0.5]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_steps_that_are_trained_again_are_written_once(metrics: Metrics, tmp_path: Path) -> None:
    for number in range(1, 6):
        metrics.log_step(step(number, attempt=1))
    restarted = open_metrics(tmp_path)
    restarted.rewind(3)
    for number in range(4, 7):
        restarted.log_step(step(number, attempt=2))
    assert [(line["step"], line["attempt"]) for line in lines(tmp_path)] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 2),
        (5, 2),
        (6, 2),
    ]


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "los', b"{", b"\n\n", b"\0\0\0\0", b'{"time": "now"}', b'{"step": 3, "\xff']
)
def test_a_line_torn_by_a_crash_is_dropped_and_the_rest_kept(
    metrics: Metrics, tmp_path: Path, torn: bytes
) -> None:
    metrics.log_step(step(1))
    metrics.log_step(step(2))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    metrics.rewind(2)
    metrics.log_step(step(3))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_there_need_not_be_a_file_to_rewind(metrics: Metrics, tmp_path: Path) -> None:
    metrics.rewind(0)
    assert not (tmp_path / "metrics.jsonl").exists()
    metrics.log_step(step(1))
    metrics.rewind(0)
    assert lines(tmp_path) == []


def test_a_kill_while_rewinding_loses_no_line(
    metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old file stays in place until all lines that are kept have been written."""
    for number in range(1, 4):
        metrics.log_step(step(number))

    def killed(path: Path, text: str) -> int:
        with path.open("w") as file:
            file.write(text[:20])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", killed)
        metrics.rewind(2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    metrics.rewind(2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


async def test_a_report_is_renewed_though_nothing_happens_and_a_full_disk_does_not_end_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics_module, "RENEW_SECONDS", 0.01)
    without = iter(range(1000))
    opened = Metrics(
        tmp_path,
        tmp_path / "folder" / "report.json",
        Report(attempt=2, step=0, max_steps=100, state="Training"),
        lambda: NOW,
        lambda: float(next(without)),
    )
    renewing = asyncio.create_task(opened.keep_renewed())
    while "was not written to" not in caplog.text:
        await asyncio.sleep(0.01)
    (tmp_path / "folder").mkdir()
    seen = set[float | None]()
    while len(seen) < 3:
        await asyncio.sleep(0.01)
        found = Report.load(tmp_path / "folder" / "report.json")
        seen |= {found.seconds_without_progress} if found is not None else set()
    renewing.cancel()
    assert opened.report.time == "2026-01-02T03:04:05+00:00"


def test_a_disk_that_takes_nothing_loses_no_line_and_no_report(
    metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    metrics.log_step(step(1))

    def refuse(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(metrics_module, "append_whole", refuse)
        metrics.log_step(step(2))
        metrics.log_evaluation({"step": 2})
        metrics.log_step(step(3))
        metrics.update(state="Training", disk_fault="full")
        with pytest.raises(OSError, match="No space left"):
            metrics.flush()
    assert [line["step"] for line in lines(tmp_path)] == [1]
    assert metrics.report.step == 3, "whoever reads it from memory knows"
    assert len(caplog.messages) == 1 and "No space left on device; 1 lines are kept" in caplog.text
    metrics.update()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "evaluations.jsonl").read_text() == '{"step": 2}\n'
    assert report(tmp_path).step == 3 and report(tmp_path).disk_fault == "full"
    assert caplog.messages[-1] == "the disk takes reports and metrics again"


def test_a_report_that_cannot_be_replaced_ends_nothing(tmp_path: Path) -> None:
    metrics = open_metrics(tmp_path)
    (tmp_path / "report.json").mkdir()  # nothing can be renamed onto it
    metrics.update(state="Training")
    (tmp_path / "report.json").rmdir()
    metrics.update()
    assert report(tmp_path).state == "Training"
