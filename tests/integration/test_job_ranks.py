"""A trainer of several ranks: they train what one would, and they end together."""

import asyncio
import signal
import time
from pathlib import Path

import psutil
import pytest

from asyncrl_api.exits import ExitCode
from support.jobs.job_harness import JobHarness
from support.jobs.job_witness import Engine, Witness, finish
from support.jobs.nats_server import NatsServer
from support.jobs.two_ranks import build_job_of_two_ranks, check_weights


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
async def test_ranks_end_together_when_one_is_killed_and_go_on_from_the_checkpoint(
    own_nats: NatsServer, tmp_path: Path, process_group: None, zero_stage: int
) -> None:
    job = build_job_of_two_ranks(zero_stage)
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        async with Witness(harness) as witness:
            harness.start_rollout(0)
            await Engine(harness, 0).slow_down(0.1)
            launcher = psutil.Process(harness.start_trainer(ranks=2).pid)
            await witness.until("step 3", lambda: harness.step >= 3)
            ranks = launcher.children()
            assert [rank.environ()["RANK"] for rank in ranks] == ["0", "1"]
            ranks[1].kill()
            killed_at = time.monotonic()
            assert await asyncio.to_thread(harness.wait, "trainer") == -signal.SIGKILL
            print(f"\nall ranks ended {time.monotonic() - killed_at:.1f} s after one was killed")
            assert not any(rank.is_running() for rank in ranks)
            await Engine(harness, 0).slow_down(0)
            harness.start_trainer(ranks=2)
            await finish(harness)
            await check_weights(harness, witness)


@pytest.mark.slow
async def test_ranks_told_to_end_make_a_checkpoint_together(
    own_nats: NatsServer, tmp_path: Path, process_group: None
) -> None:
    job = build_job_of_two_ranks(zero_stage=1)
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        async with Witness(harness) as witness:
            harness.start_rollout(0)
            await Engine(harness, 0).slow_down(0.1)
            harness.start_trainer(ranks=2)
            await witness.until("step 1", lambda: harness.step >= 1)
            harness.signal("trainer", signal.SIGTERM)
            await finish(harness, code=ExitCode.TRY_AGAIN)
            stopped_at = len(harness.history.steps)
            assert f"stopped at step {stopped_at}, after a checkpoint" in harness.log_text("trainer")
            await Engine(harness, 0).slow_down(0)
            harness.start_trainer(ranks=2)
            await finish(harness)
            assert not any(line["is_repeat"] for line in harness.metrics)
            await check_weights(harness, witness)
