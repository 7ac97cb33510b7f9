"""What updates of weights and of adapters share: the trainer asks over NATS, the worker calls its engine."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import TypeVar

from asyncrl_runtime.contract.messages import (
    ControlReply,
    ControlRequest,
    DrainEngine,
    PolicyVersion,
    ProbeEngine,
)
from asyncrl_runtime.rollout.engine_api import Engine, EngineLost, EngineRefused, EngineTimeout

log = logging.getLogger(__name__)

T = TypeVar("T")

CountRunning = Callable[[], int]
"""Returns how many samples are in flight, for draining."""


class UpdateFailed(Exception):
    """A phase failed, and the engine is in a known state."""


class EngineUpdates(ABC):
    """Drives one engine through updates, one phase at a time; the heartbeat reports `state`."""

    def __init__(self, engine: Engine, num_running: CountRunning) -> None:
        self._engine = engine
        self._seen = engine.weights
        self._num_running = num_running
        self._num_ranks: int | None = None
        self._is_draining = False
        self._lock = asyncio.Lock()
        self.has_missed_deadline = False
        """Whether the engine did not answer a call in time: it hangs and must be restarted."""

    @property
    def bucket(self) -> int:
        """The number of the bucket that is being received, from 1 on; 0 if there is none."""
        return 0

    @property
    def state(self) -> str:
        """One of messages.ENGINE_STATES except `down`, which the monitor knows."""
        if self._is_draining:
            return "drained" if self._num_running() == 0 else "draining"
        return "empty" if self._seen.version is None else "ready"

    def engine_restarted(self) -> None:
        """Forget everything: a new engine process has nothing of ours."""
        self._is_draining = self.has_missed_deadline = False
        self._num_ranks = None
        self._seen.version = None

    async def handle(self, request: ControlRequest) -> ControlReply:
        """Carry out one phase and return how it went; never raises for anything that the engine does."""
        if isinstance(request, DrainEngine):
            return self._drain(request.version)
        if isinstance(request, ProbeEngine):
            return await self._probe()
        async with self._lock:
            try:
                return await self._phase(request)
            except (UpdateFailed, EngineLost, EngineRefused) as error:
                log.warning("%s failed: %s", type(request).__name__, error)
                is_refusal, bucket = isinstance(error, EngineRefused), self.bucket
                await self._retreat()
                return ControlReply(ok=False, message=str(error), is_refusal=is_refusal, bucket=bucket)
            except Exception as error:  # the edge of a request: whoever asked waits for an answer
                log.exception("%s failed", type(request).__name__)
                await self._retreat()
                return ControlReply(ok=False, message=f"{type(error).__name__}: {error}")

    def _drain(self, version: PolicyVersion | None) -> ControlReply:
        """Begin to drain an engine that samples; one without weights takes no tickets, and stays `empty`."""
        if self._seen.version is not None and self._seen.version == version:
            return ControlReply(ok=False, message=f"it has {version} already")
        self._is_draining = self._seen.version is not None
        return ControlReply(ok=self._num_running() == 0)

    async def leave(self) -> None:
        """Leave the engine to itself when the worker ends."""
        async with self._lock:
            await self._retreat()

    @abstractmethod
    async def _phase(self, request: ControlRequest) -> ControlReply:
        """Carry out a phase.

        Raises:
            UpdateFailed: it is not this phase's turn, or it is one for another kind of weights.
            EngineLost, EngineRefused: a call of the engine raised it.
        """

    @abstractmethod
    async def _retreat(self) -> None:
        """Give up what is under way, so that the engine is in a known state."""

    async def _probe(self) -> ControlReply:
        if self.has_missed_deadline:
            return ControlReply(ok=False, message="it has missed a deadline, and waits to be restarted")
        try:
            await self._engine.label()
            if self._num_ranks is None:
                self._num_ranks = await self._engine.num_ranks()
        except (EngineLost, EngineRefused) as error:
            return ControlReply(ok=False, message=str(error))
        return ControlReply(ok=True, num_ranks=self._num_ranks)

    async def _try(self, call: Callable[[], Awaitable[None]]) -> None:
        """Make a call that cleans up, unless the engine hangs: it is restarted, and a call costs time."""
        if self.has_missed_deadline:
            return
        try:
            await self._in_time(call())
        except (EngineLost, EngineRefused) as error:
            log.info("while cleaning up: %s", error)

    async def _in_time(self, answer: Awaitable[T]) -> T:
        """Await an answer; if it does not come within its deadline, remember that the engine hangs."""
        try:
            return await answer
        except EngineTimeout:
            self.has_missed_deadline = True
            raise


UpdatesOf = Callable[[Engine, CountRunning], EngineUpdates]
"""Makes the updates of an engine, for the kind of weights that is trained."""
