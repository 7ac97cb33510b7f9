"""Watches how late the event loop is: whatever blocks it holds up tickets, the lease and heartbeats alike."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

TICK_SECONDS = 0.02
"""How often the loop is asked to wake the watch."""


@dataclass(frozen=True)
class LoopLag:
    """The longest delays of the event loop in some time, in seconds."""

    lag: float = 0.0
    """How late a timer rang."""
    own: float = 0.0
    """How much of such a delay the loop's own thread computed; in the rest it waited, for a disk, for another
    thread that held the interpreter, or for a CPU."""


class LoopWatch:
    """Notes the longest delays between two calls of `take`. One that is not run notes none.

    Args:
        clock: returns monotonic seconds.
        computed: returns the CPU seconds of the loop's thread.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        computed: Callable[[], float] = time.thread_time,
    ) -> None:
        self._clock = clock
        self._computed = computed
        self._longest = LoopLag()

    async def run(self) -> None:
        """Watch until cancelled, from a task of the loop that is watched."""
        while True:
            began, computed = self._clock(), self._computed()
            await asyncio.sleep(TICK_SECONDS)
            lag = max(0.0, self._clock() - began - TICK_SECONDS)
            own = min(lag, self._computed() - computed)
            self._longest = LoopLag(max(self._longest.lag, lag), max(self._longest.own, own))

    def take(self) -> LoopLag:
        """Return the longest delays since the last call."""
        longest, self._longest = self._longest, LoopLag()
        return longest
