"""A version is published beside the next step: which version is where meanwhile, and who waits for whom."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from asyncrl_runtime.contract.broker import StreamMessage
from asyncrl_runtime.contract.messages import Group, PolicyVersion, encode
from asyncrl_runtime.trainer.attempt import Attempt
from asyncrl_runtime.trainer.books.books import Batch, Books
from asyncrl_runtime.trainer.train import train
from asyncrl_runtime.trainer.update.ranks import Command, Export, Train
from asyncrl_runtime.trainer.update.step import StepOutcome
from asyncrl_runtime.weights.engines import Published, WeightsRefused
from support.fakes import FakeRanks, FakeStreams, FakeWeights, run_in_virtual_time
from support.jobs.attempt_parts import make_attempt_parts
from support.messages.samples import make_job, make_sample

STEP_SECONDS, MAX_STEPS = 30.0, 4


class SlowWeights(FakeWeights):
    """A publisher that takes as long as a test says."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.num_running = self.num_begun = 0
        self.fault: Exception | None = None
        self.reaches_nobody = False

    async def publish(self, version: PolicyVersion, interrupt: str) -> Published:
        assert self.num_running == 0, "one publication at a time"
        self.num_running += 1
        self.num_begun += 1
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.num_running -= 1
        if self.fault is not None:
            raise self.fault
        if self.reaches_nobody:
            assert self.num_begun < 100, "they are asked without end"
            return Published()
        return await super().publish(version, interrupt)


class SlowRanks(FakeRanks):
    """Ranks whose steps take their time."""

    async def run(self, command: Command) -> Any:
        if isinstance(command, Train):
            await asyncio.sleep(STEP_SECONDS)
        return await super().run(command)


class Rig:
    """A job of two tickets a step, whose groups arrive as soon as they may be issued."""

    def __init__(self, folder: Path, publish_seconds: float, *, max_versions: int = 1) -> None:
        self.clock = asyncio.get_running_loop().time
        self.folder = folder
        self.weights = SlowWeights(publish_seconds)
        spec = make_job(
            "training.batchSize=2",
            "training.minibatches=1",
            "sampling.groupSize=2",
            f"training.maxSteps={MAX_STEPS}",
            f"staleness.maxVersions={max_versions}",
        ).spec
        self.books = Books(spec)
        self.books.issued(0)
        self.ranks = SlowRanks(self._carry_out)
        parts = make_attempt_parts(
            folder, spec, self.books, FakeStreams(), self.ranks, self.weights, None, self.clock
        )
        self.metrics = parts.metrics
        self.attempt = Attempt(parts, None)
        self.sampling = asyncio.create_task(self._sample())

    def _carry_out(self, command: Command) -> Any:
        if isinstance(command, Export):
            command.folder.mkdir(parents=True)
        return StepOutcome({}, ()) if isinstance(command, Train) else None

    async def _sample(self) -> None:
        while True:
            assert self.books.version - self.books.published <= 1
            while self.books.num_issued < self.books.limit:
                ticket = self.books.num_issued + 1
                self.books.issued(ticket)
                spans = ((1, self.books.published, 4),)
                samples = tuple(make_sample(index, spans=spans, reward=float(index)) for index in range(2))
                group = Group(ticket=ticket, group_size=2, samples=samples)
                self.books.take(StreamMessage(ticket, f"rl.j.traj.{ticket}", encode(group)))
            await asyncio.sleep(0.1)

    async def step(self) -> Batch:
        batch = await self.attempt.next_batch()
        assert batch is not None
        await self.attempt.record(batch)
        assert await self.attempt.train_step(batch) is not None
        await self.attempt.advance(batch)
        return batch

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def virtually(check: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await check()

    run_in_virtual_time(run())


def test_the_next_step_is_trained_while_a_version_travels_and_the_gate_waits_for_it(tmp_path: Path) -> None:
    async def check() -> None:
        rig = Rig(tmp_path, publish_seconds=20)
        await rig.attempt.publish_weights()
        await rig.step()
        assert (rig.books.version, rig.books.published, rig.books.limit) == (1, 0, 4)
        began = rig.clock()
        await asyncio.sleep(19)
        assert (rig.books.published, rig.books.limit) == (0, 4)
        await asyncio.sleep(2)
        assert (rig.books.published, rig.books.limit) == (1, 6)
        await rig.step()
        assert rig.clock() - began < 21 + STEP_SECONDS + 1

    virtually(check)


def test_the_next_copy_waits_for_the_publication_before_it(tmp_path: Path) -> None:
    async def check() -> None:
        rig = Rig(tmp_path, publish_seconds=40)
        assert await train(rig.attempt) == ""
        waits = [line["publish_wait_seconds"] for line in rig.lines]
        assert waits[0] == 0 and waits[1] == pytest.approx(40 - STEP_SECONDS, abs=1)
        assert [line["published_step"] for line in rig.lines] == [0, 1, 2, 3]
        assert rig.weights.published[-1].version == MAX_STEPS and rig.weights.num_running == 0

    virtually(check)


def test_with_no_staleness_allowed_nothing_is_sampled_beside_a_step(tmp_path: Path) -> None:
    async def check() -> None:
        rig = Rig(tmp_path, publish_seconds=20, max_versions=0)
        began = rig.clock()
        assert await train(rig.attempt) == ""
        assert rig.clock() - began >= MAX_STEPS * (20 + STEP_SECONDS)
        assert [line["published_step"] for line in rig.lines] == [0, 1, 2, 3]
        assert rig.books.last_ticket == 2 * MAX_STEPS

    virtually(check)


def test_an_engine_that_comes_in_mid_step_gets_the_published_version_at_once(tmp_path: Path) -> None:
    async def check() -> None:
        rig = Rig(tmp_path, publish_seconds=2)
        await rig.attempt.publish_weights()
        step = asyncio.create_task(rig.step())
        await asyncio.sleep(10)
        rig.weights.published.clear()
        rig.weights.are_behind = True
        await asyncio.sleep(4)
        assert not step.done() and [each.version for each in rig.weights.published] == [0]
        await step

    virtually(check)


def test_the_report_of_a_stop_is_of_the_last_step_though_nobody_was_offered_it(tmp_path: Path) -> None:
    async def check() -> None:
        rig = Rig(tmp_path, publish_seconds=1)
        await rig.attempt.publish_weights()
        step = asyncio.create_task(rig.step())
        await asyncio.sleep(STEP_SECONDS / 2)
        rig.attempt.request_stop()
        await step
        assert (rig.books.version, rig.books.published) == (1, 0)
        await rig.attempt.stop()
        assert (rig.metrics.report.state, rig.metrics.report.step) == ("Stopped", 1)

    virtually(check)


def test_engines_that_take_nothing_yet_are_asked_only_when_the_trainer_is_woken(
    tmp_path: Path,
) -> None:
    """They drain, say. Each publication that reached nobody used to wake the trainer to begin another."""

    async def check() -> None:
        rig = Rig(tmp_path, publish_seconds=0)
        rig.sampling.cancel()
        rig.weights.reaches_nobody = rig.weights.are_behind = True
        await rig.attempt.publish_weights()
        waiting = asyncio.create_task(rig.attempt.next_batch())
        await asyncio.sleep(1)
        began = rig.weights.num_begun
        rig.books.news.ring()  # a heartbeat
        await asyncio.sleep(1)
        assert rig.weights.num_begun == began + 1
        rig.weights.reaches_nobody = False
        rig.books.news.ring()
        await asyncio.sleep(1)
        assert rig.weights.published and not waiting.done()
        waiting.cancel()

    virtually(check)


def test_weights_that_are_refused_for_good_end_the_job_though_they_travel_beside(tmp_path: Path) -> None:
    async def check() -> None:
        rig = Rig(tmp_path, publish_seconds=1)
        await rig.attempt.publish_weights()
        rig.weights.fault = WeightsRefused("no such weight")
        with pytest.raises(WeightsRefused):
            await rig.step()
            await rig.step()

    virtually(check)
