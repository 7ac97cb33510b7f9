"""Runs the passes that are due: a bounded number at a time, and never two of one job."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from asyncrl_operator.api_server.api import ApiError
from asyncrl_operator.telemetry import Telemetry
from asyncrl_operator.workqueue import Key, WorkQueue

logger = logging.getLogger(__name__)

Reconcile = Callable[[Key], Awaitable[float | None]]

NUM_WORKERS = 8
GATHER_SECONDS = 0.1
"""Changes of a job's children within this time lead to one pass, since pods become ready in bursts."""
PASS_SECONDS = 120.0
"""A pass that takes longer is given up; each of its calls has a deadline of its own."""
LOUD_FAILURES = 5
"""The number of failed passes in a row after which each further one is logged as an error."""


class Passes:
    """Runs a pass over each job when something about it has changed, or when its time has come.

    Args:
        clock: Unix time, seconds.
    """

    def __init__(self, queue: WorkQueue, telemetry: Telemetry, clock: Callable[[], float]) -> None:
        self._queue = queue
        self._telemetry = telemetry
        self._clock = clock
        self._news = asyncio.Event()
        self._slots = asyncio.Semaphore(NUM_WORKERS)
        self._began: dict[Key, float] = {}

    def wake(self, key: Key, *, at_once: bool = False) -> None:
        """Schedule a pass over a job, because something about it has changed."""
        self._queue.add(key, self._clock() + (0.0 if at_once else GATHER_SECONDS))
        self._news.set()

    async def run(self, reconcile: Reconcile) -> None:
        """Run passes until cancelled.

        Args:
            reconcile: takes a step and returns the time of the next pass (Unix time), or None.
        """
        async with asyncio.TaskGroup() as group:
            while True:
                await self._slots.acquire()
                key = await self._next()
                self._began[key] = self._clock()
                group.create_task(self._pass(key, reconcile), name=f"pass {key}")

    def longest_pass_seconds(self) -> float:
        """Return how long the oldest pass has been under way."""
        return self._clock() - min(self._began.values(), default=self._clock())

    async def _next(self) -> Key:
        """Wait for the next job that is due."""
        while True:
            self._news.clear()
            if (key := self._queue.take(self._clock())) is not None:
                self._telemetry.queue_depth(len(self._queue))
                return key
            at = self._queue.next_at()
            try:
                async with asyncio.timeout(None if at is None else max(0.0, at - self._clock())):
                    await self._news.wait()
            except TimeoutError:
                pass

    async def _pass(self, key: Key, reconcile: Reconcile) -> None:
        """Run one pass; a failure is logged, is followed by another try, and does not hold up other jobs."""
        try:
            async with asyncio.timeout(PASS_SECONDS):
                wake_at = await reconcile(key)
        except ApiError as error:
            self._failed(key, error.reason or str(error.status), str(error), error.retry_after_seconds)
        except TimeoutError:
            self._failed(key, "Timeout", f"not done after {PASS_SECONDS:.0f} s")
        except Exception as error:  # it concerns one job; the others go on
            if not self._queue.num_failures(key):
                logger.exception("%s: the pass failed", key)
            self._failed(key, type(error).__name__, str(error))
        else:
            self._queue.done(key, wake_at)
        finally:
            self._telemetry.passed(self._clock() - self._began.pop(key))
            self._slots.release()
            self._news.set()

    def _failed(self, key: Key, reason: str, message: str, least_seconds: float = 0.0) -> None:
        self._telemetry.failed(reason)
        now = self._clock()
        delay = self._queue.failed(key, now, least_seconds) - now
        failures = self._queue.num_failures(key)
        level = logging.ERROR if failures >= LOUD_FAILURES else logging.WARNING
        logger.log(level, "%s: pass %d failed, next in %.1f s: %s", key, failures, delay, message)
