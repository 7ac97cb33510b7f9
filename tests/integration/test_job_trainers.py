"""The trainer is killed, told to end, or superseded: one history survives, and no step of it is lost."""

import asyncio
import json
import signal
from pathlib import Path

import pytest

from asyncrl_api.exits import ExitCode
from support.jobs.job_harness import JobHarness, build_job
from support.jobs.job_witness import Engine, Witness, finish
from support.jobs.nats_server import NatsServer


@pytest.mark.slow
async def test_a_killed_trainer_repeats_what_it_recorded_and_sampling_goes_on_meanwhile(
    own_nats: NatsServer, tmp_path: Path
) -> None:
    job = build_job(training={"maxSteps": 8}, checkpoint={"everySteps": 4}, rollout={"maxConcurrency": 2})
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        async with Witness(harness) as witness:
            harness.start_rollout(0)
            await Engine(harness, 0).slow_down(0.1)
            harness.start_trainer(kill_after="asyncrl_runtime.trainer.attempt:Attempt.train_step#6")
            assert await asyncio.to_thread(harness.wait, "trainer") == -signal.SIGKILL
            recorded, num_sampled = harness.history.steps, len(witness.groups)
            await witness.until("sampling goes on", lambda: len(witness.groups) > num_sampled)
            await Engine(harness, 0).slow_down(0)
            harness.start_trainer()
            result = await finish(harness)
            assert result.num_steps == 8
        assert harness.history.steps[: len(recorded)] == recorded
        assert [(line["step"], line["attempt"], line["is_repeat"]) for line in harness.metrics] == [
            *((step, 1, False) for step in (1, 2, 3, 4)),
            *((step, 2, True) for step in (5, 6)),
            *((step, 2, False) for step in (7, 8)),
        ]


@pytest.mark.slow
async def test_a_trainer_told_to_end_leaves_a_checkpoint_and_one_superseded_leaves_the_history(
    own_nats: NatsServer, tmp_path: Path
) -> None:
    job = build_job(training={"maxSteps": 20}, checkpoint={"everySteps": 1000}, rollout={"maxConcurrency": 2})
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        async with Witness(harness) as witness:
            harness.start_rollout(0)
            await Engine(harness, 0).slow_down(0.1)
            harness.start_trainer()
            await witness.until("step 2", lambda: harness.step >= 2)
            harness.signal("trainer", signal.SIGTERM)
            await finish(harness, code=ExitCode.TRY_AGAIN)
            stopped_at = len(harness.history.steps)
            assert f"stopped at step {stopped_at}, after a checkpoint" in harness.log_text("trainer")

            first = harness.start_trainer()
            await witness.until("two steps more", lambda: harness.step >= stopped_at + 2)
            harness.start_trainer()
            assert await asyncio.to_thread(first.wait, 60) == ExitCode.TRY_AGAIN
            await Engine(harness, 0).slow_down(0)
            result = await finish(harness)
            assert result.num_steps == 20
        lines = [json.loads(line) for line in harness.folder.ledger.read_text().splitlines()]
        attempts = [line["attempt"] for line in lines]
        assert attempts == sorted(attempts) and attempts[-1] == 3
        assert "Superseded: attempt 3 " in harness.log_text("trainer")
        by_step = {line["step"]: line for line in harness.metrics}
        assert list(by_step) == list(range(1, 21))
        assert not by_step[stopped_at]["is_repeat"] and by_step[stopped_at + 1]["is_repeat"]
