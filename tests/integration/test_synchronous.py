"""`maxVersions: 0` is the plain synchronous system: sample a batch, train it, sample the next."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncrl_api.job import AsyncRLJob
from asyncrl_api.ledger import History
from asyncrl_runtime.contract.messages import Group, floats_from_bytes, ids_from_bytes
from asyncrl_runtime.history.audit import audit
from asyncrl_runtime.trainer.update.packing import TrainingSample
from support.engines.tiny_models import tiny_model
from support.jobs.job_harness import JobHarness, Recorder, build_job, until
from support.jobs.naive_rl import NaiveTrainer
from support.jobs.nats_server import NatsServer

STEPS = 5


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "zero_stage"), [(1, 0), (2, 2)])
async def test_equals_a_plain_loop(own_nats: NatsServer, tmp_path: Path, ranks: int, zero_stage: int) -> None:
    job = build_job(
        staleness={"maxVersions": 0},
        sampling={"groupSize": 4, "maxNewTokens": 6},
        training={"batchSize": 3, "maxSteps": STEPS, "minibatches": 2, "learningRate": 1e-4},
        trainer={"deepspeed": {"zeroStage": zero_stage}},
        gpuBudget={"total": 2 + ranks, "mode": "Manual", "split": {"trainer": ranks, "rollout": 2}},
    )
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        async with Recorder(harness) as recorder:
            for replica in (0, 1):
                harness.start_rollout(replica)
            trainer = harness.start_trainer(ranks=ranks)
            assert await asyncio.to_thread(trainer.wait, 120) == 0, harness.log_tail("trainer")
            history = harness.history
            await until(lambda: all(t in recorder.groups for s in history.steps for t in s.tickets))
        assert audit(history).is_clean
        assert [sorted(step.tickets) for step in history.steps] == [
            [1, 2, 3],
            [4, 5, 6],
            [7, 8, 9],
            [10, 11, 12],
            [13, 14, 15],
        ]
        assert all(line["staleness_max"] == 0 for line in harness.metrics)
        assert all(line["mismatch_absolute_gap"] < 1e-5 for line in harness.metrics)
        assert all(
            span.version == step.version
            for step in history.steps
            for ticket in step.tickets
            for sample in recorder.groups[ticket].samples
            for span in sample.version_spans
        )
        reference = plain_loop(job, tiny_model(), history, recorder.groups)
        exported = AutoModelForCausalLM.from_pretrained(harness.folder.path / "export" / "final")
        before = AutoModelForCausalLM.from_pretrained(tiny_model()).state_dict()
        apart, moved = 0.0, 0.0
        for name, weight in exported.state_dict().items():
            apart = max(apart, float((weight - reference[name]).abs().max()))
            moved = max(moved, float((weight - before[name]).abs().max()))
        assert apart < 1e-5
        assert moved > 3e-4  # it has learned something to be equal in


def plain_loop(
    job: AsyncRLJob, model: Path, history: History, groups: dict[int, Group]
) -> dict[str, torch.Tensor]:
    """Train the recorded trajectories as a textbook would: padded by nothing, one sample at a time."""
    spec = job.spec
    trainer = NaiveTrainer(
        model,
        weight_decay=spec.training.weight_decay,
        gradient_clipping=spec.training.gradient_clipping,
        betas=(0.9, 0.95),
    )
    for step in history.steps:
        batch = [group_samples(groups[ticket]) for ticket in step.tickets]
        middle = len(batch) * 1 // spec.training.minibatches
        minibatches = [[s for group in part for s in group] for part in (batch[:middle], batch[middle:])]
        with torch.no_grad():
            proximal = [[trainer.logprobs(sample) for sample in part] for part in minibatches]
        for part, old in zip(minibatches, proximal, strict=True):
            trainer.update(part, old, spec.training.learning_rate, clip=0.2, max_weight=5.0)
    weights: dict[str, torch.Tensor] = trainer.model.state_dict()
    return weights


def group_samples(group: Group) -> list[TrainingSample]:
    """Samples with GRPO's advantages: reward minus the group's mean, over its standard deviation."""
    rewards = np.array([sample.reward for sample in group.samples])
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    return [
        TrainingSample(
            ticket=group.ticket,
            index=sample.index,
            prompt_ids=ids_from_bytes(sample.prompt_ids),
            response_ids=ids_from_bytes(sample.response_ids),
            behavior_logprobs=floats_from_bytes(sample.behavior_logprobs),
            sampled_mask=sample.mask(),
            loss_mask=sample.mask(),
            advantage=float(advantage),
            temperature=sample.temperature,
        )
        for sample, advantage in zip(group.samples, advantages, strict=True)
    ]
