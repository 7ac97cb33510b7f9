"""How many samples an engine is given: more while it has room, fewer when it thrashes. Pure."""

import math
from collections.abc import Callable

from asyncrl_runtime.rollout.engine_api import EngineLoad

LOW_KV_USAGE = 0.6
"""The use of the cache below which an engine takes more samples."""


class ConcurrencyLimit:
    """The limit on an engine's samples. It grows by a factor while KV use is low: adding would be too slow.

    Args:
        group_size: samples of a group; the limit never falls below one group.
        ceiling: `spec.rollout.maxConcurrency`; 0: adaptive, up to HIGHEST.
    """

    HIGHEST = 1024
    START = 64

    def __init__(self, group_size: int, ceiling: int = 0) -> None:
        self.group_size = group_size
        self.ceiling = ceiling
        self.limit = max(group_size, ceiling or self.START)
        self._num_retracted: int | None = None

    def observe(self, load: EngineLoad, num_running: int) -> None:
        """Adapt the limit to the engine's load; called every few seconds, and only with fresh numbers.

        The limit grows by a quarter if less than 60 % of the cache is used and the limit binds, shrinks by a
        tenth above 80 % or while requests queue, and by a fifth if the engine had to retract requests.
        """
        retracted = load.num_retracted - (self._num_retracted or 0)
        is_first, self._num_retracted = self._num_retracted is None, load.num_retracted
        if is_first or retracted < 0:  # the engine restarted, so its counters began again
            return
        if self.ceiling:
            self.limit = max(self.group_size, self.ceiling)
        elif retracted > 0:
            self._set(math.floor(self.limit * 0.8))
        elif load.kv_usage > 0.8 or load.num_queued > self.group_size:
            self._set(math.floor(self.limit * 0.9))
        elif load.kv_usage < LOW_KV_USAGE and num_running + self.group_size > self.limit:
            self._set(math.ceil(self.limit * 1.25))  # away from where it was: rounding would stick at 2

    def capacity(self, load: EngineLoad, num_running: int) -> int:
        """Return how many samples the engine could run at once, if it were given them.

        The limit grows only while it binds; what the running samples use of the cache tells how many fit.
        """
        if self.ceiling or load.kv_usage <= 0:
            return self.limit
        return min(self.HIGHEST, max(self.limit, math.floor(num_running * LOW_KV_USAGE / load.kv_usage)))

    def has_room(self, num_running: int) -> bool:
        """Return whether one more group may start."""
        return num_running + self.group_size <= self.limit

    def _set(self, limit: int) -> None:
        self.limit = max(self.group_size, min(self.HIGHEST, limit))


class Slots:
    """Counts the slots that are taken; their limit is ConcurrencyLimit's.

    Args:
        on_freed: called whenever one is free again.
    """

    def __init__(self, on_freed: Callable[[], None] = lambda: None) -> None:
        self.num_taken = 0
        self.on_freed = on_freed

    def take(self, count: int) -> "Taken":
        self.num_taken += count
        return Taken(self, count)


class Taken:
    """The slots of one ticket; `close` frees those that are still taken."""

    def __init__(self, slots: Slots, count: int) -> None:
        self._slots = slots
        self._count = count

    def free_one(self) -> None:
        if self._count:
            self._count -= 1
            self._slots.num_taken -= 1
            self._slots.on_freed()

    def close(self) -> None:
        while self._count:
            self.free_one()
