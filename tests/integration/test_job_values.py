"""What a job's values decide while it runs: live fields, discards without end, who may take tickets."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from asyncrl_api.exits import ExitCode
from asyncrl_api.marks import merge
from asyncrl_runtime.contract.messages import CurrentVersion, PolicyVersion, encode
from support.jobs.job_harness import JobHarness, build_job
from support.jobs.job_witness import Engine, Witness, finish
from support.jobs.nats_server import NatsServer

ONE_BY_ONE: dict[str, Any] = {"rollout": {"maxConcurrency": 2}}
"""The worker takes one ticket at a time, so that others wait in the queue."""


def write_live(harness: JobHarness, **changes: Any) -> None:
    """Change live fields as a user would: the file is replaced at once."""
    live = merge(json.loads(harness.folder.live.read_text()), changes)
    replace_live(harness, json.dumps(live))


def replace_live(harness: JobHarness, text: str) -> None:
    scratch = harness.folder.live.with_suffix(".new")
    scratch.write_text(text)
    scratch.replace(harness.folder.live)


@pytest.mark.slow
async def test_live_values_are_taken_over_while_the_job_runs_and_bad_ones_change_nothing(
    own_nats: NatsServer, tmp_path: Path
) -> None:
    with JobHarness(tmp_path / "run", own_nats, build_job(**ONE_BY_ONE)) as harness:
        async with Witness(harness) as witness:
            harness.start_rollout(0)
            await Engine(harness, 0).slow_down(0.1)
            harness.start_trainer()
            await witness.until("step 1", lambda: harness.step >= 1)
            write_live(
                harness,
                training={"maxSteps": 12},
                staleness={"maxVersions": 1},
                sampling={"maxNewTokens": 5, "temperature": 0.5},
                rollout={"interrupt": "InPlace"},
            )
            await witness.until("the report says so", lambda: reported_steps(harness) == 12)
            good = harness.folder.live.read_text()
            for bad, says in [
                (good[:-2], f"live values in {harness.folder.live} are ignored: "),
                (good.replace('"InPlace"', '"Sometimes"'), "rollout.interrupt"),
                (json.dumps(merge(json.loads(good), {"training": {"batchSize": 7}})), "training.batchSize"),
                (
                    json.dumps(merge(json.loads(good), {"training": {"maxSteps": 3}})),
                    "spec.training.maxSteps may only grow; it stays 12",
                ),
            ]:
                replace_live(harness, bad)
                await witness.until(says, functools.partial(is_logged, harness, says))
            told = json.loads(await witness.get("live"))  # as the workers hear it
            assert told["rollout"]["interrupt"] == "InPlace" and told["training"]["maxSteps"] == 12
            await Engine(harness, 0).slow_down(0)
            result = await finish(harness)
            assert result.num_steps == 12
        last = harness.history.steps[-1]
        assert last.live["staleness"]["maxVersions"] == 1 and last.live["training"]["maxSteps"] == 12
        for ticket in last.tickets:
            for sample in witness.groups[ticket].samples:
                assert sample.temperature == 0.5 and sample.num_tokens <= 5
        assert any(sample.num_tokens > 5 for sample in witness.groups[1].samples)
        assert harness.log_text("trainer").count("are ignored") == 3  # said once, not every second


def is_logged(harness: JobHarness, text: str) -> bool:
    return text in harness.log_text("trainer")


def reported_steps(harness: JobHarness) -> int:
    report = harness.report
    return report.max_steps if report is not None else 0


@pytest.mark.slow
async def test_a_prompt_longer_than_the_context_is_given_up_and_replaced(
    own_nats: NatsServer, tmp_path: Path
) -> None:
    job = build_job(dataset={"source": "fault_data:some_too_long"})
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        harness.start_rollout(0)
        harness.start_trainer()
        result = await finish(harness)
        assert result.num_trained == 12 and set(result.discarded) == {"prompt_too_long"}
        log = harness.log_text("trainer")
        assert "is discarded: prompt_too_long: the prompt has " in log
        assert " tokens; spec.model.contextLength is 64" in log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "reason", "cause", "remedy"),
    [
        (
            {"dataset": {"source": "fault_data:all_too_long"}},
            "prompt_too_long",
            "spec.model.contextLength is 64",
            "raise spec.model.contextLength",
        ),
        (
            {"reward": {"function": "fault_data:raises", "maxAttempts": 2}},
            "failed",
            "reward_error: ",
            "see why samples fail",
        ),
        (
            {"reward": {"function": "fault_data:constant"}, "sampling": {"filter": "DropUniformGroups"}},
            "uniform",
            "",
            "set spec.sampling.filter to None",
        ),
    ],
    ids=["prompts", "rewards", "filter"],
)
async def test_discards_without_end_end_the_job(
    own_nats: NatsServer, tmp_path: Path, overrides: dict[str, Any], reason: str, cause: str, remedy: str
) -> None:
    with JobHarness(
        tmp_path / "run", own_nats, build_job(**merge({"sampling": {"maxDiscardsInARow": 20}}, overrides))
    ) as harness:
        harness.start_rollout(0)
        harness.start_trainer()
        await finish(harness, code=ExitCode.UNUSABLE)
        last_words = harness.log_tail("trainer", lines=1)
        words = rf"(2\d) prompt groups in a row were discarded, and none was kept \({reason}: \1\)"
        assert re.search(words, last_words), last_words  # more may arrive before it is decided
        assert remedy in last_words
        log = harness.log_text("trainer")
        assert all(f"ticket {n} is discarded: {reason}" in log for n in (1, 2)) and cause in log


@pytest.mark.slow
async def test_an_engine_whose_weights_are_too_old_takes_no_tickets(
    own_nats: NatsServer, tmp_path: Path
) -> None:
    with JobHarness(tmp_path / "run", own_nats, build_job(**ONE_BY_ONE)) as harness:
        async with Witness(harness) as witness:
            harness.start_rollout(0)
            await Engine(harness, 0).slow_down(0.3)
            harness.start_trainer()
            await witness.until("the worker holds a ticket", lambda: bool(witness.held(0)))
            harness.kill("trainer")
            far_ahead = CurrentVersion(version=PolicyVersion(1, 100), max_versions=2)
            await witness.put("version", encode(far_ahead))
            await witness.until("it has none", lambda: not witness.held(0))
            for _ in range(3):
                beat = await witness.next_word("rollout-0")
                assert beat.engine_state == "ready" and beat.held == ()
            assert await witness.num_messages(harness.config.names.prompt_stream) > 0
            await Engine(harness, 0).slow_down(0)
            harness.start_trainer()
            await finish(harness)


@pytest.mark.slow
async def test_with_interrupt_drain_no_sample_spans_versions(own_nats: NatsServer, tmp_path: Path) -> None:
    job = build_job(
        sampling={"groupSize": 2, "maxNewTokens": 40},
        training={"batchSize": 2, "maxSteps": 8},
        rollout={"interrupt": "Drain"},
        staleness={"maxVersions": 4},
    )
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        async with Witness(harness) as witness:
            harness.start_rollout(0)
            await Engine(harness, 0).slow_down(0.02)  # a sample outlasts a step
            harness.start_trainer()
            await finish(harness)
        spans = [s.version_spans for group in witness.groups.values() for s in group.samples]
        assert all(len(each) == 1 for each in spans)
        assert len({each[0].version for each in spans}) >= 3  # the engine was updated nevertheless
