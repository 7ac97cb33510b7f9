"""Steps that cannot be trained, and updates that cannot be applied: each has a way on, and no kill is one."""

import asyncio
import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncrl_api.exits import ExitCode
from asyncrl_runtime.contract.messages import Group, floats_to_bytes, ids_to_bytes
from support.engines.null_logprobs import spoil_answers
from support.engines.tiny_models import tiny_model
from support.jobs.cli_runs import CliRun, asyncrl, write_job
from support.jobs.job_harness import JobHarness, build_job
from support.jobs.job_witness import Witness, finish
from support.jobs.nats_server import NatsServer
from support.jobs.replay import replay
from support.messages.samples import make_group
from support.paths import USER_CODE
from support.user_code.fault_data import POISON

pytestmark = pytest.mark.slow


def ledger_lines(path: Path, field: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, path.read_text().splitlines()) if field in line]


def spoiled(ticket: int, **changes: bytes) -> Group:
    """A group as a worker of another version may have stored it; one of its samples is changed."""
    group = make_group(ticket)
    first = msgspec.structs.replace(group.samples[0], **changes)
    return msgspec.structs.replace(group, samples=(first, *group.samples[1:]))


async def test_a_trainer_killed_ten_times_within_a_step_discards_nothing(
    own_nats: NatsServer, tmp_path: Path
) -> None:
    with JobHarness(tmp_path / "run", own_nats, build_job(training={"maxSteps": 2})) as harness:
        harness.start_rollout(0)
        for _ in range(10):
            harness.start_trainer(kill_after="asyncrl_runtime.trainer.update.policy:Policy.update#1")
            assert await asyncio.to_thread(harness.wait, "trainer") == -signal.SIGKILL
        [recorded] = harness.history.steps
        harness.start_trainer()
        result = await finish(harness)
        assert harness.history.steps[0] == recorded
        assert set(result.discarded) <= {"leftover"}
        assert not ledger_lines(harness.folder.ledger, "failed")
        assert not ledger_lines(harness.folder.ledger, "cut")


async def test_samples_that_no_step_can_train_cost_their_groups_alone(
    own_nats: NatsServer, tmp_path: Path
) -> None:
    """One has a log-prob that is no number, one has tokens that a step cannot bear: no check sees that."""
    job = build_job(training={"maxSteps": 4}, dataset={"source": "fault_data:rows_and_poison"})
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        async with Witness(harness) as witness:
            harness.start_trainer()
            await witness.until("it waits", lambda: "WaitingForBatch" in str(harness.report))
            await witness.publish(spoiled(2, behavior_logprobs=floats_to_bytes([-1, math.nan, -1, -1])))
            await witness.publish(spoiled(3, response_ids=ids_to_bytes([7, *POISON])))
            harness.start_rollout(0)
            for _ in range(2):
                await finish(harness, code=ExitCode.STEP_FAILED)
                harness.start_trainer()
            result = await finish(harness)
        assert result.num_steps == 4
        assert {**result.discarded, "leftover": 0} == {"step_failed": 1, "unusable_number": 1, "leftover": 0}
        failed, cut = (ledger_lines(harness.folder.ledger, field) for field in ("failed", "cut"))
        assert [line["attempt"] for line in failed] == [1, 2]
        assert all(line["tickets"] == [3] and "IndexError" in line["cause"] for line in failed)
        given_up = {"step_failed": [3], "unusable_number": [2]}  # the second was discarded by that very step
        assert cut == [{"attempt": 3, "cut": failed[0]["failed"], "discards": given_up}]


async def test_answers_of_an_engine_with_log_probs_that_are_no_numbers_cost_their_samples_alone(
    own_nats: NatsServer, tmp_path: Path
) -> None:
    job = build_job(training={"maxSteps": 4}, sampling={"groupSize": 5})
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        async with Witness(harness) as witness:
            harness.start_rollout(0, spoil_answers)
            harness.start_trainer()
            result = await finish(harness)
            groups = witness.groups.values()
        assert result.num_steps == 4 and set(result.discarded) <= {"leftover"}
        *_, last = harness.metrics
        assert last["failed_samples"] >= 4
        failures = [failure for group in groups for failure in group.failures]
        assert {failure.reason for failure in failures} == {"generation_error"}
        assert any("null" in failure.message or "None" in failure.message for failure in failures)
        assert all(len(group.samples) >= 3 for group in groups)


async def test_a_gradient_that_is_not_finite_leaves_no_trace_in_the_policy(
    own_nats: NatsServer, tmp_path: Path, process_group: None
) -> None:
    job = build_job(
        training={"maxSteps": 6, "learningRate": 1e-4},
        algorithm={"advantage": "GroupCentered"},
        reward={"function": "fault_data:huge_for_some"},
    )
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        async with Witness(harness) as witness:
            harness.start_rollout(0)
            harness.start_trainer(kill_after="asyncrl_runtime.trainer.attempt:Attempt.train_step#5")
            assert await asyncio.to_thread(harness.wait, "trainer") == -signal.SIGKILL
            before = ledger_lines(harness.folder.ledger, "skipped")
            harness.start_trainer()
            result = await finish(harness)
            history, groups = harness.history, witness.groups
            trained = {ticket for step in history.steps for ticket in step.tickets}
            await witness.until("all is recorded", lambda: trained <= groups.keys())
        notes = ledger_lines(harness.folder.ledger, "skipped")
        assert notes[: len(before)] == before and len({note["version"] for note in notes}) == len(notes)
        assert result.num_without_effect == sum(len(note["tickets"]) for note in notes) > 0
        counted = {line["step"] - 1: line["skipped_updates"] for line in harness.metrics}
        assert counted == {step.version: len(step.skipped) for step in history.steps}
        assert harness.report is not None and harness.report.skipped_updates > 0
        *_, reference = replay(job.spec, tiny_model(), history, groups)
        exported = AutoModelForCausalLM.from_pretrained(harness.folder.path / "export" / "final")
        for name, weight in exported.named_parameters():
            assert torch.allclose(weight, reference[name], rtol=0, atol=1e-6), name


def test_a_local_run_that_runs_out_of_memory_goes_on_with_smaller_micro_batches(tmp_path: Path) -> None:
    job = build_job(
        dataset={"source": "fault_data:rows_and_little_memory"},
        training={"maxSteps": 3, "minibatches": 1, "tokensPerMicroBatch": 64},
        failurePolicy={"trainer": {"maxRestarts": 0, "backoffSeconds": 0}},
    )
    manifest = write_job(tmp_path, job)
    shutil.copy(USER_CODE / "fault_data.py", tmp_path)
    with CliRun(manifest, tmp_path / "run") as run:
        assert run.wait(300) == 0, run.output
    [failed] = ledger_lines(run.folder.ledger, "failed")
    assert (failed["attempt"], failed["failed"], failed["out_of_memory_at"]) == (1, 0, 64)
    assert "OutOfMemoryError: CUDA out of memory" in failed["cause"]
    assert [line["num_micro_batches"] for line in run.steps] == [2, 2, 2]
    assert "trainer ended with exit code 74" in run.output
    audit = asyncrl("audit", run.folder.path)
    assert audit.returncode == 0 and "out_of_memory" not in audit.stdout
