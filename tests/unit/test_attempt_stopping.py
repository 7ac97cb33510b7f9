"""What an attempt does when it is told to stop: within a step, and while it publishes."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncrl_api.ledger import read_ledger
from asyncrl_runtime.contract.broker import StreamMessage
from asyncrl_runtime.contract.messages import PolicyVersion, encode
from asyncrl_runtime.trainer.attempt import Attempt
from asyncrl_runtime.trainer.books.books import Books
from asyncrl_runtime.trainer.books.checkpoints import Checkpoints
from asyncrl_runtime.trainer.books.tickets import TicketBook
from asyncrl_runtime.trainer.update.failures import StepStopped
from asyncrl_runtime.trainer.update.ranks import Command, Train
from asyncrl_runtime.trainer.update.step import StepOutcome
from support.fakes import FakeRanks, FakeStreams, FakeWeights, run_in_virtual_time
from support.jobs.attempt_parts import make_attempt_parts
from support.messages.samples import make_group, make_job

GRACE = 300


class SlowWeights(FakeWeights):
    """A publisher that takes hours."""

    async def publish(self, version: PolicyVersion, interrupt: str) -> Any:
        await asyncio.sleep(10_000)
        return await super().publish(version, interrupt)


class Rig:
    """A job of two tickets a step, whose groups have arrived."""

    def __init__(self, folder: Path, train: Callable[[], Any], weights: FakeWeights | None = None) -> None:
        self.clock = asyncio.get_running_loop().time
        self.folder = folder
        self.train = train
        spec = make_job("training.batchSize=2", "training.minibatches=1").spec
        self.books = Books(spec)
        for ticket in range(1, 9):
            self.books.take(StreamMessage(ticket, f"rl.j.traj.{ticket}", encode(make_group(ticket))))
        self.ranks = FakeRanks(self.carry_out)
        self.weights = weights or FakeWeights()
        parts = make_attempt_parts(
            folder, spec, self.books, FakeStreams(), self.ranks, self.weights, None, self.clock
        )
        self.attempt = Attempt(parts, None)

    def carry_out(self, command: Command) -> Any:
        return self.train() if isinstance(command, Train) else None

    async def step(self) -> Any:
        batch = await self.attempt.next_batch()
        assert batch is not None
        await self.attempt.record(batch)
        return await self.attempt.train_step(batch)


def stopped(num_updates: int) -> Callable[[], Any]:
    def train() -> Any:
        raise StepStopped(num_updates)

    return train


def test_a_step_stopped_before_its_first_update_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    """The recorded step is open in its books, so that the next attempt repeats it."""

    async def check() -> None:
        rig = Rig(tmp_path, stopped(0))
        assert await rig.step() is None
        message = await rig.attempt.stop_within_step()
        assert message == (
            "stopped at step 0, before the first update of the next; it is repeated from the ledger"
        )
        [checkpoint] = Checkpoints(tmp_path, "uid").restorable()
        assert (checkpoint.position.version, checkpoint.position.stream_sequence) == (0, 0)
        assert not TicketBook.restore(checkpoint.position.book).is_closed(1)
        [step] = read_ledger(tmp_path / "ledger.jsonl").steps
        assert (step.version, step.tickets) == (0, (1, 2))

    run_in_virtual_time(check())


def test_a_half_step_is_never_saved(tmp_path: Path) -> None:
    async def check() -> None:
        rig = Rig(tmp_path, stopped(1))
        assert await rig.step() is None
        assert "after 1 updates of the next, which are lost" in await rig.attempt.stop_within_step()
        assert Checkpoints(tmp_path, "uid").restorable() == []

    run_in_virtual_time(check())


@pytest.mark.parametrize(("step_seconds", "must_stop"), [(100, False), (1500, True)])
def test_the_ranks_are_told_whether_the_step_fits_into_the_grace(
    tmp_path: Path, step_seconds: int, must_stop: bool
) -> None:
    async def check() -> None:
        rig = Rig(tmp_path, lambda: StepOutcome({}, ()))
        rig.attempt._steps._recent.append(step_seconds)
        said = list[bool]()

        def train() -> StepOutcome:
            said.append(rig.ranks.must_stop())
            return StepOutcome({}, ())

        rig.train = train
        await rig.step()
        rig.attempt.request_stop()
        with rig.attempt._steps.measured():
            said.append(rig.ranks.must_stop())
            await asyncio.sleep(GRACE - 1)
            said.append(rig.ranks.must_stop())
        assert said == [False, must_stop, True], "and not when the time is over, whatever was measured"

    run_in_virtual_time(check())


def test_a_stop_waits_for_weights_only_while_there_is_time_for_a_checkpoint(tmp_path: Path) -> None:
    async def check() -> None:
        rig = Rig(tmp_path, lambda: {}, SlowWeights())
        publishing = asyncio.create_task(rig.attempt.publish_weights())
        await asyncio.sleep(100)
        rig.attempt.request_stop()
        await publishing
        assert 100 + GRACE - 10 < rig.clock() < 100 + GRACE and rig.weights.published == []

    run_in_virtual_time(check())


def test_a_trainer_that_is_to_stop_publishes_nothing_new(tmp_path: Path) -> None:
    async def check() -> None:
        rig = Rig(tmp_path, lambda: StepOutcome({}, ()))
        batch = await rig.attempt.next_batch()
        assert batch is not None
        await rig.attempt.record(batch)
        before = len(rig.weights.published)
        rig.attempt.request_stop()
        await rig.attempt.advance(batch)
        assert len(rig.weights.published) == before and rig.attempt.version == 1

    run_in_virtual_time(check())
