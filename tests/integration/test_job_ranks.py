"""A trainer of several ranks: they train what one would, and they end together."""

import asyncio
import signal
import time
from pathlib import Path

import psutil
import pytest
from transformers import AutoModelForCausalLM

from asyncrl_api.exits import ExitCode
from asyncrl_api.job import AsyncRLJob
from support.engines.tiny_models import tiny_model
from support.jobs.job_harness import JobHarness, build_job
from support.jobs.job_witness import Engine, Witness, finish
from support.jobs.nats_server import NatsServer
from support.jobs.replay import replay

ALL_IN_SHARES = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def build_job_of_two_ranks(zero_stage: int) -> AsyncRLJob:
    return build_job(
        training={"batchSize": 3, "maxSteps": 6, "learningRate": 1e-4},
        trainer={"deepspeed": {"zeroStage": zero_stage, "config": ALL_IN_SHARES if zero_stage == 3 else {}}},
        gpuBudget={"total": 3, "mode": "Manual", "split": {"trainer": 2, "rollout": 1}},
    )


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


async def check_weights(harness: JobHarness, witness: Witness) -> None:
    """Compare what two ranks have trained with what one rank makes of the same batches.

    One weight in a thousand may differ: where a gradient cancels to rounding noise, Adam divides noise by its
    own size, and the weight moves by a whole learning rate in either direction.
    """
    history, groups = harness.history, witness.groups
    await witness.until("all is recorded", lambda: all(t in groups for s in history.steps for t in s.tickets))
    *_, reference = replay(harness.job.spec, tiny_model(), history, groups)
    exported = AutoModelForCausalLM.from_pretrained(harness.folder.path / "export" / "final")
    for name, weight in exported.named_parameters():
        differs = (weight - reference[name]).abs() > 1e-5
        assert differs.float().mean() < 1e-3, f"{name}: {differs.sum()} of {differs.numel()} weights differ"
