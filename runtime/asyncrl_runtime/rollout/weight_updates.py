"""A worker's part in weight epochs: the controller asks over NATS, the worker calls its own engine.

The four phases are those of docs/decisions/0004-weight-epochs.md. An engine is at a version only when every
call answered 200. Whatever fails, the engine ends in one of two known states: sampling at its old version
(nothing of the update had arrived), or `dirty`: paused until it has everything again.
"""

import asyncio
import logging
from functools import partial

from asyncrl_runtime.contract.messages import (
    BucketLayout,
    CommitUpdate,
    ControlReply,
    ControlRequest,
    JoinGroup,
    PrepareUpdate,
    ReceiveWeights,
)
from asyncrl_runtime.rollout.engine_api import Engine, IncomingBucket
from asyncrl_runtime.rollout.engine_updates import CountRunning, EngineUpdates, UpdateFailed

log = logging.getLogger(__name__)


class WeightUpdates(EngineUpdates):
    """Drives one engine through epochs in which it gets all weights through a process group."""

    def __init__(self, engine: Engine, num_running: CountRunning) -> None:
        super().__init__(engine, num_running)
        self._group: str | None = None
        self._layout: tuple[BucketLayout, ...] = ()
        self._interrupt = "Retract"
        self._num_buckets: int | None = None  # begun to be received in the open update; None outside of one
        self._paused_at = 0.0
        self._watchdog: asyncio.TimerHandle | None = None
        self.is_dirty = False

    @property
    def state(self) -> str:
        if self._num_buckets is not None:
            return "updating"
        return "dirty" if self.is_dirty else super().state

    def engine_restarted(self) -> None:
        super().engine_restarted()
        self._stop_watchdog()
        self._group = self._num_buckets = None
        self.is_dirty = False

    @property
    def bucket(self) -> int:
        return self._num_buckets or 0

    async def _phase(self, request: ControlRequest) -> ControlReply:
        meant: tuple[str | None, ...] = getattr(request, "groups", (self._group,))
        if self._group not in meant:  # it came to all, and others are meant
            message = f"asked for group {', '.join(map(str, meant))}, but this engine is in {self._group}"
            return ControlReply(ok=False, message=message)
        self._stop_watchdog()
        match request:
            case JoinGroup():
                await self._join(request)
            case PrepareUpdate():
                await self._prepare(request)
            case ReceiveWeights():
                await self._receive(request)
            case CommitUpdate():
                return await self._commit(request)
            case _:
                raise UpdateFailed(f"this engine takes no {type(request).__name__}")
        return ControlReply(ok=True)

    async def _join(self, request: JoinGroup) -> None:
        await self._leave_group()
        await self._in_time(self._engine.join_group(request))
        self._group, self._layout = request.group, request.layout

    async def _prepare(self, request: PrepareUpdate) -> None:
        """Pause the engine and open the update."""
        if self._num_buckets is not None:
            await self._end_update()  # its epoch was given up after this engine was ready
        self._interrupt = request.interrupt
        self._seen.num_updates_begun += 1
        self._num_buckets = 0
        self._paused_at = asyncio.get_running_loop().time()
        await self._in_time(self._engine.pause(request.interrupt))
        await self._in_time(self._engine.begin_update())
        self._start_watchdog(request.timeout_seconds)

    async def _receive(self, request: ReceiveWeights) -> None:
        """Receive all buckets; the broadcast of each is where trainer and engines wait for one another."""
        if self._num_buckets is None:
            raise UpdateFailed("no update is open")
        if self._num_buckets:
            raise UpdateFailed("the weights have come before")
        assert self._group is not None
        keeps_cache = self._interrupt == "InPlace"
        for number, layout in enumerate(self._layout, start=1):
            if self._num_buckets is None:
                raise UpdateFailed("the engine was restarted")
            self._num_buckets = number
            bucket = IncomingBucket(
                self._group, request.version, layout, number == len(self._layout), request.timeout_seconds
            )
            await self._in_time(self._engine.receive_bucket(bucket, keeps_cache=keeps_cache))
        self._start_watchdog(request.timeout_seconds)

    async def _commit(self, request: CommitUpdate) -> ControlReply:
        if not self._num_buckets:
            raise UpdateFailed("nothing was received")
        await self._in_time(self._engine.end_update())
        checksum = await self._in_time(self._engine.checksum()) if request.checksum else ""
        # The version first: a sample that is answered right after the engine goes on must find it.
        self._seen.version = request.version
        self._seen.num_updates_completed += 1
        await self._in_time(self._engine.resume())
        self._num_buckets, self.is_dirty, self._is_draining = None, False, False
        paused_seconds = asyncio.get_running_loop().time() - self._paused_at
        return ControlReply(ok=True, checksum=checksum, paused_seconds=paused_seconds)

    async def _retreat(self) -> None:
        """End the update and leave the group; go on with the old version if nothing of the new one came."""
        self._stop_watchdog()
        received, self._num_buckets = self._num_buckets, None
        self.is_dirty = self.is_dirty or bool(received)
        if received is not None:
            await self._try(self._engine.end_update)
        await self._leave_group()
        if received is not None and not self.is_dirty:
            await self._try(self._engine.resume)

    async def _end_update(self) -> None:
        """Close an update that was given up, so that another can be opened; the engine stays paused."""
        received, self._num_buckets = self._num_buckets, None
        self.is_dirty = self.is_dirty or bool(received)
        await self._in_time(self._engine.end_update())

    async def _leave_group(self) -> None:
        if self._group is None:
            return
        group, self._group = self._group, None
        await self._try(partial(self._engine.leave_group, group))

    def _start_watchdog(self, seconds: float) -> None:
        """Start the watchdog: a controller that is silent for a phase's deadline is gone; retreat alone."""
        self._stop_watchdog()
        loop = asyncio.get_running_loop()
        self._watchdog = loop.call_later(seconds, lambda: loop.create_task(self._give_up_waiting()))

    def _stop_watchdog(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None

    async def _give_up_waiting(self) -> None:
        async with self._lock:
            if self._num_buckets is not None:
                log.warning("the controller is silent in the middle of an update; retreating")
                await self._retreat()
