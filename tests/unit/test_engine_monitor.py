"""When an engine counts as a new one, when as down, and why it must be restarted."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from asyncrl_runtime.contract.messages import PolicyVersion
from asyncrl_runtime.rollout.engine_api import EngineAbsent, EngineLost, SamplingRequest
from asyncrl_runtime.rollout.engine_monitor import (
    DIRTY_SECONDS,
    DOWN_SECONDS,
    PROBE_INTERVAL_SECONDS,
    STUCK_SECONDS,
    EngineMonitor,
)
from asyncrl_runtime.rollout.weight_updates import WeightUpdates
from support.fakes import UpdatableEngine, run_in_virtual_time

V0 = PolicyVersion(1, 0)
A_FEW_POLLS = 4 * PROBE_INTERVAL_SECONDS


class Rig:
    """A monitor at work on an engine, in virtual time."""

    def __init__(self) -> None:
        self.engine = UpdatableEngine()
        self.updates = WeightUpdates(self.engine, lambda: self.engine.num_requests)
        self.monitor = EngineMonitor(
            self.engine,
            self.updates,
            lambda: self.engine.num_requests,
            lambda load, num_running: None,
            asyncio.get_running_loop().time,
        )

    def become_ready(self) -> None:
        """Put the engine into the state after an update."""
        self.engine.weights.version, self.engine.own_label = V0, str(V0)

    def fail(self, error: Exception | None) -> None:
        self.engine.faults = {} if error is None else {"label": error}

    async def faults_after(self, seconds: float) -> tuple[str | None, str | None]:
        """Return what is wrong shortly before that time has passed, and shortly after."""
        await asyncio.sleep(seconds - A_FEW_POLLS)
        before = self.monitor.fault()
        await asyncio.sleep(2 * A_FEW_POLLS)
        return before, self.monitor.fault()


@asynccontextmanager
async def watched() -> AsyncIterator[Rig]:
    rig = Rig()
    running = asyncio.create_task(rig.monitor.run())
    await asyncio.sleep(A_FEW_POLLS)
    yield rig
    running.cancel()


def virtually(check: Callable[[Rig], Awaitable[None]]) -> None:
    async def run() -> None:
        async with watched() as rig:
            await check(rig)

    run_in_virtual_time(run())


def test_an_engine_is_down_until_it_answers_and_empty_until_it_has_weights() -> None:
    async def check(rig: Rig) -> None:
        rig.become_ready()
        await asyncio.sleep(A_FEW_POLLS)
        assert rig.monitor.state == "ready" and rig.monitor.incarnation == 1

    async def first() -> None:
        rig = Rig()
        assert rig.monitor.state == "down" and rig.monitor.fault() is None

    run_in_virtual_time(first())
    virtually(check)


def test_an_engine_that_does_not_answer_is_down_and_restarted_if_it_stays_so() -> None:
    async def check(rig: Rig) -> None:
        rig.become_ready()
        await asyncio.sleep(A_FEW_POLLS)
        rig.engine.hangs = True
        before, after = await rig.faults_after(DOWN_SECONDS)
        assert rig.monitor.state == "down" and before is None
        assert after is not None and after.startswith("it has not answered for")

    virtually(check)


def test_an_engine_that_is_not_there_is_being_started_already() -> None:
    async def check(rig: Rig) -> None:
        rig.fail(EngineAbsent("connection refused"))
        await asyncio.sleep(10 * DOWN_SECONDS)
        assert rig.monitor.state == "down" and rig.monitor.fault() is None

    virtually(check)


def test_requests_in_flight_end_with_their_engine() -> None:
    async def check(rig: Rig) -> None:
        request = asyncio.create_task(rig.engine.stream(SamplingRequest([1], 1, 1.0, seed=0)))
        rig.fail(EngineAbsent("connection refused"))
        await asyncio.sleep(A_FEW_POLLS)
        assert isinstance(request.exception(), EngineLost)

    virtually(check)


def test_another_process_of_an_engine_has_nothing_of_the_one_before() -> None:
    async def check(rig: Rig) -> None:
        rig.become_ready()
        rig.updates.is_dirty = True
        rig.engine.start()
        rig.fail(EngineAbsent("connection refused"))
        await asyncio.sleep(A_FEW_POLLS)
        rig.fail(None)
        await asyncio.sleep(A_FEW_POLLS)
        assert rig.monitor.state == "empty" and rig.monitor.incarnation == 2
        assert rig.engine.weights.version is None

    virtually(check)


def test_an_engine_that_restarts_between_two_polls_is_known_by_its_label() -> None:
    async def check(rig: Rig) -> None:
        rig.become_ready()
        await asyncio.sleep(A_FEW_POLLS)
        rig.engine.start()
        await asyncio.sleep(A_FEW_POLLS)
        assert rig.monitor.state == "empty" and rig.monitor.incarnation == 2

    virtually(check)


def test_an_engine_that_answers_again_with_our_label_is_the_same() -> None:
    async def check(rig: Rig) -> None:
        rig.become_ready()
        rig.updates.is_dirty = True
        await asyncio.sleep(A_FEW_POLLS)
        rig.engine.hangs = True
        await asyncio.sleep(DOWN_SECONDS / 2)
        rig.engine.hangs = False
        await asyncio.sleep(A_FEW_POLLS)
        assert rig.monitor.state == "dirty" and rig.monitor.incarnation == 1

    virtually(check)


def test_an_engine_left_in_mid_update_by_an_earlier_worker_is_taken_over() -> None:
    async def check() -> None:
        rig = Rig()
        rig.engine.is_paused = rig.engine.has_session = True
        running = asyncio.create_task(rig.monitor.run())
        await asyncio.sleep(A_FEW_POLLS)
        assert rig.monitor.state == "empty" and not rig.engine.has_session
        assert "take_over" in rig.engine.made
        running.cancel()

    run_in_virtual_time(check())


def test_an_engine_that_missed_a_deadline_is_down_although_it_answers() -> None:
    async def check(rig: Rig) -> None:
        rig.become_ready()
        rig.updates.has_missed_deadline = True
        await asyncio.sleep(A_FEW_POLLS)
        assert rig.monitor.state == "down"
        assert rig.monitor.fault() == "it did not answer a control call within its deadline"

    virtually(check)


def test_an_engine_that_waits_too_long_for_weights_is_restarted() -> None:
    async def check(rig: Rig) -> None:
        rig.updates.is_dirty = True
        before, after = await rig.faults_after(DIRTY_SECONDS)
        assert before is None
        assert after is not None and after.startswith("it has waited for a full set of weights for")

    virtually(check)


def test_the_wait_for_weights_is_counted_anew_each_time() -> None:
    async def check(rig: Rig) -> None:
        for _ in range(3):
            rig.updates.is_dirty = True
            await asyncio.sleep(0.7 * DIRTY_SECONDS)
            rig.updates.is_dirty = False
            await asyncio.sleep(A_FEW_POLLS)
        assert rig.monitor.fault() is None

    virtually(check)


def test_an_engine_that_samples_nothing_for_a_request_is_restarted() -> None:
    async def check(rig: Rig) -> None:
        rig.become_ready()
        rig.engine.num_requests = 1
        before, after = await rig.faults_after(STUCK_SECONDS)
        assert before is None and after is not None and after.startswith("it has sampled no token for")

    virtually(check)


@pytest.mark.parametrize("why", ["tokens come", "rewards alone are waited for", "an update goes on"])
def test_an_engine_that_has_a_reason_is_not_stuck(why: str) -> None:
    async def check(rig: Rig) -> None:
        rig.become_ready()
        rig.engine.num_requests = 0 if why == "rewards alone are waited for" else 1
        if why == "an update goes on":
            rig.updates.is_dirty = True
        for _ in range(int(1.5 * STUCK_SECONDS)):
            rig.engine.num_tokens += why == "tokens come"
            await asyncio.sleep(1)
            assert rig.monitor.fault() is None
        rig.updates.is_dirty = False  # the update is over, or a reward has come and the next turn begins
        rig.engine.num_requests = 1
        assert rig.monitor.fault() is None
        before, after = await rig.faults_after(STUCK_SECONDS)
        assert before is None and after is not None

    virtually(check)
