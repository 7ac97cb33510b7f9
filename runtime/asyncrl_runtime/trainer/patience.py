"""Writes that must not be lost: tried again, with a limit, while a disk is full, read-only or away."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
PATIENCE_SECONDS = 600.0
"""How long a write is tried again. After that the trainer ends, and its next attempt tries."""

T = TypeVar("T")
InThread = Callable[[Callable[[], T]], Awaitable[T]]


async def in_thread(function: Callable[[], T]) -> T:
    """Call a function without holding up the event loop."""
    return await asyncio.to_thread(function)


class Patience:
    """Tries what a disk does not take, again and again.

    Args:
        say: shows a message in the report; empty when all is well again.
        stopping: set when the trainer is to end; then nothing is tried again.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        stopping: asyncio.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say = say
        self._stopping = stopping
        self._clock = clock

    async def insist(self, what: str, write: Callable[[], Awaitable[T]]) -> T:
        """Return what `write` returns, once it succeeds.

        Args:
            what: names what is written, in the log and in the report.

        Raises:
            OSError: it has failed for PATIENCE_SECONDS, or the trainer is to stop.
        """
        began, pause, num_failed = self._clock(), FIRST_PAUSE_SECONDS, 0
        while True:
            try:
                result = await write()
            except OSError as error:
                num_failed += 1
                waited = self._clock() - began
                if waited >= PATIENCE_SECONDS or self._stopping.is_set():
                    log.error("%s: given up after %d tries in %.0f s: %s", what, num_failed, waited, error)
                    raise
                message = (
                    f"{what}: {error}; tried again in {pause:.0f} s, for {PATIENCE_SECONDS:.0f} s in all"
                )
                log.warning("%s (%d)", message, num_failed)
                self._say(message)
                await self._wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                continue
            if num_failed:
                log.warning("%s: written after %d failures", what, num_failed)
                self._say("")
            return result

    async def _wait(self, seconds: float) -> None:
        """Wait, but not while the trainer is to stop."""
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return
