"""A worker that cannot take a ticket is at rest until something may have changed."""

import asyncio
from typing import Any, cast

from asyncrl_runtime.contract.messages import DrainEngine, PolicyVersion
from asyncrl_runtime.rollout.concurrency import Taken
from asyncrl_runtime.rollout.engine_api import EngineLoad
from asyncrl_runtime.rollout.weight_updates import WeightUpdates
from asyncrl_runtime.rollout.worker import LOOK_SECONDS, Worker
from asyncrl_runtime.simulation.virtual_time import VirtualLoop, run_virtually
from support.fakes import UpdatableEngine
from support.messages.samples import make_job

GROUP_SIZE = 2


class Ticket:
    is_ticket = True
    data = b""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence


class Queue:
    """Has a ticket for whoever asks, and remembers when it was asked."""

    alive_seconds = 60.0

    def __init__(self) -> None:
        self.taken_at: list[float] = []

    async def take(self) -> Ticket:
        self.taken_at.append(asyncio.get_running_loop().time())
        return Ticket(len(self.taken_at))


class FitWorker(Worker):
    """A worker whose engine is fit when the test says so."""

    fit = False

    def is_fit(self) -> bool:
        return self.fit


def make_worker() -> FitWorker:
    """Return a worker with room for one group."""
    none, engine = cast(Any, None), cast(Any, UpdatableEngine())
    spec = make_job(f"sampling.groupSize={GROUP_SIZE}", f"rollout.maxConcurrency={GROUP_SIZE}").spec
    return FitWorker("w", spec, none, engine, WeightUpdates, none, none, none, lambda: 0.0)


def test_a_worker_without_a_fit_engine_does_not_poll_and_hears_of_one_at_once() -> None:
    async def check() -> None:
        worker, queue, loop = make_worker(), Queue(), asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        held: list[Taken] = []

        async def work(_: Any, slots: Taken) -> None:
            held.append(slots)
            await asyncio.Event().wait()

        pulling = asyncio.create_task(worker._pull(cast(Any, queue), work, GROUP_SIZE))
        await asyncio.sleep(60.0)
        assert loop.num_turns <= 3 * 60 / LOOK_SECONDS + 10 and not queue.taken_at
        worker.fit = True
        worker._observe(EngineLoad(0.0, 0, 0, 0), 0)  # the engine has answered its monitor
        await asyncio.sleep(0.1)
        assert queue.taken_at == [60.0], "at once, and one: there is room for no other"
        before, began = loop.num_turns, loop.time()
        await asyncio.sleep(60.0)
        assert loop.num_turns - before <= 3 * 60 / LOOK_SECONDS + 10
        held[0].close()
        await asyncio.sleep(0.1)
        assert queue.taken_at == [60.0, began + 60.0]
        worker.stop()
        await asyncio.wait_for(pulling, 0.1)

    run_virtually(check())


def test_a_worker_says_at_once_that_its_engine_is_drained() -> None:
    """The trainer waits for it, and looks again when it hears of it."""

    async def check() -> None:
        worker = make_worker()
        told: list[str] = []

        class Broker:
            def beat_now(self) -> None:
                told.append(worker._latest_heartbeat().engine_state)

        worker._broker = cast(Any, Broker())
        worker._engine.weights.version = PolicyVersion(1, 0)
        worker._monitor._is_up = True
        slots = worker._slots.take(GROUP_SIZE)
        slots.free_one()
        await worker._updates.handle(DrainEngine(version=PolicyVersion(1, 1)))
        assert told == []
        slots.close()
        assert told == ["drained"]

    run_virtually(check())
