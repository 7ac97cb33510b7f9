"""What a job begins with: its own checkpoint, none, another's by path, never a stranger's; full disks."""

import asyncio
import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from asyncrl_api.exits import ExitCode
from asyncrl_api.marks import merge
from support.jobs.job_harness import JobHarness, build_job
from support.jobs.job_witness import Engine, Witness, finish
from support.jobs.nats_server import NatsServer

STEPS = 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobHarness]:
    """A job that is over; its engine and worker are still there, for other trainers under its name."""
    nats = NatsServer(tmp_path_factory.mktemp("nats"))
    nats.start()
    folder = tmp_path_factory.mktemp("finished") / "run"
    with JobHarness(folder, nats, build_job(training={"maxSteps": STEPS})) as harness:
        harness.start_rollout(0)
        harness.start_trainer()
        assert harness.wait("trainer") == 0
        yield harness
    nats.kill()


def begin(finished: JobHarness, folder: Path, **overrides: Any) -> JobHarness:
    """Return a job of the same name in `folder`, under a manifest with other values."""
    job = build_job(**merge({"training": {"maxSteps": STEPS}}, overrides))
    harness = JobHarness(folder, finished.nats, job)
    finished.attempt += 10  # of all trainers on this broker
    harness.attempt = finished.attempt
    return harness


def weights(harness: JobHarness) -> dict[str, Tensor]:
    return load_file(harness.folder.path / "export" / "final" / "model.safetensors")


@pytest.mark.slow
async def test_a_checkpoint_of_another_manifest_is_refused(finished: JobHarness, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder.path, folder)
    with begin(finished, folder, dataset={"seed": 18}) as harness:
        harness.start_trainer()
        await finish(harness, code=ExitCode.REFUSED)
        assert harness.log_tail("trainer", lines=1) == (
            f"asyncrl-runtime: checkpoint {folder}/checkpoints/step-000004 is from another manifest: "
            "spec.dataset.seed was 17, now it is 18; restore the value, or begin in another folder"
        )
    with begin(finished, folder, training={"maxSteps": STEPS + 2}) as harness:
        harness.start_trainer()
        result = await finish(harness)
        assert result.num_steps == STEPS + 2
        assert [line["step"] for line in harness.metrics] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
async def test_what_another_object_has_left_is_set_aside_whole(finished: JobHarness, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder.path, folder)
    (folder / "config.json").unlink()  # which holds the uid
    with begin(finished, folder) as harness:
        harness.start_trainer()
        result = await finish(harness)
        assert result.num_steps == STEPS and harness.history.uid == harness.config.uid
        assert {step.attempt for step in harness.history.steps} == {harness.attempt}
        assert "holds another object's checkpoints; they are now in " in harness.log_text("trainer")
    [aside] = folder.glob("set-aside-*")
    for left in [p for p in finished.folder.path.rglob("*") if p.is_file()]:
        place = left.relative_to(finished.folder.path)
        if place.parts[0] in ("checkpoints", "export", "ledger.jsonl", "metrics.jsonl"):
            assert (aside / place).read_bytes() == left.read_bytes()


@pytest.mark.slow
async def test_resume_never_begins_at_version_0(finished: JobHarness, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder.path, folder)
    with begin(finished, folder, checkpoint={"resume": "Never"}) as harness:
        harness.start_trainer()
        result = await finish(harness)
        assert result.num_steps == STEPS
        assert {step.attempt for step in harness.history.steps} == {harness.attempt}
        assert "restoring" not in harness.log_text("trainer")


@pytest.mark.slow
async def test_resume_from_path_begins_with_the_policy_of_another_job(
    finished: JobHarness, tmp_path: Path
) -> None:
    source = finished.folder.path / "checkpoints" / f"step-{STEPS:06d}"
    for path, code in [(tmp_path / "elsewhere", ExitCode.REFUSED), (source, ExitCode.DONE)]:
        overrides = {
            "checkpoint": {"resume": "FromPath", "resumePath": str(path)},
            "training": {"maxSteps": 1, "learningRate": 0.0},
        }
        with begin(finished, tmp_path / path.name, **overrides) as harness:
            harness.start_trainer()
            result = await finish(harness, code=code)
            if code:
                says = f"spec.checkpoint.resumePath: {path}: no checkpoint there (no folder policy)"
                assert says in harness.log_text("trainer")
                continue
            assert result.num_steps == 1
            before, after = weights(finished), weights(harness)
            assert all(before[name].equal(after[name]) for name in before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A run's folder on a file system of 24 MB, except for its logs; a checkpoint takes 3."""
    folder, logs = tmp_path / "run", tmp_path / "logs"
    folder.mkdir()
    logs.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    (folder / "logs").symlink_to(logs)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


async def fill(disk: Path) -> None:
    """Take all room, again and again: a checkpoint that is pruned leaves some."""
    with (disk / "filler").open("ab", buffering=0) as filler:
        while True:
            with contextlib.suppress(OSError):
                filler.write(bytes(shutil.disk_usage(disk).free))
            await asyncio.sleep(0.02)


async def remount(disk: Path, how: str, tries: int = 300) -> None:
    """Mount the disk again as `ro` or `rw`; it is busy while a file is open for writing."""
    for _ in range(tries):
        command = ["mount", "-o", f"remount,{how}", str(disk)]
        if (await asyncio.to_thread(subprocess.run, command, capture_output=True)).returncode == 0:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{disk} could not be mounted {how}")


@pytest.mark.slow
async def test_a_disk_that_is_full_and_then_read_only_is_waited_for_and_nothing_is_lost(
    own_nats: NatsServer, small_disk: Path
) -> None:
    """Neither ends the attempt: ledger, checkpoints, metrics and report are written when it is well again."""
    job = build_job(
        training={"maxSteps": 12},
        checkpoint={"everySteps": 1, "keep": 2},
        rollout={"maxConcurrency": 2},
    )
    with JobHarness(small_disk, own_nats, job) as harness:
        async with Witness(harness) as witness:
            harness.start_rollout(0)
            await Engine(harness, 0).slow_down(0.1)
            harness.start_trainer()
            await witness.until("step 2", lambda: harness.step >= 2)
            filling = asyncio.create_task(fill(small_disk))
            await witness.until("said", lambda: " (3 in a row)" in harness.log_text("trainer"))
            filling.cancel()
            await asyncio.wait([filling])
            (small_disk / "filler").unlink()
            await remount(small_disk, "ro")
            await witness.until("said", lambda: "the ledger: [Errno 30]" in harness.log_text("trainer"))
            await remount(small_disk, "rw")
            await Engine(harness, 0).slow_down(0)
            result = await finish(harness)
            assert result.num_steps == 12 and harness.history.attempt == 1
            assert [line["step"] for line in harness.metrics] == list(range(1, 13))
            assert "No space left on device; 0 MB were free there" in harness.log_text("trainer")
            assert "the ledger: written after" in harness.log_text("trainer")
            report = harness.report
            assert report is not None and (report.disk_fault, report.state) == ("", "Finished")
            assert load_file(small_disk / "export" / "final" / "model.safetensors")
