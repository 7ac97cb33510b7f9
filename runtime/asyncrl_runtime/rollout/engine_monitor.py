"""Watches one engine: whether it is there, whether it is the process we know, whether it makes progress."""

import asyncio
import logging
from collections.abc import Callable

from asyncrl_runtime.rollout.engine_api import (
    Engine,
    EngineAbsent,
    EngineLoad,
    EngineLost,
    EngineRefused,
    EngineTimeout,
)
from asyncrl_runtime.rollout.engine_updates import EngineUpdates

log = logging.getLogger(__name__)

PROBE_INTERVAL_SECONDS = 1.0
DOWN_SECONDS = 15.0
"""An engine that answered before and has not answered for this long is restarted."""
STUCK_SECONDS = 60.0
"""An engine that should sample and has produced no token for this long is restarted."""
DIRTY_SECONDS = 120.0
"""An engine that has waited for a full set of weights for this long is restarted."""


class EngineMonitor:
    """Polls the engine; others read `state` and `fault`."""

    def __init__(
        self,
        engine: Engine,
        updates: EngineUpdates,
        num_running: Callable[[], int],
        on_load: Callable[[EngineLoad, int], None],
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._updates = updates
        self._num_running = num_running
        self._on_load = on_load
        self._clock = clock
        self._is_up = False
        self._is_absent = False
        self._answered_at: float | None = None
        self._progressed_at = clock()
        self._num_tokens = (-1, -1)
        self._dirty_since: float | None = None
        self.incarnation = 0
        """The number of engine processes seen so far; weights and groups belong to one of them."""
        self.load = EngineLoad(0.0, 0, 0, 0)

    @property
    def state(self) -> str:
        """One of messages.ENGINE_STATES. A failed request makes it down, or its ticket would come right back.

        An engine that has missed a deadline is down until it is restarted: nobody knows what it will do.
        """
        is_known = not self._engine.is_in_doubt and not self._updates.has_missed_deadline
        return self._updates.state if self._is_up and is_known else "down"

    def fault(self) -> str | None:
        """Return why the engine must be restarted, or None."""
        now = self._clock()
        if self._is_absent:
            return None  # it is being started already; killing it now could go on forever
        if self._updates.has_missed_deadline:
            return "it did not answer a control call within its deadline"
        if self._answered_at is not None and not self._is_up and now - self._answered_at > DOWN_SECONDS:
            return f"it has not answered for {now - self._answered_at:.0f} s"
        if self._dirty_since is not None and now - self._dirty_since > DIRTY_SECONDS:
            return f"it has waited for a full set of weights for {now - self._dirty_since:.0f} s"
        if self._is_sampling() and now - self._progressed_at > STUCK_SECONDS:
            return f"it has sampled no token for {now - self._progressed_at:.0f} s"
        return None

    def _is_sampling(self) -> bool:
        """Return whether tokens must come: not in an update, and not while only rewards are awaited."""
        return self.state in ("ready", "draining") and self._engine.num_requests > 0

    async def run(self) -> None:
        """Poll forever. A poll that fails ends every request in flight, which then goes elsewhere."""
        while True:
            try:
                await self._poll()
            except (EngineLost, EngineRefused) as error:
                self._gone(error)
            await asyncio.sleep(PROBE_INTERVAL_SECONDS)

    async def _poll(self) -> None:
        label = await self._engine.label()
        self._is_absent = False
        version = self._engine.weights.version
        is_ours = version is not None and label == str(version)
        if not self._is_up or (self._updates.state in ("ready", "draining", "drained") and not is_ours):
            if self.incarnation == 0 or not is_ours:
                await self._adopt()
            self._is_up = True
        self._answered_at = self._clock()
        self._observe(await self._engine.load())
        self._dirty_since = (self._dirty_since or self._clock()) if self._updates.state == "dirty" else None

    async def _adopt(self) -> None:
        """Begin with an engine process that this worker does not know: nothing from before counts.

        An earlier worker may have left it in the middle of an update; it stays as it is until our first
        update, but what was asked of it before is dropped.
        """
        self.incarnation += 1
        log.info("engine %s: process %d of it", self._engine.name, self.incarnation)
        self._updates.engine_restarted()
        await self._engine.take_over()
        self._progressed_at = self._clock()

    def _observe(self, load: EngineLoad) -> None:
        # A request counts as generated when it ends, which may take hours; meanwhile the cache grows.
        num_tokens = load.num_generated_tokens, load.num_used_tokens
        if num_tokens != self._num_tokens or not self._is_sampling():
            self._progressed_at = self._clock()
        self._num_tokens = num_tokens
        self.load = load
        self._on_load(load, self._num_running())

    def _gone(self, error: Exception) -> None:
        self._is_absent = isinstance(error, EngineAbsent)
        if self._is_absent:  # the next process gets all its time
            self._answered_at = self._dirty_since = None
        elif self._answered_at is None and isinstance(error, EngineTimeout):
            self._answered_at = self._clock()  # it listens, so it has started, and hung before we came
        if self._is_up:
            log.warning("engine is gone: %s", error)
            self._engine.give_up()
        self._is_up = False
