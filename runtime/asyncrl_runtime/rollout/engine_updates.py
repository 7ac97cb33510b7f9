"""A worker's part in weight epochs: the controller asks over NATS, the worker calls its own engine.

The four phases are those of design.md section 7. An engine is at a version only when every call answered
200. Whatever fails, the engine ends in one of two known states: sampling at its old version (nothing of
the update had arrived), or `dirty`: paused until it has everything again.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from asyncrl_runtime.contract.messages import (
    CommitUpdate,
    ControlReply,
    ControlRequest,
    DrainEngine,
    JoinGroup,
    PrepareUpdate,
    ProbeEngine,
    ReceiveBucket,
)
from asyncrl_runtime.rollout.engine_client import (
    EngineClient,
    EngineLacks,
    EngineLost,
    EngineRefused,
    EngineTimeout,
)

log = logging.getLogger(__name__)

CONTROL_SECONDS = 10.0
"""For a control call that moves no data. An engine answers between two decoding steps."""
PAUSE_MODES = {"Retract": "retract", "InPlace": "in_place", "Drain": "retract"}


class UpdateFailed(Exception):
    """A phase failed; the engine is in a known state."""


class WeightUpdates:
    """Drives one engine through updates. One phase at a time; `state` is what the heartbeat says.

    Args:
        num_running: how many samples are in flight, for draining.
    """

    def __init__(self, engine: EngineClient, num_running: Callable[[], int]) -> None:
        self._engine = engine
        self._seen = engine.weights
        self._num_running = num_running
        self._group: str | None = None
        self._num_ranks: int | None = None
        self._interrupt = "Retract"
        self._num_buckets: int | None = None  # received in the open update; None outside of one
        self._is_draining = False
        self._has_sessions = True
        self._watchdog: asyncio.TimerHandle | None = None
        self._lock = asyncio.Lock()
        self.is_dirty = False
        self.has_missed_deadline = False
        """The engine did not answer a call in time: it hangs and must be restarted."""

    @property
    def state(self) -> str:
        """One of messages.ENGINE_STATES but for `down`, which the monitor knows."""
        if self._num_buckets is not None:
            return "updating"
        if self.is_dirty:
            return "dirty"
        if self._is_draining:
            return "drained" if self._num_running() == 0 else "draining"
        return "empty" if self._seen.version is None else "ready"

    def engine_restarted(self) -> None:
        """Forget everything: a new engine process has no weights of ours and no group."""
        self._stop_watchdog()
        self._group, self._num_buckets, self._is_draining = None, None, False
        self._num_ranks = None
        self._has_sessions = True
        self.is_dirty = self.has_missed_deadline = False
        self._seen.version = None

    async def handle(self, request: ControlRequest) -> ControlReply:
        """Carry out one phase and say how it went; never raises for what the engine does."""
        if isinstance(request, DrainEngine):
            self._is_draining = True
            return ControlReply(ok=self._num_running() == 0)
        if isinstance(request, ProbeEngine):
            return await self._probe()
        async with self._lock:
            self._stop_watchdog()
            try:
                return await self._phase(request)
            except (UpdateFailed, EngineLost, EngineRefused) as error:
                log.warning("%s failed: %s", type(request).__name__, error)
                await self._retreat()
                return ControlReply(ok=False, message=str(error))

    async def _probe(self) -> ControlReply:
        if self.has_missed_deadline:
            return ControlReply(ok=False, message="it has missed a deadline, and waits to be restarted")
        try:
            await self._engine.model_info()
            if self._num_ranks is None:
                self._num_ranks = await self._engine.num_ranks()
        except (EngineLost, EngineRefused) as error:
            return ControlReply(ok=False, message=str(error))
        return ControlReply(ok=True, num_ranks=self._num_ranks)

    async def leave(self) -> None:
        """Leave the group for good, on the way out."""
        async with self._lock:
            self._stop_watchdog()
            await self._retreat()

    async def _phase(self, request: ControlRequest) -> ControlReply:
        match request:
            case JoinGroup():
                await self._join(request)
            case PrepareUpdate():
                await self._prepare(request)
            case ReceiveBucket():
                await self._receive(request)
            case CommitUpdate():
                return ControlReply(ok=True, checksum=await self._commit(request))
            case _:
                raise UpdateFailed(f"this engine takes no {type(request).__name__}")
        return ControlReply(ok=True)

    async def _join(self, request: JoinGroup) -> None:
        await self._leave_group()
        await self._call(
            "/init_weights_update_group",
            {
                "master_address": request.host,
                "master_port": request.port,
                "rank_offset": request.rank,
                "world_size": request.world_size,
                "group_name": request.group,
                "backend": request.backend,
            },
            request.timeout_seconds,
        )
        self._group = request.group

    async def _prepare(self, request: PrepareUpdate) -> None:
        """Pause and open the update."""
        self._require_group(request.group)
        if self._num_buckets is not None:
            await self._end_update()  # of an epoch that was given up after this engine was ready
        self._interrupt = request.interrupt
        self._seen.num_updates_begun += 1
        self._num_buckets = 0
        await self._call("/pause_generation", {"mode": self._pause_mode})
        await self._begin_session()
        self._start_watchdog(request.timeout_seconds)

    @property
    def _pause_mode(self) -> str:
        """How samples are interrupted.

        SGLang without sessions dies when it flushes its cache over a queue, where retracting puts them: there
        they are broken off, and go on as after an engine's loss.
        """
        mode = PAUSE_MODES[self._interrupt]
        return "abort" if mode == "retract" and not self._has_sessions else mode

    async def _begin_session(self) -> None:
        """Open the engine's own session; SGLang up to 0.5.20 has none, and takes buckets at any time."""
        try:
            await self._call("/begin_weight_update", {"selector": "all"})
        except EngineLacks:
            self._has_sessions = False

    async def _end_session(self) -> None:
        if self._has_sessions:
            await self._call("/end_weight_update", {})

    async def _receive(self, request: ReceiveBucket) -> None:
        self._require_group(request.group)
        if self._num_buckets is None:
            raise UpdateFailed("no update is open")
        self._num_buckets += 1
        keeps_cache = self._interrupt == "InPlace"
        body = {
            "names": request.names,
            "dtypes": request.dtypes,
            "shapes": request.shapes,
            "group_name": request.group,
            "load_format": "flattened_bucket",
            # In place the running requests hold the cache, and a flush would be refused.
            "flush_cache": request.is_last and not keeps_cache,
            **({"weight_version": str(request.version)} if request.is_last else {}),
        }
        await self._call("/update_weights_from_distributed", body, request.timeout_seconds)
        self._start_watchdog(request.timeout_seconds)

    async def _commit(self, request: CommitUpdate) -> str:
        self._require_group(request.group)
        if not self._num_buckets:
            raise UpdateFailed("nothing was received")
        await self._end_session()
        checksum = ""
        if request.checksum:
            answer = await self._call("/weights_checker", {"action": "checksum"}, 60)
            checksum = str(answer["per_engine_checksum"])
        # The version first: a sample that is answered right after the engine goes on must find it.
        self._seen.version = request.version
        self._seen.num_updates_completed += 1
        await self._call("/continue_generation", {})
        self._num_buckets, self.is_dirty, self._is_draining = None, False, False
        return checksum

    async def _retreat(self) -> None:
        """End the update and leave the group; go on at the old version unless some of the new arrived."""
        received, self._num_buckets = self._num_buckets, None
        self.is_dirty = self.is_dirty or bool(received)
        if received is not None and self._has_sessions:
            await self._try("/end_weight_update", {})
        await self._leave_group()
        if received is not None and not self.is_dirty:
            await self._try("/continue_generation", {})

    async def _end_update(self) -> None:
        """Close an update that was given up, to open another one; stay paused."""
        received, self._num_buckets = self._num_buckets, None
        self.is_dirty = self.is_dirty or bool(received)
        await self._end_session()

    async def _leave_group(self) -> None:
        if self._group is None:
            return
        group, self._group = self._group, None
        await self._try("/destroy_weights_update_group", {"group_name": group})

    async def _try(self, path: str, body: dict[str, Any]) -> None:
        """Call for cleaning up, unless the engine hangs: it is restarted, and each call costs a deadline."""
        if self.has_missed_deadline:
            return
        try:
            await self._call(path, body)
        except (UpdateFailed, EngineLost, EngineRefused) as error:
            log.info("while cleaning up: %s", error)

    async def _call(
        self, path: str, body: dict[str, Any], timeout_seconds: float = CONTROL_SECONDS
    ) -> dict[str, Any]:
        try:
            answer = await self._engine.call(path, body, timeout_seconds)
        except EngineTimeout:
            self.has_missed_deadline = True
            raise
        if answer.get("success") is False:
            raise UpdateFailed(f"{path}: {answer.get('message')}")
        return answer

    def _require_group(self, group: str) -> None:
        if self._group != group:
            raise UpdateFailed(f"asked for group {group}, but this engine is in {self._group}")

    def _start_watchdog(self, seconds: float) -> None:
        """A controller that says nothing for a phase's deadline is gone: retreat alone."""
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
