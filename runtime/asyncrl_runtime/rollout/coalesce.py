"""Merges calls that are made at the same moment into one."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Coalescer(Generic[Item, Result]):
    """Collects the items of one turn of the event loop and hands them to one call.

    The samples of a group ask for tokens, and then for scores, at the same moment. So short answers cost one
    HTTP request and one trip to the reward process per group, although each sample is written as if it were
    alone.
    """

    def __init__(self, call: Callable[[Sequence[Item]], Awaitable[Sequence[Result]]]) -> None:
        self._call = call
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._running: set[asyncio.Task[None]] = set()

    async def __call__(self, item: Item) -> Result:
        """Return the result of one item, or raise what the common call raised."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((item, future))
        if len(self._waiting) == 1:
            loop.call_soon(self._start)  # runs after every sample that is ready now has asked
        return await future

    def _start(self) -> None:
        task = asyncio.get_running_loop().create_task(self._run(self._waiting))
        self._waiting = []
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run(self, waiting: list[tuple[Item, asyncio.Future[Result]]]) -> None:
        try:
            results = await self._call([item for item, _ in waiting])
            if len(results) != len(waiting):  # whoever got none would wait forever
                raise ValueError(f"{len(waiting)} were asked together, but {len(results)} answers came")
        except Exception as error:  # all who asked get the error, whatever it is
            for _, future in waiting:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), result in zip(waiting, results, strict=True):
            if not future.done():
                future.set_result(result)
