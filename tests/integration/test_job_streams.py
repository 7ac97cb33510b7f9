"""The broker dies, its streams are lost, or have no room: no ticket is lost or trained twice."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from asyncrl_api.names import JobNames, NatsAddress
from asyncrl_runtime.contract.broker import StreamMessage
from asyncrl_runtime.contract.messages import Group, encode
from asyncrl_runtime.trainer.books.books import Books
from asyncrl_runtime.trainer.job_streams import JobStreams
from asyncrl_runtime.transport.broker import Broker
from asyncrl_runtime.transport.trainer_end import TrainerEnd
from support.jobs.job_harness import JobHarness, build_job
from support.jobs.job_witness import Engine, Witness, finish
from support.jobs.nats_server import NatsServer
from support.messages.samples import make_sample

LONG_JOB: dict[str, Any] = {
    "training": {"maxSteps": 24},
    "checkpoint": {"everySteps": 4},
}


@pytest.mark.slow
async def test_a_broker_that_comes_back_and_streams_that_are_lost(
    own_nats: NatsServer, tmp_path: Path
) -> None:
    """They are lost one after the other in one job, while it samples, and each is made again."""
    with JobHarness(tmp_path / "run", own_nats, build_job(**LONG_JOB)) as harness:
        names = harness.config.names
        says = "the trajectory stream is lost: open tickets are issued again"
        async with Witness(harness) as witness:

            async def is_noticed(times: int) -> None:
                """Before more steps: those whose groups had arrived need no stream, and may be the last."""
                await witness.until(
                    "the loss was noticed", lambda: harness.log_text("trainer").count(says) == times
                )

            harness.start_rollout(0)
            await Engine(harness, 0).slow_down(0.05)
            harness.start_trainer()

            async def go_on(steps: int = 2) -> None:
                goal = harness.step + steps
                await witness.until(f"step {goal}", lambda: harness.step >= goal)

            await go_on()
            own_nats.kill()
            await asyncio.sleep(1.5)  # long enough for every request in flight to fail
            own_nats.start()
            await go_on()
            own_nats.kill()
            own_nats.lose_files()
            own_nats.start()
            await is_noticed(1)
            await go_on()
            await witness.delete_stream(names.prompt_stream)
            await go_on()
            await witness.delete_stream(names.trajectory_stream)
            await is_noticed(2)
            await go_on()
            await Engine(harness, 0).slow_down(0)
            result = await finish(harness)
            assert result.num_steps == 24
        assert harness.log_text("trainer").count(says) == 2


@pytest.mark.slow
async def test_recorded_batches_that_are_lost_with_their_stream_leave_the_history(
    own_nats: NatsServer, tmp_path: Path
) -> None:
    """The trainer is down when the streams are lost, with steps recorded behind its checkpoint."""
    job = build_job(training={"maxSteps": 8}, checkpoint={"everySteps": 4})
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        harness.start_rollout(0)
        trainer = harness.start_trainer(kill_after="asyncrl_runtime.trainer.attempt:Attempt.train_step#6")
        await asyncio.to_thread(trainer.wait, 120)
        abandoned = harness.history.steps[4:]
        assert len(abandoned) == 2
        own_nats.kill()
        own_nats.lose_files()
        own_nats.start()
        harness.start_trainer()
        result = await finish(harness)
        assert result.num_steps == 8
        assert cuts(harness) == [{"attempt": 2, "cut": 4}]
        assert [step.attempt for step in harness.history.steps] == [1] * 4 + [2] * 4
        sampled_again = {ticket for step in harness.history.steps[4:] for ticket in step.tickets}
        assert {ticket for step in abandoned for ticket in step.tickets} <= sampled_again


@pytest.mark.slow
async def test_recorded_steps_are_given_up_before_a_checkpoint_knows_the_new_stream(
    own_nats: NatsServer, tmp_path: Path
) -> None:
    """If it were killed in between, the next attempt would repeat them with whatever is sampled then."""
    job = build_job(training={"maxSteps": 8}, checkpoint={"everySteps": 4})
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        harness.start_rollout(0)
        trainer = harness.start_trainer(kill_after="asyncrl_runtime.trainer.attempt:Attempt.train_step#6")
        await asyncio.to_thread(trainer.wait, 120)
        own_nats.kill()
        own_nats.lose_files()
        own_nats.start()
        trainer = harness.start_trainer(kill_after="asyncrl_runtime.trainer.attempt:Attempt._mend_streams")
        await asyncio.to_thread(trainer.wait, 120)
        assert cuts(harness) == [{"attempt": 2, "cut": 4}]
        harness.start_trainer()
        await finish(harness)
        assert [step.attempt for step in harness.history.steps] == [1] * 4 + [3] * 4


def cuts(harness: JobHarness) -> list[dict[str, int]]:
    """Return the lines of the ledger that give up what follows."""
    lines = [json.loads(line) for line in harness.folder.ledger.read_text().splitlines()]
    return [line for line in lines if "cut" in line]


@pytest.mark.slow
async def test_a_stream_that_fills_up_is_purged_and_one_that_is_full_loses_nothing(
    own_nats: NatsServer, tmp_path: Path
) -> None:
    """Some twelve groups fill the stream, twenty may be open, and no checkpoint is due for long."""
    job = build_job(
        messaging={"embedded": {"storage": {"size": "80Ki"}}},
        sampling={"groupSize": 8, "maxNewTokens": 48},
        training={"batchSize": 4, "maxSteps": 8},
        staleness={"maxVersions": 4},
        checkpoint={"everySteps": 1000},
    )
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        async with Witness(harness) as witness:
            harness.start_rollout(0)
            await Engine(harness, 0).slow_down(0.2)
            harness.start_trainer()
            await witness.until("the worker holds tickets", lambda: bool(witness.held(0)))
            harness.kill("trainer")
            await Engine(harness, 0).slow_down(0)
            await witness.until(
                "the stream is full", lambda: "StreamFull" in harness.log_text("rollout-0-worker")
            )
            harness.start_trainer()
            result = await finish(harness)
            assert result.num_steps == 8 and result.num_trained == 32
        said = harness.log_text("trainer")
        assert "nearly full: checkpoint" in said or "which the stream need not" in said


@pytest.mark.slow
async def test_the_older_checkpoint_can_be_restored_although_the_stream_was_purged_behind_the_newer(
    own_nats: NatsServer, tmp_path: Path
) -> None:
    """Some twelve groups fill the stream, and two checkpoints need those of eight steps."""
    job = build_job(
        messaging={"embedded": {"storage": {"size": "80Ki"}}},
        sampling={"groupSize": 8, "maxNewTokens": 48},
        training={"batchSize": 2, "maxSteps": 60},
        staleness={"maxVersions": 1},
        checkpoint={"everySteps": 4, "keep": 9},
    )
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        async with Witness(harness) as witness:
            harness.start_rollout(0)
            harness.start_trainer()
            checkpoints = harness.config.job_folder / "checkpoints"
            await witness.until(
                "the older checkpoint has its trajectories", lambda: any(checkpoints.glob("*/*.msgpack"))
            )
            await asyncio.sleep(0.2)  # until they are purged
            harness.kill("trainer")
            older = max(checkpoints.glob("*/*.msgpack")).parent  # another may be restorable no longer
            newer = [path for path in checkpoints.glob("step-*") if path > older]
            assert newer
            for path in newer:  # a damaged disk, say
                shutil.rmtree(path)
            harness.start_trainer()
            result = await finish(harness)
        assert f"restoring {older}" in harness.log_text("trainer")
        assert result.num_steps == 60 and cuts(harness) == []


async def test_a_trajectory_stream_that_goes_while_the_other_is_made_again_is_noticed(
    nats_address: NatsAddress, names: JobNames, tmp_path: Path
) -> None:
    """It would be made again with the other, and what had arrived through it would be awaited forever."""
    broker = await Broker.connect(nats_address, names, "controller")
    books = Books(build_job().spec)
    streams = JobStreams(TrainerEnd(broker, names, 2**28), books, {})
    await streams.open(None)
    first_identity = streams.identity
    group = Group(ticket=1, group_size=1, samples=(make_sample(0),))
    books.take(StreamMessage(1, names.trajectory(1), encode(group)))
    streams.requeue()
    await broker.jetstream.delete_stream(names.prompt_stream)
    await broker.jetstream.delete_stream(names.trajectory_stream)
    await streams.mend(pytest.fail)
    assert not streams.lost
    assert streams.identity != first_identity
    assert not books.inbox.arrived, "what came through the lost stream is believed to be there"
    await broker.close()
