"""Ranks whose disk takes longer than they wait for each other, and ranks that must stop within a step."""

import os
import signal
from pathlib import Path

import pytest

from asyncrl_api.exits import ExitCode
from support.jobs.job_harness import JobHarness, build_job
from support.jobs.job_witness import Engine, Witness, finish
from support.jobs.nats_server import NatsServer
from support.jobs.two_ranks import build_job_of_two_ranks, check_weights
from support.paths import FAULTS


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("PYTHONPATH", str(FAULTS), prepend=os.pathsep)
    return monkeypatch


@pytest.mark.slow
async def test_a_disk_slower_than_the_ranks_wait_holds_nobody_up(
    own_nats: NatsServer, tmp_path: Path, faulty: pytest.MonkeyPatch
) -> None:
    """The first flush of a checkpoint, and the final export, take 8 s; the ranks wait 5 s for each other.

    Besides, rank 1's flush fails in the end, which costs this checkpoint and nothing else.
    """
    faulty.setenv("ASYNCRL_FAULT", "slow-disk")
    job = build_job(
        training={"maxSteps": 3},
        trainer={"deepspeed": {"zeroStage": 2}},
        gpuBudget={"total": 3, "mode": "Manual", "split": {"trainer": 2, "rollout": 1}},
    )
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        harness.start_rollout(0)
        harness.start_trainer(ranks=2)
        result = await finish(harness)
        assert result.num_steps == 3 and harness.attempt == 1
        assert (harness.folder.path / "export" / "final" / "config.json").is_file()
        assert "rank 1: [Errno 5] Input/output error; " in harness.log_text("trainer")
        saved = {path.name for path in (harness.folder.path / "checkpoints").glob("step-*")}
        assert saved == {"step-000000", "step-000003"}
        assert "is gone" not in harness.log_text("trainer")


@pytest.mark.slow
async def test_ranks_stop_within_a_step_that_does_not_fit_into_the_grace(
    own_nats: NatsServer, tmp_path: Path, process_group: None, faulty: pytest.MonkeyPatch
) -> None:
    """Once before the first update, and once after it; the repeated steps give the weights as without."""
    slow_from = tmp_path / "slow"
    faulty.setenv("ASYNCRL_FAULT", "slow-passes")
    faulty.setenv("ASYNCRL_SLOW_FROM", str(slow_from))
    job = build_job_of_two_ranks(1, trainer={"terminationGracePeriodSeconds": 8})
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        async with Witness(harness) as witness:
            harness.start_rollout(0)
            await Engine(harness, 0).slow_down(0.1)
            for passes, done in [("all", "before the first update"), ("training", "after 1 updates")]:
                harness.start_trainer(ranks=2)
                await until_steps(witness, harness, len(harness.history.steps) + 2)
                slow_from.write_text(passes)
                await witness.until("within a step", (tmp_path / "inside").exists)
                harness.signal("trainer", signal.SIGTERM)
                await finish(harness, code=ExitCode.TRY_AGAIN)
                version = len(harness.history.steps) - 1
                says = f"stopped at step {version}, {done} of the next"
                assert says in harness.log_text("trainer"), harness.log_tail("trainer")
                saved = {path.name for path in (harness.folder.path / "checkpoints").glob("step-*")}
                assert f"step-{version + 1:06d}" not in saved
                if passes == "all":
                    assert f"step-{version:06d}" in saved
                slow_from.unlink()
                (tmp_path / "inside").unlink()
            await Engine(harness, 0).slow_down(0)
            harness.start_trainer(ranks=2)
            result = await finish(harness)
            assert result.num_steps == job.spec.training.max_steps
            await check_weights(harness, witness)


async def until_steps(witness: Witness, harness: JobHarness, num: int) -> None:
    """Wait until so many steps have been recorded; all but the last are trained."""
    await witness.until("a step", lambda: len(harness.history.steps) >= num)
