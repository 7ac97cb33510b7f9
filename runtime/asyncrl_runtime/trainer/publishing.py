"""Publishes the policy's versions beside the training: at most one at a time, each from a copy.

Two versions are told apart. The trainer's is the number of steps that were trained: batches are judged by
it. The published one was offered to all engines: the gate goes by it, and so does who comes late. The
trainer's is ahead by one at most, since the copy of the next waits for the publication that is under way.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from typing import Any

from asyncrl_runtime.contract.messages import PolicyVersion
from asyncrl_runtime.trainer.seams import AttemptParts
from asyncrl_runtime.trainer.update.ranks import CopyWeights
from asyncrl_runtime.weights.engines import Published, UpdateSeconds

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often, within a step, engines are looked for that came late: as often as they are heard of."""

InTime = Callable[[Coroutine[Any, Any, Published]], Coroutine[Any, Any, Published | None]]
"""Returns the result of a publication; None if it was broken off, because the trainer is to stop."""


class Publishing:
    """The publications of one attempt."""

    def __init__(self, parts: AttemptParts, in_time: InTime) -> None:
        self._parts = parts
        self._books = parts.books
        self._in_time = in_time
        self._under_way: asyncio.Task[None] | None = None
        self._copied: int | None = None
        self._has_reached_engines = False
        self.seconds = 0.0
        """How long the last publication took."""
        self.wait_seconds = 0.0
        """How long the last trained step waited for the publication before it."""
        self.copy_seconds = 0.0
        """How long the last copy took; the trainer waits for it."""
        self.update_seconds = UpdateSeconds()

    async def offer(self, version: int) -> None:
        """Copy the weights, once the publication before has come to its end, and begin to publish them.

        Raises:
            WeightsRefused, ChecksumMismatch: a publication that was under way has failed with it.
        """
        await self.settle()
        began = self._parts.clock()
        await self._copy(version)
        self.copy_seconds = self._parts.clock() - began
        self._begin(version)

    async def settle_before_next(self) -> None:
        """Wait until nothing is being published, since another version is ready; count how long.

        Raises:
            WeightsRefused, ChecksumMismatch: the publication has failed with it.
        """
        began = self._parts.clock()
        await self.settle()
        self.wait_seconds = self._parts.clock() - began

    async def settle(self) -> None:
        """Wait until nothing is being published.

        Raises:
            WeightsRefused, ChecksumMismatch: the publication has failed with it.
        """
        if self._under_way is not None:
            await self._under_way
            self._under_way = None

    async def serve_late_engines(self, *, trainer_waits: bool) -> None:
        """Begin to bring engines to the published version that lack it, unless a publication is under way.

        Args:
            trainer_waits: whether the weights do not change now, so that they can be copied if need be: of a
                version that an earlier attempt published there is no copy.

        Raises:
            WeightsRefused, ChecksumMismatch: the last publication has failed with it.
        """
        if self._under_way is not None and not self._under_way.done():
            return
        await self.settle()
        version = self._books.published
        if not self._parts.weights.behind(self._label(version)):
            return
        if trainer_waits and version == self._books.version:
            await self._copy(version)
        if self._copied == version:
            self._begin(version)

    async def while_training(self, step: "asyncio.Future[Any]") -> None:
        """Serve engines that come late until a step is done."""
        while not step.done():
            await self.serve_late_engines(trainer_waits=False)
            await asyncio.wait({step}, timeout=LOOK_SECONDS)

    async def settled(self) -> None:
        """Wait for the publication that is under way now; what it fails with is told elsewhere."""
        if self._under_way is not None:
            await asyncio.wait({self._under_way})

    async def _copy(self, version: int) -> None:
        if self._copied != version:
            self._copied = None  # until it is whole
            await self._parts.ranks.run(CopyWeights())
            self._copied = version

    def _begin(self, version: int) -> None:
        self._under_way = asyncio.create_task(self._publish(version), name="publication")
        self._under_way.add_done_callback(self._ended)

    def _ended(self, publication: asyncio.Task[None]) -> None:
        """Wake the trainer if that changes anything.

        Not if no engine could take the version: those that drain, say, would be looked at again at once, and
        so on, until one of them says something new.
        """
        if publication.cancelled() or publication.exception() is not None or self._has_reached_engines:
            self._books.news.ring()

    async def _publish(self, version: int) -> None:
        began, label = self._parts.clock(), self._label(version)
        interrupt = self._books.live.rollout.interrupt
        self._has_reached_engines = False
        published = await self._in_time(self._parts.weights.publish(label, interrupt))
        if published is not None:
            await self._parts.streams.announce(label)
            self._tell(published)
        self.seconds = self._parts.clock() - began
        self._books.publish(version)  # only now: no new ticket meets old weights
        self._parts.metrics.update(step=self._books.published)

    def _tell(self, published: Published) -> None:
        if published.seconds is not None:
            self._has_reached_engines = True
            self.update_seconds = published.seconds
            told = asdict(published.seconds)
            self._parts.metrics.update(**{f"update_{what}_seconds": each for what, each in told.items()})

    def _label(self, version: int) -> PolicyVersion:
        return PolicyVersion(self._parts.attempt, version)
