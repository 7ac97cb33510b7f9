"""What goes wrong in a local run: the process that fails is named, with its last words; nothing hangs."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncrl_api.exits import ExitCode
from asyncrl_operator.decide.restart_policy import (
    CONTAINER_RESET_SECONDS,
    MESSAGING_MAX_FAILURES,
    ContainerBackoff,
    GiveUp,
    Restart,
)
from asyncrl_operator.local.local_run import free_ports
from support.engines.tiny_models import tiny_model
from support.jobs.cli_runs import CliRun, asyncrl, have_ended, write_job
from support.jobs.job_harness import build_job

pytestmark = pytest.mark.slow

JOB = build_job()


def settings(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", f"spec.{override}")]


def run_to_its_failure(folder: Path, *overrides: str) -> tuple[int, str, str]:
    """Return the exit code of a run, what it said before, and how it explained its end."""
    with CliRun(write_job(folder, JOB), folder / "run", *settings(*overrides)) as run:
        code = run.wait()
    before, _, failure = run.output.partition("asyncrl: ")
    assert failure, run.output
    return code, before, failure


def shown_log(failure: str, folder: Path) -> tuple[str, list[str]]:
    """Return the name of the process whose log is shown, and the lines shown, which must be its last."""
    _, named, *lines = failure.splitlines()
    found = re.fullmatch(r"the last lines of (.+/logs/(.+)\.log):", named)
    assert found is not None and Path(found[1]).parent == folder / "run" / "logs"
    shown = [line.removeprefix("  | ") for line in lines]
    assert shown == Path(found[1]).read_text().splitlines()[-len(shown) :]
    return found[2], shown


# A process that fails for good


@pytest.mark.parametrize(
    ("override", "process", "code", "cause"),
    [
        (
            "reward.function=not_there:reward",
            "rollout-0-worker",
            ExitCode.REFUSED,
            "spec.reward.function: not_there:reward (looked for in {folder}) cannot be loaded: ",
        ),
        (
            "model.source=file://{folder}/bare",
            ".*",  # whoever looks first
            ExitCode.REFUSED,
            "spec.model.source: file://{folder}/bare: no tokenizer in {folder}/bare; it must be a Hugging",
        ),
        (
            "dataset.promptField=prompt",
            "trainer",
            ExitCode.UNUSABLE,
            "spec.dataset.source: harness_data:rows: row 1: ",
        ),
        (
            "dataset.parameters={{size: many}}",
            "trainer",
            ExitCode.UNUSABLE,
            "spec.dataset.source: harness_data:rows: TypeError: ",
        ),
    ],
    ids=["reward", "tokenizer", "field", "dataset"],
)
def test_a_process_that_fails_for_good_ends_the_run_with_its_last_words(
    tmp_path: Path, override: str, process: str, code: ExitCode, cause: str
) -> None:
    shutil.copytree(tiny_model(), tmp_path / "bare", ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    ended_with, _, failure = run_to_its_failure(tmp_path, override.format(folder=tmp_path))
    assert ended_with == code
    name, lines = shown_log(failure, tmp_path)
    assert re.fullmatch(process, name)
    assert failure.startswith(f"{name} ended with exit code {int(code)}: exit code {int(code)} is final\n")
    assert f"asyncrl-runtime: {cause.format(folder=tmp_path)}" in lines[-1]


def test_a_folder_that_takes_no_log_for_a_while_is_waited_for(tmp_path: Path) -> None:
    manifest = write_job(tmp_path, build_job(training={"maxSteps": 40}))
    with CliRun(manifest, tmp_path / "run") as run:
        run.wait_until("it trains", lambda: run.folder.metrics.exists() and run.steps != [])
        logs, away = run.folder.path / "logs", run.folder.path / "away"
        logs.rename(away)
        run.wait_for_child("worker").kill()
        run.wait_until("it is said", lambda: "No such file or directory" in run.output)
        assert "tried again in 5 s" in run.output
        away.rename(logs)
        assert run.wait(300) == ExitCode.DONE, run.output


def test_a_signal_counts_against_max_disruptions_whoever_sent_it(tmp_path: Path) -> None:
    changes = settings("failurePolicy.trainer={maxDisruptions: 1, maxRestarts: 0}")
    with CliRun(write_job(tmp_path, JOB), tmp_path / "run", *changes) as run:
        first = run.wait_for_child("trainer")
        first.kill()
        run.wait_until("it is restarted", lambda: "restarted in 0.0 s" in run.output)
        second = run.wait_for_child("trainer")
        children = run.children()
        second.kill()
        assert run.wait(60) == ExitCode.TRY_AGAIN
    assert first.pid != second.pid and have_ended(children)
    [killed] = (line for line in run.output.splitlines() if line.startswith("trainer "))
    assert re.fullmatch(r"trainer was ended by SIGKILL after \d+ s; restarted in 0\.0 s \(log: .+\)", killed)
    reason = "trainer was ended by SIGKILL: more than maxDisruptions = 1 signals ended it"
    assert f"asyncrl: {reason}\nthe last lines of {run.folder.log('trainer')}:" in run.output


def test_an_exit_code_counts_against_max_restarts(tmp_path: Path) -> None:
    folder = tmp_path / "what [/is] [red]shown :smile:"  # is shown as it is
    code, before, failure = run_to_its_failure(
        folder,
        "dataset.promptField=prompt",
        "failurePolicy.trainer={maxRestarts: 1, maxDisruptions: 0, fatalExitCodes: [64]}",
    )
    assert code == ExitCode.UNUSABLE
    log = folder / "run" / "logs" / "trainer.log"
    cause = "asyncrl-runtime: spec.dataset.source: harness_data:rows: row 1: "
    restarted = re.escape(f"restarted in 0.0 s (log: {log}): {cause}")
    assert re.search(rf"trainer ended with exit code 65 after \d+ s; {restarted}", before)
    assert failure.startswith("trainer ended with exit code 65: it failed more than maxRestarts = 1 times\n")
    name, lines = shown_log(failure, folder)
    assert name == "trainer" and "set spec.dataset.promptField, or fix the row" in lines[-1]


# Taken ports


@contextlib.contextmanager
def taken(port: int) -> Iterator[None]:
    """Somebody else listens there."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        yield


WITH_PORTS = """\
import json, sys
from asyncrl_operator.local import cli
ports = json.loads(sys.argv.pop(1))
cli.free_ports = lambda spec: ports  # they were free when it looked
cli.app()
"""


def run_with_ports(folder: Path, ports: dict[str, int], *overrides: str) -> CliRun:
    program = [sys.executable, "-c", WITH_PORTS, json.dumps(ports)]
    return CliRun(write_job(folder, JOB), folder / "run", *settings(*overrides), program=program)


def test_a_broker_whose_port_is_taken_fails_the_run(tmp_path: Path) -> None:
    ports = free_ports(JOB.spec)
    with taken(ports["nats"]), run_with_ports(tmp_path, ports) as run:
        assert run.wait(60) == ExitCode.TRY_AGAIN
    failure = run.output.partition("asyncrl: ")[2]
    assert failure.startswith(
        f"nats ended with exit code 1: it failed {MESSAGING_MAX_FAILURES + 1} times in a row\n"
    )
    name, lines = shown_log(failure, tmp_path)
    assert name == "nats"
    assert f"127.0.0.1:{ports['nats']}" in lines[-1] and "address already in use" in lines[-1]


def test_a_broker_that_lived_or_was_killed_can_be_started() -> None:
    """Only exit codes in a row, each soon after the start, show that a broker will never start."""
    backoff = ContainerBackoff(MESSAGING_MAX_FAILURES)
    soon, late = 1.0, CONTAINER_RESET_SECONDS
    failures = [(1, soon)] * MESSAGING_MAX_FAILURES
    for code, lived in [*failures, (-9, soon), *failures, (1, late), *failures[1:]]:
        assert isinstance(backoff.ended(code, lived), Restart)
    assert isinstance(backoff.ended(1, soon), GiveUp)
    endless = ContainerBackoff()
    assert all(isinstance(endless.ended(1, soon), Restart) for _ in range(100))


@pytest.mark.parametrize(("server", "process"), [("engine-0", "engine"), ("health-0", "worker")])
def test_a_replica_whose_port_is_taken_says_so_and_fails_the_run_in_time(
    tmp_path: Path, server: str, process: str
) -> None:
    ports = free_ports(JOB.spec)
    in_time = "failurePolicy.rollout.belowMinimumSeconds=1"
    with taken(ports[server]), run_with_ports(tmp_path, ports, in_time) as run:
        assert run.wait() == ExitCode.TRY_AGAIN
    before, _, failure = run.output.partition("asyncrl: ")
    note = rf"rollout-0-{process} ended with exit code 75 after \d+ s; restarted in 0\.0 s \(log: .+\): "
    cause = f"asyncrl-runtime: {process}: cannot listen on 127.0.0.1:{ports[server]}: Address already in use"
    assert re.search(note + re.escape(cause), before)
    assert before.count("restarted in") < 4  # a life that is not over yet does not count as up
    assert failure.startswith(
        "RolloutBelowMinimum: 0/1 engines were ready, below minAvailablePercent 25, for 1 s\n"
    )
    assert shown_log(failure, tmp_path)[0] == f"rollout-0-{process}"


# Deadlines


def test_a_job_that_is_not_running_for_too_long_has_failed(tmp_path: Path) -> None:
    """As in a cluster, a job whose trainer waits for its backoff does not count as running."""
    code, before, failure = run_to_its_failure(
        tmp_path,
        "dataset.promptField=prompt",
        "failurePolicy.trainer={backoffSeconds: 600, fatalExitCodes: [64]}",
        "pendingDeadlineSeconds=3",
    )
    assert code == ExitCode.TRY_AGAIN and "restarted in 600.0 s" in before
    words = "PendingDeadlineExceeded: spec.pendingDeadlineSeconds: not running after 3 s"
    assert failure.splitlines()[0] == words


# What hangs


SLOW_REWARD = """\
import time
def reward(prompt, response, row):
    time.sleep(1)  # or the run would take this machine's time from what is started again
    return len(response) / 10
"""


HANG_SECONDS = 20
"""A limit that is longer than a start of the trainer computes, even on a busy machine."""
TWO_RANKS = "gpuBudget={total: 3, allocation: None, mode: Manual, split: {trainer: 2, rollout: 1}}"
WITH_LIMIT = f"failurePolicy.trainer={{maxDisruptions: 0, hangSeconds: {HANG_SECONDS}}}"


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_trainer_one_of_whose_ranks_is_stopped_is_restarted_at_its_own_cost(
    tmp_path: Path, stopped: int
) -> None:
    """If rank 1 is stopped, rank 0 reports that it waits; if rank 0 is stopped, nothing is heard any more."""
    manifest = write_job(tmp_path, JOB)
    with CliRun(manifest, tmp_path / "run", *settings(TWO_RANKS, WITH_LIMIT, "training.maxSteps=40")) as run:
        run.wait_for_step(3)
        ranks = [each for each in run.children() if "RANK" in each.environ() and "rank" in each.cmdline()]
        next(each for each in ranks if each.environ()["RANK"] == str(stopped)).suspend()
        stopped_at = time.monotonic()
        run.wait_until("it is restarted", lambda: "restarted in" in run.output)
        print(f"\nrank {stopped} was stopped: restarted {time.monotonic() - stopped_at:.1f} s later")
        assert run.wait(180) == 0
    assert have_ended(ranks)
    why = "made no progress in" if stopped else "has not reported for"
    [hung] = re.findall(rf"^the trainer {why} (\d+) s.*: killed$", run.output, re.MULTILINE)
    assert int(hung) >= HANG_SECONDS
    assert f"(failurePolicy.trainer.hangSeconds: {HANG_SECONDS}): killed" in run.output
    assert run.output.count("restarted in") == 1 and run.steps[-1]["step"] == 40


ENDLESS_REWARD = f"""\
import time
def reward(prompt, response, row):
    time.sleep({HANG_SECONDS + 5})
    return len(response) / 10
"""


def test_a_trainer_that_waits_for_long_answers_does_not_hang(tmp_path: Path) -> None:
    manifest = write_job(tmp_path, JOB)
    (tmp_path / "slow.py").write_text(ENDLESS_REWARD)
    one_step = ("training.maxSteps=1", "training.batchSize=1", "training.minibatches=1", WITH_LIMIT)
    more = settings("reward.function=slow:reward", "reward.timeoutSeconds=60", *one_step)
    with CliRun(manifest, tmp_path / "run", *more) as run:
        assert run.wait(240) == 0
    assert "killed" not in run.output and "restarted" not in run.output
    assert max(line["wait_seconds"] for line in run.steps) > HANG_SECONDS


def test_whatever_hangs_is_killed_by_its_probe_and_the_run_goes_on(tmp_path: Path) -> None:
    """An engine; a worker, whose engine is left alone; an engine whose worker does not live to tell."""
    manifest = write_job(tmp_path, JOB)
    (tmp_path / "slow.py").write_text(SLOW_REWARD)
    more = ("gpuBudget.total=4", "training.maxSteps=1000000", "reward.function=slow:reward")
    with CliRun(manifest, tmp_path / "run", *settings(*more)) as run:
        run.wait_until("all engines sample", lambda: run.report is not None and run.report.num_engines == 3)
        engines, workers = (
            [run.wait_for_child(kind, replica) for replica in range(3)] for kind in ("engine", "worker")
        )
        for process in (engines[0], workers[1], engines[2]):
            process.suspend()
        workers[2].kill()
        run.wait_until("all are killed", lambda: run.output.count("was ended by SIGKILL") == 4)
        assert engines[1].is_running() and workers[0].is_running()
        run.wait_until("all engines sample", lambda: run.report is not None and run.report.num_engines == 3)
        run.interrupt()
        assert run.wait() == 130
    killed = re.findall(r"^(\S+) fails its liveness probe: killed$", run.output, re.MULTILINE)
    assert sorted(killed) == ["rollout-0-engine", "rollout-1-worker", "rollout-2-engine"]
    assert [line["step"] for line in run.steps] == list(range(1, len(run.steps) + 1))
    audit = asyncrl("audit", run.folder.path)
    assert audit.returncode == 0 and "missing 0  twice 0" in audit.stdout


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_run_whose_disk_was_full_goes_on_by_itself(tmp_path: Path, small_disk: Path) -> None:
    """NATS, too: once it could not write, it takes nothing more until its probe has it started again."""
    more = settings("training.maxSteps=60")
    with CliRun(write_job(tmp_path, JOB), small_disk / "run", *more, log=tmp_path / "log") as run:
        run.wait_for_step(3)
        filler = small_disk / "filler"
        with filler.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(2**16))
        try:
            run.wait_until("the probe fails", lambda: "nats fails its liveness probe: killed" in run.output)
        finally:
            filler.unlink()
        assert run.wait(240) == 0
    assert run.steps[-1]["step"] == 60
    audit = asyncrl("audit", run.folder.path)
    assert audit.returncode == 0 and "missing 0  twice 0" in audit.stdout
