"""A worker's part if adapters are trained: each version is one more adapter of an engine whose base stays.

An adapter comes in chunks over NATS and goes to the engine through a folder that both see. It is named after
its version, and requests name it, so that nobody has to pause: what was under way is broken off and goes on
with the new name (`EngineClient`).
"""

import shutil
import tempfile
from functools import partial
from pathlib import Path

from asyncrl_runtime.contract.messages import (
    AdapterChunk,
    ControlReply,
    ControlRequest,
    LoadAdapter,
    PolicyVersion,
)
from asyncrl_runtime.rollout.engine_api import Engine
from asyncrl_runtime.rollout.engine_updates import CountRunning, EngineUpdates, UpdateFailed

KEPT_ADAPTERS = 2
"""The adapters that stay loaded: a request that names the one before the newest may be on its way."""


class AdapterUpdates(EngineUpdates):
    """Drives one engine from adapter to adapter."""

    def __init__(self, engine: Engine, num_running: CountRunning) -> None:
        super().__init__(engine, num_running)
        self._loaded: list[PolicyVersion] = []
        self._arriving: tuple[PolicyVersion, bytearray] | None = None
        self._is_switching = False

    @property
    def state(self) -> str:
        return "updating" if self._is_switching else super().state

    def engine_restarted(self) -> None:
        super().engine_restarted()
        self._loaded.clear()

    async def _phase(self, request: ControlRequest) -> ControlReply:
        match request:
            case AdapterChunk():
                self._take(request)
            case LoadAdapter():
                await self._load(request)
            case _:
                raise UpdateFailed(f"this engine takes adapters, and no {type(request).__name__}")
        return ControlReply(ok=True)

    async def _retreat(self) -> None:
        """Do nothing: the engine goes on sampling with the adapter that it had."""

    def _take(self, part: AdapterChunk) -> None:
        if part.offset == 0:
            self._arriving = (part.version, bytearray())
        if self._arriving is None or self._arriving[0] != part.version:
            raise UpdateFailed(f"a piece of adapter {part.version} came without those before it")
        weights = self._arriving[1]
        if len(weights) != part.offset:
            raise UpdateFailed(
                f"a piece of adapter {part.version} begins at {part.offset}, not {len(weights)}"
            )
        weights += part.data

    async def _load(self, request: LoadAdapter) -> None:
        """Load the adapter, sample with it from now on, and drop those that nobody asks for anymore."""
        arrived, self._arriving = self._arriving, None
        if arrived is None or (arrived[0], len(arrived[1])) != (request.version, request.num_bytes):
            raise UpdateFailed(f"adapter {request.version} of {request.num_bytes} bytes has not come whole")
        if request.version not in self._loaded:  # otherwise a reply was lost
            await self._hand_over(arrived[1], request)
            self._loaded.append(request.version)
        await self._switch(request)
        while len(self._loaded) > KEPT_ADAPTERS:
            await self._try(partial(self._engine.unload_adapter, self._loaded.pop(0)))

    async def _hand_over(self, weights: bytearray, request: LoadAdapter) -> None:
        version = request.version
        await self._try(partial(self._engine.unload_adapter, version))  # an earlier worker's
        folder = Path(tempfile.mkdtemp(prefix=f"adapter-{version}-"))
        try:
            (folder / "adapter_config.json").write_text(request.config)
            (folder / "adapter_model.safetensors").write_bytes(weights)
            await self._in_time(self._engine.load_adapter(version, folder, request.timeout_seconds))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def _switch(self, request: LoadAdapter) -> None:
        """Name the new adapter in every request from now on, and break off those that named another one."""
        self._is_switching = True  # until the engine's label, by which it is known, is that of the version
        self._seen.version = request.version
        self._is_draining = False
        is_retracting = request.interrupt == "Retract"
        try:
            await self._in_time(self._engine.set_label(request.version, aborts=is_retracting))
        finally:
            self._is_switching = False
