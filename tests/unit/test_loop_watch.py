"""How late the event loop is, and how much of that is its own work."""

import asyncio

import pytest

from asyncrl_runtime.trainer.loop_watch import TICK_SECONDS, LoopLag, LoopWatch
from support.fakes import run_in_virtual_time


class Machine:
    """A loop whose callbacks take time and CPU as a test says, beside the virtual time of the loop."""

    def __init__(self) -> None:
        self.held = 0.0
        self.computed = 0.0
        self.watch = LoopWatch(lambda: asyncio.get_running_loop().time() + self.held, lambda: self.computed)

    def hold(self, seconds: float, *, computing: float) -> None:
        self.held += seconds
        self.computed += computing


def test_the_longest_delay_is_told_with_what_the_loop_computed_in_it_and_only_once() -> None:
    async def check() -> None:
        machine = Machine()
        watching = asyncio.create_task(machine.watch.run())
        await asyncio.sleep(10 * TICK_SECONDS + TICK_SECONDS / 2)
        assert machine.watch.take().lag == pytest.approx(0)
        machine.hold(0.3, computing=0.0)  # another process had the CPU
        await asyncio.sleep(TICK_SECONDS)
        machine.hold(0.1, computing=0.08)
        await asyncio.sleep(TICK_SECONDS)
        machine.hold(0.0, computing=TICK_SECONDS)  # busy, and never late
        await asyncio.sleep(TICK_SECONDS)
        found = machine.watch.take()
        assert (found.lag, found.own) == (pytest.approx(0.3), pytest.approx(0.08))
        assert machine.watch.take() == LoopLag()
        watching.cancel()

    run_in_virtual_time(check())


def test_a_watch_that_does_not_run_tells_of_no_delay() -> None:
    assert LoopWatch().take() == LoopLag()
