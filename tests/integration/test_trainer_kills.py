"""A trainer killed after each line of its loop ends with the weights of one that was never killed."""

import asyncio
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncrl_runtime.history.audit import audit
from support.engines.tiny_models import tiny_model
from support.jobs.job_harness import JobHarness, Recorder, build_job, until
from support.jobs.nats_server import NatsServer
from support.jobs.replay import replay

JOB = "asyncrl_runtime.trainer.attempt:Attempt"
LINES = [
    "asyncrl_runtime.trainer.assemble:restore_books#1",  # restore
    f"{JOB}.publish_weights#1",
    f"{JOB}.next_batch#2",
    f"{JOB}.record#1",  # the ledger
    "asyncrl_runtime.trainer.update.policy:Policy.logprobs#1",  # proximal log-probs
    "asyncrl_runtime.trainer.update.step:compute_advantages#2",
    "asyncrl_runtime.trainer.update.policy:Policy.update#1",  # one minibatch of two
    f"{JOB}.train_step#1",
    f"{JOB}.advance#2",  # weights are published
    "asyncrl_runtime.trainer.books.checkpoints:Checkpoints.save#2",
    f"{JOB}.log_metrics#1",
    "asyncrl_runtime.history.ledger_writer:Ledger.end#1",
]


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
        *_, reference = replay(job.spec, tiny_model(), history, recorder.groups)
        exported = AutoModelForCausalLM.from_pretrained(harness.folder.path / "export" / "final")
        for name, weight in exported.named_parameters():
            assert torch.allclose(weight, reference[name], rtol=0, atol=1e-6), name
