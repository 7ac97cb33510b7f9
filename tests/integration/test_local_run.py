"""`asyncrl run` from its start to its end, stopped, killed, and gone on with."""

import json
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncrl_api.exits import ExitCode
from asyncrl_api.parsing import load_documents, parse_job
from asyncrl_operator.local.run_folder import RunFolder
from support.engines.tiny_models import tiny_model
from support.jobs.cli_runs import CliRun, Terminal, asyncrl, have_ended, write_job
from support.jobs.job_harness import build_job
from support.paths import USER_CODE

pytestmark = pytest.mark.slow

JOB = build_job(evaluation={"source": "harness_data:rows", "samples": 8, "everySteps": 100})
NUM_STEPS = JOB.spec.training.max_steps
LONG = 60
"""Steps of a run that is stopped on its way."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CliRun]:
    """A run that has come to its end; tests only read its folder."""
    folder = tmp_path_factory.mktemp("finished")
    with CliRun(write_job(folder, JOB), folder / "run") as run:
        assert run.wait() == 0, run.output
        yield run


@pytest.fixture(scope="module")
def manifest(finished: CliRun) -> Path:
    return finished.folder.path.parent / "job.yaml"


@pytest.fixture
def copy(finished: CliRun, tmp_path: Path) -> RunFolder:
    """The finished run's folder, to be changed."""
    return RunFolder(shutil.copytree(finished.folder.path, tmp_path / "run"))


def steps_of(folder: RunFolder) -> list[int]:
    return [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()]


def assert_books_close(folder: RunFolder, num_steps: int) -> None:
    ended = asyncrl("audit", folder.path)
    assert ended.returncode == 0, ended.stdout
    batch = JOB.spec.training.batch_size
    assert re.match(rf"trained {num_steps * batch}  discarded \d+  missing 0  twice 0\n", ended.stdout)
    assert f"tickets, {num_steps} steps" in ended.stdout and "not finished" not in ended.stdout


# A run that comes to its end


def test_a_policy_that_has_learned_its_prompts_ends_as_a_success(tmp_path: Path) -> None:
    overrides: dict[str, Any] = {
        "reward": {"function": "fault_data:learned"},
        "sampling": {"filter": "DropUniformGroups", "maxDiscardsInARow": 20},
        "training": {"maxSteps": 10_000},
    }
    shutil.copy(USER_CODE / "fault_data.py", tmp_path)
    with CliRun(write_job(tmp_path, build_job(**overrides)), tmp_path / "run") as run:
        assert run.wait() == ExitCode.DONE, run.output
        words = r"\d\d of the last \d\d prompt groups had the top reward, 1, in every sample"
        assert re.search(words, run.output), run.output  # more may arrive before it is decided
        report = run.report
        assert report is not None and report.state == "Mastered" and 0 < report.step < 10_000
        assert report.last_checkpoint is not None and report.last_checkpoint.step == report.step
        assert (Path(report.export) / "config.json").exists()
        ended = asyncrl("audit", run.folder.path)
        assert ended.returncode == 0 and "missing 0  twice 0" in ended.stdout, ended.stdout


def test_without_a_terminal_plain_lines_show_how_it_stands(finished: CliRun) -> None:
    lines = finished.output.splitlines()
    assert "\x1b" not in finished.output
    assert lines[0] == "starting: the model is being made or loaded"
    [last] = [line for line in lines if line.startswith("step ")][-1:]
    assert re.fullmatch(
        rf"step {NUM_STEPS}/{NUM_STEPS}  Finished  reward \d+\.\d{{3}}  "
        r"held-out [\d.]+% \(step \d\)  staleness \d\.\d \(max \d\)  tokens/s [\d,]+  waited \d+%  "
        r"queue \d+  engines \d  left 0:00",
        last,
    )


def test_its_end_says_what_it_was_good_for_and_where_things_lie(finished: CliRun) -> None:
    path = finished.folder.path
    *_, accuracy, held_out, checkpoint, export, metrics, everything = finished.output.splitlines()
    assert re.fullmatch(
        rf"held-out accuracy: [\d.]+% before, [\d.]+% after step {NUM_STEPS} \(8 prompts, greedy\)", accuracy
    )
    assert held_out == "held-out prompts that occur in training: 0, in warm-up: 0"
    assert checkpoint == f"checkpoint: {path / 'checkpoints' / f'step-{NUM_STEPS:06d}'}"
    assert export == f"Hugging Face folder: {path / 'export' / 'final'}"
    assert metrics == f"metrics: {path / 'metrics.jsonl'}"
    assert everything == f"everything: {path}"
    assert all(Path(line.split(": ")[1]).exists() for line in (checkpoint, export, metrics, everything))


def test_its_folder_holds_manifest_logs_metrics_ledger_and_checkpoints(finished: CliRun) -> None:
    folder = finished.folder
    assert parse_job(load_documents(folder.manifest)[0]) == JOB
    assert sorted(path.name for path in (folder.path / "logs").iterdir()) == [
        "nats.log",
        "rollout-0-engine.log",
        "rollout-0-worker.log",
        "trainer.log",
    ]
    assert steps_of(folder) == list(range(1, NUM_STEPS + 1))
    ledger = [json.loads(line) for line in folder.ledger.read_text().splitlines()]
    assert [line["version"] for line in ledger if "version" in line] == list(range(NUM_STEPS))
    checkpoints = sorted(path.name for path in (folder.path / "checkpoints").iterdir())
    assert checkpoints == ["step-000002", "step-000004", "step-000006"]
    assert not folder.nats.exists()  # of a finished run nobody needs the streams


def test_its_export_is_a_trained_model_with_its_tokenizer(finished: CliRun) -> None:
    export = finished.folder.path / "export" / "final"
    trained, before = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (export, tiny_model())
    )
    assert trained.keys() == before.keys()
    assert any(not torch.equal(trained[name], before[name]) for name in trained)
    prompt = "7 + 8 ="
    assert AutoTokenizer.from_pretrained(export)(prompt) == AutoTokenizer.from_pretrained(tiny_model())(
        prompt
    )


def test_audit_proves_that_its_books_close(finished: CliRun) -> None:
    assert_books_close(finished.folder, NUM_STEPS)


@pytest.mark.parametrize("fault", ["trained again", "left out", "never issued"])
def test_audit_finds_what_a_ledger_hides(copy: RunFolder, fault: str) -> None:
    lines = [json.loads(line) for line in copy.ledger.read_text().splitlines()]
    [first] = [line["tickets"] for line in lines if line.get("version") == 0]
    [second] = [line for line in lines if line.get("version") == 1]
    a, b = sorted(second["tickets"])
    second["tickets"], counts, listed = {
        "trained again": (first, "missing 2  twice 2", [f"  missing: {a}, {b}", f"  twice: {show(first)}"]),
        "left out": ([a], "missing 1  twice 0", [f"  missing: {b}"]),
        "never issued": ([a, b, 13], "missing 0  twice 1", ["  twice: 13"]),
    }[fault]
    copy.ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = asyncrl("audit", copy.path)
    assert ended.returncode == 1
    summary, _, *rest = ended.stdout.splitlines()
    assert summary.endswith(counts) and rest == listed


def show(tickets: list[int]) -> str:
    return ", ".join(map(str, sorted(tickets)))


def test_eval_scores_the_last_checkpoint_as_the_run_did(finished: CliRun) -> None:
    report = finished.report
    assert report is not None and report.first_evaluation is not None and report.last_evaluation is not None
    assert report.first_evaluation.accuracy != report.last_evaluation.accuracy
    ended = asyncrl("eval", finished.folder.path, seconds=240)
    accuracy = f"{report.last_evaluation.accuracy:.1%}"
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"step {NUM_STEPS}: held-out accuracy {accuracy} of 8 prompts\n"


def test_its_folder_is_not_used_for_another_run(finished: CliRun, manifest: Path) -> None:
    path, before = finished.folder.path, finished.folder.ledger.read_bytes()
    ended = asyncrl("run", manifest, "--out", path)
    assert (ended.returncode, ended.stdout) == (ExitCode.USAGE, "")
    assert ended.stderr == (
        f"asyncrl: {path} exists already; add --resume to go on with its run, or choose another --out\n"
    )
    assert finished.folder.ledger.read_bytes() == before


def test_it_does_not_go_on_under_another_manifest(finished: CliRun, manifest: Path) -> None:
    path, before = finished.folder.path, finished.folder.manifest.read_bytes()
    changes = ["--set", "spec.dataset.seed=18", "--set", "spec.training.maxSteps=5"]
    ended = asyncrl("run", manifest, "--out", path, "--resume", *changes)
    assert ended.returncode == ExitCode.REFUSED
    first, *changed, remedy = ended.stderr.splitlines()
    assert first == f"asyncrl: the run in {path} belongs to another manifest:"
    assert [line.partition(": ")[0] for line in changed] == ["  spec.training.maxSteps", "  spec.dataset"]
    assert remedy == "restore these values, or begin a new run with another --out"
    assert finished.folder.manifest.read_bytes() == before


# A terminal


def test_on_a_terminal_a_finished_run_goes_on_with_more_steps_in_a_panel(
    copy: RunFolder, manifest: Path
) -> None:
    more = NUM_STEPS + 20
    with Terminal(
        "run", manifest, "--out", copy.path, "--resume", "--set", f"spec.training.maxSteps={more}"
    ) as terminal:
        terminal.read_until(None)
        assert terminal.process.wait(30) == 0, terminal.text
    panel, end = terminal.text.rsplit("\x1b[?25h", 1)  # the cursor is shown again
    assert any(int(step) > NUM_STEPS for step in re.findall(rf"step (\d+) of {more}", panel))
    assert "\x1b[2K" in panel  # drawn again in place
    rows = terminal.rows()
    drawn = rows[: next(index for index, row in enumerate(rows) if row.startswith("held-out accuracy"))]
    assert max(map(len, drawn)) <= Terminal.COLUMNS
    for name in ("reward", "held-out", "staleness", "tokens/s", "waited", "queue", "left"):
        assert any(name in row for row in drawn)
    assert any(re.search(r"\d% \(step \d+\) +\d\.\d \(max \d\)", row) for row in drawn)
    assert f"after step {more} (8 prompts, greedy)\r\n" in end and f"everything: {copy.path}" in end
    assert steps_of(copy) == list(range(1, more + 1))
    assert_books_close(copy, more)


def test_a_second_ctrl_c_does_not_wait_for_the_checkpoint(copy: RunFolder, manifest: Path) -> None:
    """What the run reported when it finished is not taken for how this one has ended."""
    arguments = ["run", manifest, "--out", copy.path, "--resume", "--set", "spec.training.maxSteps=1000"]
    with Terminal(*arguments) as terminal:
        terminal.read_until("Starting")
        children = wait_for_all(terminal.process.pid)
        for child in children:
            child.suspend()  # none of them will heed a signal to end
        terminal.press_ctrl_c()
        terminal.read_until("stopping: the trainer makes a checkpoint (Ctrl-C again ends it at once)")
        terminal.press_ctrl_c()
        assert terminal.process.wait(5) == 130
        terminal.read_until(None)
    assert have_ended(children)
    assert "Traceback" not in terminal.text and "Finished" not in terminal.text
    where = f"ended without writing a checkpoint; the last one is of step {NUM_STEPS}"
    *_, last = terminal.text.splitlines()
    assert last == f"{where}; go on with: asyncrl {' '.join(map(str, arguments))}"


def test_ctrl_c_before_the_first_step_ends_at_once(tmp_path: Path) -> None:
    with CliRun(write_job(tmp_path, JOB), tmp_path / "run") as run:
        run.wait_for_child("trainer")
        run.interrupt()
        assert run.wait(60) == 130
    assert "\nended before the first checkpoint; go on with: asyncrl run " in run.output


def wait_for_all(pid: int) -> list[psutil.Process]:
    """Wait until a run has started its four processes."""
    deadline = time.monotonic() + 60
    while len(children := psutil.Process(pid).children(recursive=True)) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return children


# A run that does not come to its end


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A run that was stopped with Ctrl-C on its way, and what was seen of it."""
    folder = tmp_path_factory.mktemp("stopped")
    manifest = write_job(folder, JOB)
    settings = ["--set", f"spec.training.maxSteps={LONG}"]
    with CliRun(manifest, folder / "run", *settings) as run:
        run.wait_for_child("trainer")
        rival = asyncrl("run", manifest, "--out", run.folder.path, "--resume", *settings)
        children = run.children()
        run.wait_for_step(3)
        children += run.children()
        run.interrupt()
        code = run.wait()
        yield {"run": run, "code": code, "children": children, "rival": rival, "settings": settings}


def test_a_second_run_in_the_folder_is_refused_at_once(stopped: dict[str, Any]) -> None:
    run, rival = stopped["run"], stopped["rival"]
    assert (rival.returncode, rival.stdout) == (ExitCode.USAGE, "")
    assert rival.stderr == (
        f"asyncrl: {run.folder.path} is used by a run that is still going; end that one, "
        "or choose another --out\n"
    )


def test_ctrl_c_makes_a_checkpoint_and_stops(stopped: dict[str, Any]) -> None:
    run: CliRun = stopped["run"]
    assert stopped["code"] == 130
    steps = steps_of(run.folder)
    assert steps == list(range(1, len(steps) + 1)) and 3 <= len(steps) < LONG
    path = run.folder.path
    again = f"asyncrl run {path.parent / 'job.yaml'} --out {path} --resume {' '.join(stopped['settings'])}"
    *_, last = run.output.splitlines()
    assert last == f"stopped at step {len(steps)}; go on with: {again}"
    assert f"checkpoint: {path / 'checkpoints' / f'step-{len(steps):06d}'}\n" in run.output
    assert (path / "checkpoints" / f"step-{len(steps):06d}" / "policy").is_dir()
    assert have_ended(stopped["children"])


def test_a_killed_run_leaves_no_orphan_and_goes_on_at_once(stopped: dict[str, Any], tmp_path: Path) -> None:
    """Before that it had gone on after the stop; what was begun since the last checkpoint is repeated."""
    before: CliRun = stopped["run"]
    manifest, settings = before.folder.path.parent / "job.yaml", [*stopped["settings"], "--resume"]
    out = shutil.copytree(before.folder.path, tmp_path / "run")
    first = len(steps_of(before.folder)) + 1
    with CliRun(manifest, out, *settings) as run:
        run.wait_until("it reports", lambda: run.report is not None and run.report.attempt == 2)
        assert run.report is not None and run.report.last_checkpoint is not None
        assert run.report.last_checkpoint.step >= first - 1
        run.wait_for_step(first + 2)
        children = run.children()
        assert len(children) >= 5  # the scorer's too
        run.process.send_signal(signal.SIGKILL)
        assert run.process.wait(10) == -signal.SIGKILL
        assert have_ended(children)
        began = [json.loads(line) for line in run.folder.ledger.read_text().splitlines()]
        assert [line["began"] for line in began if "began" in line] == [0, first - 1]
    with CliRun(manifest, out, *settings) as run:
        assert run.wait() == 0, run.output
    assert steps_of(run.folder) == list(range(1, LONG + 1))
    assert_books_close(run.folder, LONG)
