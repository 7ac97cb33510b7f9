"""A worker's part if weights are staged: its receiver fetches them, then its engine loads them.

The engine samples while they are fetched, and is paused for the load alone. A receiver that was lost, or has
another base, is given the whole.
"""

import asyncio
from pathlib import Path

from asyncrl_runtime.contract.messages import (
    ControlReply,
    ControlRequest,
    LoadStaged,
    PolicyVersion,
    StageWeights,
)
from asyncrl_runtime.contract.staging import FetchedStage, FetchStage
from asyncrl_runtime.rollout.engine_api import Engine
from asyncrl_runtime.rollout.engine_updates import CountRunning, EngineUpdates, UpdateFailed
from asyncrl_runtime.rollout.receiver_client import Receiver, ReceiverFailed


class StagedUpdates(EngineUpdates):
    """Drives one engine from version to version, each loaded from its receiver's folder."""

    def __init__(self, engine: Engine, num_running: CountRunning, receiver: Receiver) -> None:
        super().__init__(engine, num_running)
        self._receiver = receiver
        self._staged: tuple[PolicyVersion, Path] | None = None
        self._fetching: asyncio.Task[FetchedStage] | None = None
        self._is_paused = self._has_begun = False
        self.is_dirty = False

    @property
    def state(self) -> str:
        if self._is_paused:
            return "updating"
        return "dirty" if self.is_dirty else super().state

    def engine_restarted(self) -> None:
        super().engine_restarted()
        self._is_paused = self._has_begun = self.is_dirty = False

    async def leave(self) -> None:
        if self._fetching is not None:
            self._fetching.cancel()
        await super().leave()

    async def _phase(self, request: ControlRequest) -> ControlReply:
        match request:
            case StageWeights():
                await self._fetch(request)
                return ControlReply(ok=True)
            case LoadStaged():
                return await self._load(request)
            case _:
                raise UpdateFailed(f"this engine takes staged weights, and no {type(request).__name__}")

    async def _retreat(self) -> None:
        """Go on with the old version if nothing of the new one came; else wait, paused, for a whole one."""
        was_paused, self._is_paused = self._is_paused, False
        self.is_dirty = self.is_dirty or self._has_begun
        self._has_begun = False
        if was_paused and not self.is_dirty:
            await self._try(self._engine.resume)

    async def _fetch(self, request: StageWeights) -> None:
        self._staged = None
        asked = FetchStage(
            host=request.host,
            port=request.port,
            secret=request.secret,
            version=request.version,
            timeout_seconds=request.timeout_seconds,
        )
        self._fetching = asyncio.ensure_future(self._receiver.fetch(asked))
        try:
            await asyncio.wait({self._fetching})
            if self._fetching.cancelled():
                raise UpdateFailed("the worker ends")
            self._staged = request.version, Path(self._fetching.result().folder)
        except ReceiverFailed as error:
            raise UpdateFailed(f"receiver: {error}") from error
        finally:
            self._fetching.cancel()
            self._fetching = None

    async def _load(self, request: LoadStaged) -> ControlReply:
        if self._staged is None or self._staged[0] != request.version:
            raise UpdateFailed(f"{request.version} is not staged here")
        clock = asyncio.get_running_loop().time
        keeps_cache = request.interrupt == "InPlace"
        self._seen.num_updates_begun += 1
        self._is_paused, paused_at = True, clock()
        await self._in_time(self._engine.pause(request.interrupt))
        self._has_begun = True
        loading = self._engine.load_folder(
            self._staged[1], request.version, request.timeout_seconds, keeps_cache=keeps_cache
        )
        await self._in_time(loading)
        checksum = await self._in_time(self._engine.checksum()) if request.checksum else ""
        # The version first: a sample that is answered right after the engine goes on must find it.
        self._seen.version = request.version
        self._seen.num_updates_completed += 1
        await self._in_time(self._engine.resume())
        self._is_paused = self._has_begun = self.is_dirty = self._is_draining = False
        return ControlReply(ok=True, checksum=checksum, paused_seconds=clock() - paused_at)
