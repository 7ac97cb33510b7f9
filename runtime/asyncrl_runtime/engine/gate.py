"""Decides who may pass when: generation, pauses and weight updates, on the event loop's side."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class Gate:
    """A readers-writer lock in front of a pause, as in SGLang.

    A generation passes unless the engine is paused or a writer holds or awaits the lock, and it counts as
    a reader until it is answered. Weight updates are writers: without a pause they wait for all readers;
    in a pause they pass at once, since nothing is sampled. Belongs to one event loop.
    """

    def __init__(self) -> None:
        self.is_paused = False
        self.num_readers = 0
        self._num_writers = 0
        """The number of writers that hold the lock or wait for it; new readers wait for both kinds."""
        self._is_writing = False
        self._waiters: list[asyncio.Future[None]] = []

    async def enter(self) -> None:
        """Pass as a reader; the caller must call `leave` once the request is answered."""
        await self._wait_until(lambda: not self.is_paused and not self._num_writers)
        self.num_readers += 1

    def leave(self) -> None:
        self.num_readers -= 1
        self._wake()

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Hold the lock as a writer, or pass at once in a pause."""
        if self.is_paused:
            yield
            return
        self._num_writers += 1
        try:
            await self._wait_until(lambda: not self.num_readers and not self._is_writing)
            self._is_writing = True
            try:
                yield
            finally:
                self._is_writing = False
        finally:
            self._num_writers -= 1
            self._wake()

    def pause(self) -> None:
        self.is_paused = True

    def resume(self) -> None:
        self.is_paused = False
        self._wake()

    async def wait_for_readers(self) -> None:
        """Wait until every generation that has passed is answered."""
        await self._wait_until(lambda: not self.num_readers)

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
