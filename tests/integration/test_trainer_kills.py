"""A trainer killed after each line of its loop ends with the weights of one that was never killed."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from transformers import AutoModelForCausalLM

from asyncrl_runtime.contract.messages import Group
from asyncrl_runtime.trainer.controller import with_recorded_values
from asyncrl_runtime.trainer.policy import Policy
from asyncrl_runtime.trainer.schedule import learning_rate
from asyncrl_runtime.trainer.staleness import LiveGroup, assess
from asyncrl_runtime.trainer.step import plan_step, train_step
from asyncrl_runtime.transport.audit import audit
from asyncrl_runtime.transport.ledger import History
from job_harness import JobHarness, Recorder, build_job, until
from nats_server_fixture import NatsServer
from tiny_models import tiny_model

JOB = "asyncrl_runtime.trainer.job:TrainerJob"
LINES = [
    "asyncrl_runtime.trainer.run:restore_controller#1",  # restore
    f"{JOB}.publish_weights#1",
    f"{JOB}.next_batch#2",
    f"{JOB}.record#1",  # the ledger
    "asyncrl_runtime.trainer.policy:Policy.logprobs#1",  # proximal log-probs
    "asyncrl_runtime.trainer.step:compute_advantages#2",
    "asyncrl_runtime.trainer.policy:Policy.update#1",  # one minibatch of two
    f"{JOB}.train_step#1",
    f"{JOB}.advance#2",  # weights are published
    "asyncrl_runtime.trainer.checkpoints:Checkpoints.save#2",
    f"{JOB}.log_metrics#1",
    "asyncrl_runtime.transport.ledger:Ledger.end#1",
]


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
async def test_killed_after_each_line_and_restarted(
    own_nats: NatsServer, tmp_path: Path, process_group: None
) -> None:
    job = build_job(training={"maxSteps": 9})
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        async with Recorder(harness) as recorder:
            harness.start_rollout(0)
            for line in LINES:
                process = harness.start_trainer(kill_after=line)
                code = await asyncio.to_thread(process.wait, 90)
                assert code == -signal.SIGKILL, f"{line}\n{harness.log_tail('trainer')}"
            process = harness.start_trainer()
            assert await asyncio.to_thread(process.wait, 90) == 0, harness.log_tail("trainer")
            history = harness.history
            await until(lambda: all(t in recorder.groups for s in history.steps for t in s.tickets))
        result = audit(history)
        assert result.is_finished and result.is_clean and result.num_steps == 9
        assert [line["step"] for line in harness.metrics] == list(range(1, 10))
        reference = replay(job.spec, tiny_model(), history, recorder.groups)
        exported = AutoModelForCausalLM.from_pretrained(harness.folder.path / "export" / "final")
        for name, weight in exported.named_parameters():
            assert torch.allclose(weight, reference[name], rtol=0, atol=1e-6), name


def replay(spec: object, model: Path, history: History, groups: dict[int, Group]) -> dict[str, torch.Tensor]:
    """Train the recorded batches one after the other, in one go, and return the weights."""
    from asyncrl_api.job import Spec

    assert isinstance(spec, Spec)
    torch.manual_seed(0)
    policy = Policy(
        model,
        dtype=spec.model.dtype,
        training=spec.training,
        algorithm=spec.algorithm,
        deepspeed=spec.trainer.deepspeed,
    )
    for step in history.steps:
        recorded = with_recorded_values(spec, step.live)
        live: list[LiveGroup] = []
        for ticket in step.tickets:
            group = assess(groups[ticket], step.version, recorded.staleness, step.began, "None")
            assert isinstance(group, LiveGroup)
            live.append(group)
        plan = plan_step(
            live,
            algorithm=spec.algorithm,
            max_new_tokens=spec.sampling.max_new_tokens,
            num_minibatches=spec.training.minibatches,
            tokens_per_micro_batch=spec.training.tokens_per_micro_batch,
            learning_rate=learning_rate(
                spec.training.schedule,
                step.version,
                recorded.training.max_steps,
                spec.training.learning_rate,
            ),
        )
        train_step(policy, plan, spec.algorithm, rank=0)
    [bucket] = policy.parameters_in_buckets(2**40)
    return {name: tensor.clone() for name, tensor in bucket}
