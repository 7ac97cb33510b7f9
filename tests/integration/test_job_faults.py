"""Engines and workers die, or are told to end, in mid work: what they held goes on elsewhere."""

import asyncio
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from asyncrl_api.job import AsyncRLJob
from asyncrl_runtime.contract.messages import (
    Sample,
    SampleProgress,
    floats_from_bytes,
    ids_from_bytes,
)
from asyncrl_runtime.rollout.session import sampling_seed
from asyncrl_runtime.transport.streams import ACK_WAIT_SECONDS
from support.engines.tiny_models import tiny_model
from support.jobs.job_harness import JobHarness, build_job
from support.jobs.job_witness import Engine, Witness, finish
from support.jobs.nats_server import NatsServer
from support.jobs.replay import logprob_error, replay

TWO_ENGINES: dict[str, Any] = {
    "model": {"contextLength": 256},
    "sampling": {"groupSize": 2, "maxNewTokens": 200},
    "training": {"batchSize": 4, "maxSteps": 3},
    "staleness": {"maxVersions": 0},
    "gpuBudget": {"total": 3},
    "rollout": {"maxConcurrency": 4},
}
"""Two tickets for each engine make a batch. Answers are so long that they are streamed."""
EXACT = 1e-4
"""Largest difference of log-probs that rounding in batches of other shapes makes in float32."""


async def start_all(harness: JobHarness, witness: Witness, seconds: float) -> tuple[Engine, Engine]:
    """Start a job of two engines that take so long for a token, and wait until each has half the tickets."""
    harness.start_rollout(0)
    harness.start_rollout(1)
    engines = Engine(harness, 0), Engine(harness, 1)
    for engine in engines:
        await engine.slow_down(seconds)
    harness.start_trainer()
    await witness.until("both hold tickets", lambda: len(witness.held(0)) == len(witness.held(1)) == 2)
    return engines


@pytest.mark.slow
async def test_tickets_of_a_killed_worker_go_to_another(own_nats: NatsServer, tmp_path: Path) -> None:
    with JobHarness(tmp_path / "run", own_nats, build_job(**TWO_ENGINES)) as harness:
        async with Witness(harness) as witness:
            _, other = await start_all(harness, witness, seconds=4)
            await other.slow_down(0)
            await witness.until("worker 1 has nothing to do", lambda: not witness.held(1))
            orphans = witness.held(0)
            harness.kill("rollout-0-worker")
            killed_at = time.monotonic()
            await witness.until(
                "another worker samples them", lambda: orphans <= witness.groups.keys(), ACK_WAIT_SECONDS / 4
            )
            print(f"\n{len(orphans)} tickets sampled {time.monotonic() - killed_at:.1f} s after the kill")
            assert {witness.groups[ticket].worker for ticket in orphans} == {"rollout-1"}
            await finish(harness)


@pytest.mark.slow
async def test_who_is_busy_is_not_taken_for_dead(
    own_nats: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """User code blocks one of two workers, both get a tenth of a CPU, and the trainer stands still."""
    monkeypatch.setenv("BLOCKS_ONCE", str(tmp_path))
    job = build_job(
        dataset={"source": "fault_data:many"},
        workflow={"type": "Custom", "class": "fault_data:BlocksOnce"},
        training={"batchSize": 4, "maxSteps": 8},
        gpuBudget={"total": 3},
    )
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        harness.start_rollout(0)
        harness.start_rollout(1)
        harness.start_trainer()
        harness.wait_until((tmp_path / "blocked").exists)
        for _ in range(40):
            for number, seconds in ((signal.SIGSTOP, 0.09), (signal.SIGCONT, 0.01)):
                harness.signal("rollout-0-worker", number)
                harness.signal("rollout-1-worker", number)
                await asyncio.sleep(seconds)
        harness.signal("trainer", signal.SIGSTOP)
        await asyncio.sleep(5)
        harness.signal("trainer", signal.SIGCONT)
        assert harness.wait("trainer") == 0
        sampled = Counter((tmp_path / "samples").read_text().splitlines())
        assert max(sampled.values()) == 2, "a group of two was sampled twice"
        assert "held by nobody" not in harness.log_text("trainer")


@pytest.mark.slow
async def test_samples_of_a_killed_engine_go_on_elsewhere_with_what_they_earned(
    own_nats: NatsServer, tmp_path: Path, process_group: None
) -> None:
    job = build_job(
        **TWO_ENGINES
        | {"training": {"batchSize": 2, "maxSteps": 8, "learningRate": 1e-4}, "staleness": {"maxVersions": 8}}
    )
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        async with Witness(harness) as witness:
            engine, other = await start_all(harness, witness, seconds=0.15)
            cut_off = witness.held(0)
            await engine.until("num_used_tokens", lambda tokens: tokens > 150)
            await other.slow_down(0)
            await witness.until("others are trained meanwhile", lambda: harness.step >= 2)
            harness.kill("rollout-0-engine")
            await witness.until("they go on", lambda: cut_off <= witness.groups.keys())
            await finish(harness)
            history, groups = harness.history, witness.groups
            await witness.until(
                "all is recorded", lambda: all(t in groups for s in history.steps for t in s.tickets)
            )
        versions = list(replay(job.spec, tiny_model(), history, groups))
        model = AutoModelForCausalLM.from_pretrained(tiny_model())
        assert witness.parts.keys() >= cut_off
        for ticket in cut_off:
            group, part = groups[ticket], witness.parts[ticket]
            assert group.worker == "rollout-1" and part.num_failures == 0  # a kill is no failure
            for sample, progress in zip(group.samples, part.progress, strict=True):
                assert begins_with(sample, progress)
                assert sample.version_spans[0].version == 0
                assert sample.version_spans[-1].version >= 2
                assert logprob_error(model, versions, sample) < EXACT


def begins_with(sample: Sample, progress: SampleProgress) -> bool:
    """Whether the tokens that were put away are the sample's first ones, to the bit, and not all of them."""
    [turn] = progress.turns
    return (
        0 < len(turn.output_ids) < len(sample.response_ids)
        and sample.response_ids.startswith(turn.output_ids)
        and sample.behavior_logprobs.startswith(turn.logprobs)
        and sample.version_spans[0].end >= turn.version_spans[-1].end
    )


@pytest.mark.slow
async def test_a_worker_told_to_end_publishes_what_is_sampled_and_hands_on_the_rest(
    own_nats: NatsServer, tmp_path: Path
) -> None:
    job = build_job(
        **TWO_ENGINES,
        workflow={"type": "Custom", "class": "fault_data:FirstGroupShort"},
        reward={"function": "fault_data:slow_for_short"},
    )
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        async with Witness(harness) as witness:
            engine, other = await start_all(harness, witness, seconds=0.2)
            mine = witness.held(0)
            harness.signal("trainer", signal.SIGSTOP)  # all is sampled at version 0, and nobody reaps
            await other.slow_down(0)
            await engine.until("num_requests_total", lambda finished: finished == 2)
            harness.signal("rollout-0-worker", signal.SIGTERM)
            told_at = time.monotonic()
            assert await asyncio.to_thread(harness.wait, "rollout-0-worker") == 0
            print(f"\nthe worker ended {time.monotonic() - told_at:.1f} s after it was told")
            await witness.until("all is sampled", lambda: len(witness.groups) == 4)
            [finished] = [ticket for ticket in mine if witness.groups[ticket].worker == "rollout-0"]
            [handed_on] = mine - {finished}
            assert witness.parts.keys() == {handed_on}
            for sample, progress in zip(
                witness.groups[handed_on].samples, witness.parts[handed_on].progress, strict=True
            ):
                assert begins_with(sample, progress)
                ids, logprobs = await sample_undisturbed(job, other, handed_on, sample)
                assert ids_from_bytes(sample.response_ids).tolist() == ids
                assert np.abs(floats_from_bytes(sample.behavior_logprobs) - logprobs).max() < EXACT
            harness.signal("trainer", signal.SIGCONT)
            await finish(harness)


async def sample_undisturbed(
    job: AsyncRLJob, engine: Engine, ticket: int, sample: Sample
) -> tuple[list[int], list[float]]:
    """Return tokens and log-probs of a sample as an engine gives them that nothing interrupts."""
    answer = await engine.generate(
        input_ids=ids_from_bytes(sample.prompt_ids).tolist(),
        sampling_params={
            "max_new_tokens": job.spec.sampling.max_new_tokens,
            "temperature": job.spec.sampling.temperature,
            "sampling_seed": sampling_seed(job.spec.training.seed, ticket, sample.index, turn=0),
        },
        return_logprob=True,
    )
    return answer["output_ids"], [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
