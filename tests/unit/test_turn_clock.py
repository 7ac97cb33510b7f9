"""The clock of the trainer's turn: it rests between commands, and bytes are progress."""

import mmap
import os
import threading
from pathlib import Path

import pytest

from asyncrl_api.report import CheckpointReport, EvaluationReport, Report
from asyncrl_api.run_config import RunConfig
from asyncrl_runtime.history.ledger_writer import Ledger
from asyncrl_runtime.trainer import starting
from asyncrl_runtime.trainer.starting import Start, first_report
from asyncrl_runtime.trainer.turn_clock import TurnClock, disk_bytes, folder_bytes
from support.jobs.job_harness import build_job


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def clock(time: Time) -> TurnClock:
    return TurnClock(time)


def test_it_rests_while_it_is_not_the_trainers_turn(clock: TurnClock, time: Time) -> None:
    time.now += 100
    assert clock.seconds_without_progress() == 0
    with clock.turn():
        time.now += 5
        assert clock.seconds_without_progress() == 5
    time.now += 100
    assert clock.seconds_without_progress() == 0
    with clock.turn():
        assert clock.seconds_without_progress() == 0


def test_what_was_done_begins_it_again(clock: TurnClock, time: Time) -> None:
    with clock.turn():
        time.now += 5
        clock.moved()
        time.now += 2
        assert clock.seconds_without_progress() == 2


def test_a_command_that_waits_behind_another_does_not_hide_that_it_hangs(
    clock: TurnClock, time: Time
) -> None:
    with clock.turn():
        time.now += 60
        with clock.turn():  # a ping, say
            time.now += 10
            assert clock.seconds_without_progress() == 70
        time.now += 5
        assert clock.seconds_without_progress() == 5, "an end is progress"


def test_a_turn_that_fails_has_an_end(clock: TurnClock, time: Time) -> None:
    with pytest.raises(ValueError, match="x"), clock.turn(lambda: 1):
        raise ValueError("x")
    time.now += 5
    assert clock.seconds_without_progress() == 0


def test_a_slow_disk_is_progress_and_a_stuck_one_is_not(clock: TurnClock, time: Time, tmp_path: Path) -> None:
    folder = tmp_path / "step-000001.tmp" / "policy"  # ranks make it
    with clock.turn(folder_bytes(folder)):
        time.now += 30
        assert clock.seconds_without_progress() == 30
        folder.mkdir(parents=True)
        for _ in range(3):
            with (folder / "shard.pt").open("ab") as file:
                file.write(b"x")
            time.now += 30
            assert clock.seconds_without_progress() == 0
        time.now += 30
        assert clock.seconds_without_progress() == 30


def test_what_other_threads_read_from_a_disk_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(2**22))

    def load_weights() -> None:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # out of the kernel's cache
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                assert mapped[:: mmap.PAGESIZE]

    before = disk_bytes()
    load_weights()
    assert disk_bytes() == before, "not those of the thread that asks: it writes the report"
    thread = threading.Thread(target=load_weights)
    thread.start()
    thread.join()
    if disk_bytes() == before:
        pytest.skip("the temporary folder is in memory, or the kernel does not count")
    assert disk_bytes() >= before + 2**22


# A start


def run_config(folder: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "namespace": "team",
            "name": "harness",
            "uid": "uid",
            "spec": build_job().spec,
            "nats": {"url": "nats://127.0.0.1:1"},
            "job_folder": folder / "claim",
            "live_file": folder / "live.json",
            "report_file": folder / "claim" / "report.json",
            "model_cache": folder,
        }
    )


def load(config: RunConfig) -> Report:
    found = Report.load(config.report_file)
    assert found is not None
    return found


def test_a_start_reports_from_its_first_moment_and_nothing_after_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting, "RENEW_SECONDS", 0.01)
    monkeypatch.setattr(starting, "what_moves", lambda: 0)
    config = run_config(tmp_path)
    start = Start(config, attempt=3)
    with start.reporting():
        while not config.report_file.exists() or not load(config).seconds_without_progress:
            pass
        assert (load(config).attempt, load(config).state) == (3, "Starting")
        start.end()
        assert start.clock.seconds_without_progress() == 0
        config.report_file.unlink()
    assert not config.report_file.exists()


def test_a_start_says_what_attempts_before_it_have_reached(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    config.job_folder.mkdir()
    evaluation = EvaluationReport(step=4, accuracy=0.5, num_prompts=8, lowest_version=4, highest_version=4)
    checkpoint = CheckpointReport(step=4, path="step-000004", time="2026-01-02T03:04:05+00:00")
    before = Report(
        attempt=1,
        step=5,
        max_steps=6,
        state="Training",
        wait_share=0.9,
        last_evaluation=evaluation,
        last_checkpoint=checkpoint,
        seconds_without_progress=700.0,
    )
    before.save(config.report_file)
    Ledger(config.job_folder / "ledger.jsonl", 1).claim("uid")
    assert first_report(config, 2) == Report(
        attempt=2,
        step=5,
        max_steps=6,
        state="Starting",
        last_evaluation=evaluation,
        last_checkpoint=checkpoint,
    )


def test_what_another_object_of_this_name_has_reached_is_not_said(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    config.job_folder.mkdir()
    Report(attempt=1, step=5, max_steps=6, state="Training").save(config.report_file)
    Ledger(config.job_folder / "ledger.jsonl", 1).claim("another uid")
    assert first_report(config, 1) == Report(attempt=1, step=0, max_steps=6, state="Starting")
    (config.job_folder / "ledger.jsonl").write_text("no ledger\n")
    assert first_report(config, 1).step == 0
