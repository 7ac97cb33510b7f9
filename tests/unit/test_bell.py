"""The training loop and the issuer of tickets wake each when they should, and neither for nothing."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from asyncrl_api.run_config import RunningSpec
from asyncrl_runtime.contract.bell import Bell
from asyncrl_runtime.contract.broker import StreamMessage, TransportError
from asyncrl_runtime.contract.messages import Heartbeat, PolicyVersion, encode
from asyncrl_runtime.simulation.virtual_time import VirtualLoop, run_virtually
from asyncrl_runtime.trainer.attempt import FIRST_HEARTBEAT_SECONDS, LOOK_SECONDS, Attempt
from asyncrl_runtime.trainer.books.books import Batch, Books
from asyncrl_runtime.trainer.job_streams import JobStreams
from asyncrl_runtime.trainer.side_tasks import ISSUE_SECONDS, SideTasks
from asyncrl_runtime.weights.engines import Published
from asyncrl_runtime.weights.fleet import Fleet
from support.fakes import FakeJobQueues, FakeRanks, FakeStreams, FakeWeights, run_in_virtual_time
from support.jobs.attempt_parts import make_attempt_parts
from support.messages.samples import make_group, make_job

SLOW_SECONDS = 5.0
"""How long a broker that does not answer keeps a publish."""


class CountingBooks(Books):
    """Ends a loop that looks again and again while no time passes, which virtual time would never leave."""

    num_looks = num_limits = 0

    @property
    def limit(self) -> int:
        self.num_limits += 1
        assert self.num_limits < 500, "a busy loop"
        return super().limit

    def next_batch(self) -> Batch | None:
        self.num_looks += 1
        assert self.num_looks < 500, "a busy loop"
        return super().next_batch()


class SlowTickets:
    """Takes SLOW_SECONDS to store tickets; nothing ever comes back."""

    def __init__(self) -> None:
        self.issued_at: list[float] = []
        self.are_refused = False

    async def issue(self, payloads: Sequence[bytes], last_ticket: int) -> int:
        self.issued_at.append(asyncio.get_running_loop().time())
        await asyncio.sleep(SLOW_SECONDS)
        if self.are_refused:
            raise TransportError("no answer")
        return last_ticket + len(payloads)

    async def read_trajectories(self, start_sequence: int) -> AsyncGenerator[StreamMessage, None]:
        await asyncio.Event().wait()
        yield StreamMessage(start_sequence, "", b"")

    async def last_delivered_ticket(self) -> int:
        return 0

    async def hand_back(self, tickets: Iterable[int]) -> None:
        pass


class SlowWeights(FakeWeights):
    """Engines lack the weights once more, and to publish them takes a while."""

    async def publish(self, version: PolicyVersion, interrupt: str) -> Published:
        published = await super().publish(version, interrupt)
        await asyncio.sleep(1)
        return published


def make_heartbeat(version: PolicyVersion | None, engine_state: Any) -> Heartbeat:
    return Heartbeat(worker="w", incarnation="i", engine="e", engine_state=engine_state, version=version)


class Rig:
    """A training loop and an issuer around the same books."""

    def __init__(self, folder: Path) -> None:
        spec = make_job("training.batchSize=1", "training.minibatches=1").spec
        clock = asyncio.get_running_loop().time
        self.spec = spec
        self.books = CountingBooks(spec)
        self.tickets, self.weights = SlowTickets(), SlowWeights()
        ranks = FakeRanks(lambda command: None)
        parts = make_attempt_parts(folder, spec, self.books, FakeStreams(), ranks, self.weights, None, clock)
        self.attempt, self.fleet = Attempt(parts, None), parts.fleet
        streams = JobStreams(FakeJobQueues(), self.books, {})
        rows = [{"question": "1 + 1 ="}]
        self.side_tasks = SideTasks(
            self.tickets,
            streams,
            self.books,
            Fleet(clock),
            rows,
            RunningSpec(spec),
            folder / "live.json",
            clock,
        )

    def start(self) -> tuple[asyncio.Task[Any], asyncio.Task[Batch | None]]:
        loops = self.side_tasks.loops()
        issuing = asyncio.create_task(loops.pop("issue tickets"))
        for loop in loops.values():
            loop.close()
        return issuing, asyncio.create_task(self.attempt.next_batch())

    def arrive(self, ticket: int) -> None:
        self.books.take(StreamMessage(ticket, f"rl.j.traj.{ticket}", encode(make_group(ticket))))


def test_the_training_loop_does_not_spin_while_the_issuer_is_kept(tmp_path: Path) -> None:
    """The issuer cannot hear what rings for both until the broker answers."""

    async def check() -> None:
        rig = Rig(tmp_path)
        issuing, training = rig.start()
        await asyncio.sleep(FIRST_HEARTBEAT_SECONDS + 1.5)
        before = rig.books.num_looks
        rig.books.use(rig.spec)
        await asyncio.sleep(2 * LOOK_SECONDS)
        assert not training.done() and not issuing.done()
        assert 2 <= rig.books.num_looks - before <= 4
        for task in (issuing, training):
            task.cancel()

    run_in_virtual_time(check())


def test_no_loop_spins_while_the_broker_does_not_answer(tmp_path: Path) -> None:
    """Nor does any poll: a controller that waits is at rest."""

    async def check() -> None:
        rig = Rig(tmp_path)
        rig.tickets.are_refused = True
        issuing, training = rig.start()
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        await asyncio.sleep(FIRST_HEARTBEAT_SECONDS + 1.5)
        before = loop.num_turns
        rig.books.use(rig.spec)  # rings for both, and one of them cannot hear it
        await asyncio.sleep(60)
        assert not training.done() and not issuing.done()
        assert len(rig.tickets.issued_at) >= 5, "it tries again"
        num_waits = 60 / LOOK_SECONDS + 2 * len(rig.tickets.issued_at)
        assert loop.num_turns - before <= 4 * num_waits + 20
        for task in (issuing, training):
            task.cancel()

    run_virtually(check())


@pytest.mark.parametrize(
    ("beat", "is_rung"),
    [
        ({"version": None, "engine_state": "ready"}, True),
        ({"version": PolicyVersion(1, 0), "engine_state": "ready"}, False),
        ({"version": PolicyVersion(1, 0), "engine_state": "dirty"}, True),
        ({"version": None, "engine_state": "down"}, False),
    ],
)
def test_a_heartbeat_of_an_engine_without_the_weights_wakes_the_training_loop(
    tmp_path: Path, beat: dict[str, Any], is_rung: bool
) -> None:
    async def check() -> None:
        rig = Rig(tmp_path)
        issuing, training = rig.start()
        await asyncio.sleep(FIRST_HEARTBEAT_SECONDS + 1.5)
        before = rig.books.num_looks
        rig.fleet.heard(make_heartbeat(**beat))
        await asyncio.sleep(0.01)
        assert (rig.books.num_looks > before) is is_rung
        for task in (issuing, training):
            task.cancel()

    run_virtually(check())


def test_a_group_that_arrives_while_the_training_loop_is_busy_wakes_it_at_once(tmp_path: Path) -> None:
    """Though weights are published meanwhile, and the issuer looks at the gate in between."""

    async def check() -> None:
        rig = Rig(tmp_path)
        time = asyncio.get_running_loop().time
        issuing, training = rig.start()
        await asyncio.sleep(FIRST_HEARTBEAT_SECONDS + SLOW_SECONDS)
        rig.weights.are_behind = True
        published = len(rig.weights.published)
        while len(rig.weights.published) == published:
            await asyncio.sleep(0.01)
        began = time()
        await asyncio.sleep(0.1)
        rig.arrive(1)
        rig.books.gate_moved.ring()  # the issuer hears of something of its own
        await asyncio.wait({training})
        batch = training.result()
        assert batch is not None and batch.tickets == (1,)
        assert time() == pytest.approx(began + 0.1, abs=0.05), "the ring was lost"
        issuing.cancel()

    run_in_virtual_time(check())


def test_the_issuer_hears_that_the_gate_moved_while_it_published(tmp_path: Path) -> None:
    async def check() -> None:
        rig = Rig(tmp_path)
        issuing, training = rig.start()
        await asyncio.sleep(1)
        assert rig.tickets.issued_at == [0.0]
        higher = rig.spec.staleness.model_copy(update={"max_versions": 9})
        rig.books.use(rig.spec.model_copy(update={"staleness": higher}))
        await asyncio.sleep(SLOW_SECONDS)
        assert rig.tickets.issued_at == [0.0, SLOW_SECONDS]
        for task in (issuing, training):
            task.cancel()

    run_in_virtual_time(check())


def test_a_bell_is_heard_once_and_a_silent_one_only_delays() -> None:
    async def check() -> None:
        bell, time = Bell(), asyncio.get_running_loop().time
        bell.ring()
        bell.ring()
        await bell.wait(ISSUE_SECONDS)
        assert time() == 0.0
        await bell.wait(ISSUE_SECONDS)
        assert time() == ISSUE_SECONDS

    run_in_virtual_time(check())
