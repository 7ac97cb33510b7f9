"""When a trainer's report is copied, and what happens where that fails. The API server is a function here."""

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from asyncrl_api.report import Report
from asyncrl_api.run_config import RunConfig
from asyncrl_operator.decide.desired import DesiredTrainer
from asyncrl_operator.render.manifests import render_trainer
from asyncrl_runtime.trainer import cluster_report
from asyncrl_runtime.trainer.cluster_report import (
    CHANGED_SECONDS,
    UNCHANGED_SECONDS,
    ReportCopier,
    copying_report,
    in_cluster_client,
)
from support.manifests.rendered_jobs import DEFAULTS, job_of

TRAINING = Report(attempt=2, step=7, max_steps=9, state="Training")


class Server:
    """Keeps what it is sent; answers with `status`, or raises `error`."""

    def __init__(self) -> None:
        self.status = 200
        self.error: Exception | None = None
        self.sent: list[Report] = []
        self.num_calls = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.num_calls += 1
        if self.error is not None:
            raise self.error
        if self.status == 200:
            self.sent.append(Report.model_validate_json(json.loads(request.content)["data"]["report"]))
        return httpx.Response(self.status)


class Scene:
    def __init__(self) -> None:
        self.now, self.report = 0.0, TRAINING
        self.server = Server()
        client = httpx.AsyncClient(transport=httpx.MockTransport(self.server), base_url="https://api")
        self.copier = ReportCopier(client, "/report", lambda: self.report, lambda: self.now)

    async def after(self, seconds: float, **changes: object) -> int:
        """Let time pass and the report change; return how many calls that leads to."""
        before = self.server.num_calls
        self.now += seconds
        self.report = self.report.model_copy(update=changes)
        await self.copier.copy_if_due()
        return self.server.num_calls - before


async def test_a_report_goes_out_at_once_then_at_most_every_ten_seconds() -> None:
    scene = Scene()
    assert await scene.after(0) == 1
    assert await scene.after(CHANGED_SECONDS - 1, step=8) == 0
    assert await scene.after(1) == 1
    assert scene.server.sent[-1].step == 8


async def test_a_new_state_does_not_wait() -> None:
    scene = Scene()
    await scene.after(0)
    assert await scene.after(0.1, state="Evaluating") == 1


async def test_a_report_that_stands_still_is_a_sign_of_life_with_the_time_of_day() -> None:
    scene = Scene()
    await scene.after(0)
    assert await scene.after(UNCHANGED_SECONDS - 1) == 0
    assert await scene.after(1) == 1
    assert scene.server.sent[-1].time


async def test_a_report_that_was_only_renewed_is_no_news() -> None:
    scene = Scene()
    await scene.after(0)
    assert await scene.after(CHANGED_SECONDS, time="2026-01-02T03:04:05", seconds_without_progress=10.0) == 0
    assert await scene.after(UNCHANGED_SECONDS - CHANGED_SECONDS) == 1
    assert scene.server.sent[-1].seconds_without_progress == 10


@pytest.mark.parametrize("error", [httpx.ConnectError("no route"), FileNotFoundError("token"), None])
async def test_what_was_not_written_is_tried_again_but_not_at_every_look(
    error: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene()
    scene.server.status, scene.server.error = 503, error
    assert await scene.after(0) == 1 and "was not written to /report" in caplog.text
    assert await scene.after(CHANGED_SECONDS - 1, state="Evaluating") == 0
    scene.server.status, scene.server.error = 200, None
    assert await scene.after(1) == 1
    assert scene.server.sent[-1].state == "Evaluating"


async def test_the_last_word_is_said_also_if_it_failed_a_moment_ago() -> None:
    scene = Scene()
    await scene.after(0)
    scene.server.status = 500
    await scene.after(1, state="Finished")
    scene.server.status = 200
    await scene.copier.copy_last()
    assert scene.server.sent[-1].state == "Finished"
    num_calls = scene.server.num_calls
    await scene.copier.copy_last()
    assert scene.server.num_calls == num_calls, "it has been said"


async def test_a_call_without_an_answer_has_an_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def never(request: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(cluster_report, "CALL_SECONDS", 0.01)
    client = httpx.AsyncClient(transport=httpx.MockTransport(never), base_url="https://api")
    await ReportCopier(client, "/report", lambda: TRAINING, lambda: 0.0).copy_if_due()
    assert "TimeoutError" in caplog.text


async def test_a_file_that_cannot_be_read_ends_neither_the_task_nor_the_training(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reads: list[Callable[[], Report]] = []
    has_read_twice = asyncio.Event()

    def read() -> Report:
        reads.append(read)
        if len(reads) == 1:
            raise OSError("stale file handle")
        has_read_twice.set()
        return TRAINING

    monkeypatch.setattr(cluster_report, "CHANGED_SECONDS", 0.0)
    monkeypatch.setattr(cluster_report, "LOOK_SECONDS", 0.0)
    client = httpx.AsyncClient(transport=httpx.MockTransport(Server()), base_url="https://api")
    task = asyncio.create_task(ReportCopier(client, "/report", read, lambda: 0.0).keep())
    await asyncio.wait_for(has_read_twice.wait(), 5)
    task.cancel()
    assert "stale file handle" in caplog.text


def run_config() -> RunConfig:
    config, _ = render_trainer(job_of("cpu"), DEFAULTS, DesiredTrainer(1, 1))
    return RunConfig.model_validate_json(config["data"]["config.json"])


async def test_a_pod_without_a_service_account_trains_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    has_run = False
    async with copying_report(run_config(), lambda: 0.0, lambda: None):
        has_run = True
    assert has_run and "no report reaches ConfigMap gsm8k-report" in caplog.text


async def test_what_ends_the_training_is_passed_on_after_the_last_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server()
    client = httpx.AsyncClient(transport=httpx.MockTransport(server), base_url="https://api")
    monkeypatch.setattr(cluster_report, "in_cluster_client", lambda: client)
    with pytest.raises(ValueError, match="numbers"):
        said = [TRAINING]
        async with copying_report(run_config(), lambda: 0.0, lambda: said[-1]):
            said.append(TRAINING.model_copy(update={"state": "Failed"}))
            raise ValueError("numbers")
    assert server.sent[-1].state == "Failed"


async def test_nothing_is_copied_on_a_laptop(caplog: pytest.LogCaptureFixture) -> None:
    config = run_config().model_copy(update={"report_config_map": ""})
    with caplog.at_level(logging.DEBUG):
        async with copying_report(config, lambda: 0.0, lambda: None):
            pass
    assert not caplog.records


def test_a_client_needs_a_certificate_of_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    with pytest.raises(FileNotFoundError):
        in_cluster_client(tmp_path)
