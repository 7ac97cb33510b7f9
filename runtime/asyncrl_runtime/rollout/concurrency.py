"""How many samples an engine is given: as many as its KV cache will hold once they have grown. Pure."""

import math
from collections import deque
from collections.abc import Callable

from asyncrl_runtime.rollout.engine_api import EngineLoad

GROWTH = 2.0
LOW_KV_USAGE = 0.6
"""The use of the cache up to which samples are expected to fit while none has finished."""
PATIENCE = 10
"""The looks at the engine, a second apart, at which requests must wait before the limit is cut: after an
update of the weights they wait until their cache is computed anew."""


class ConcurrencyLimit:
    """The limit on an engine's samples.

    The cache shows what samples need only once they have grown, which may take minutes. So the limit is
    bounded by a forecast, and it grows at most once in the mean time of a sample, which is over when as many
    samples have finished as the limit lets run (Little's law). It is cut to what runs, and one group that
    waits; what runs, runs well, and is not cut.

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
        self._lengths: deque[tuple[int, int]] = deque(maxlen=self.HIGHEST)
        """The tokens of prompt and response of the samples that finished last."""
        self._num_finished = 0
        """How many have finished since the limit last changed."""
        self._queued: deque[int] = deque(maxlen=PATIENCE)
        """The requests that waited in the engine at the last looks, since the limit last changed."""

    def finished(self, prompt_tokens: int, response_tokens: int) -> None:
        """Note that a sample has finished."""
        self._lengths.append((prompt_tokens, response_tokens))
        self._num_finished += 1

    def observe(self, load: EngineLoad, num_running: int) -> None:
        """Adapt the limit to the engine's load; called every second while the engine samples.

        Args:
            num_running: the samples that the engine was given, those that wait in it included.
        """
        self._queued.append(load.num_queued)
        if self.ceiling:
            self.limit = max(self.group_size, self.ceiling)
        elif len(self._queued) == PATIENCE and min(self._queued) > self.group_size:
            self._cut(num_running - min(self._queued) + self.group_size)
        elif self._may_grow(load, num_running):
            self._set(round(min(self.limit * GROWTH, max(self.limit, self._forecast(load)))))

    def capacity(self, load: EngineLoad, num_running: int) -> int:
        """Return how many samples the engine could run at once, if it were given them.

        The limit grows only while it binds. Where no sample has finished yet, what those that run use of the
        cache tells how many fit.
        """
        if self.ceiling or load.kv_usage <= 0:
            return self.limit
        fit = self._forecast(load) if self._lengths else num_running * LOW_KV_USAGE / load.kv_usage
        return min(self.HIGHEST, max(self.limit, math.floor(fit)))

    def has_room(self, num_running: int) -> bool:
        """Return whether one more group may start."""
        return num_running + self.group_size <= self.limit

    def _may_grow(self, load: EngineLoad, num_running: int) -> bool:
        binds = num_running + self.group_size > self.limit
        return binds and load.num_queued <= self.group_size and self._num_finished >= self.limit

    def _forecast(self, load: EngineLoad) -> float:
        """Return how many samples fill the cache once their lengths are mixed as in the long run.

        A long response is in the cache for longer than a short one, and half grown on average: its mean is
        E[L^2] / 2 E[L] of their lengths L. A group's samples share their prompt.
        """
        if not (load.kv_usage > 0 and load.num_used_tokens > 0):
            return self.HIGHEST  # the engine does not say how large its cache is
        capacity = load.num_used_tokens / load.kv_usage
        prompts = sum(prompt for prompt, _ in self._lengths) / len(self._lengths)
        total = sum(response for _, response in self._lengths)
        squares = sum(response * response for _, response in self._lengths)
        return capacity / max(1.0, prompts / self.group_size + squares / max(1, 2 * total))

    def _cut(self, num_well: int) -> None:
        if num_well < self.limit:
            self._set(num_well)

    def _set(self, limit: int) -> None:
        self.limit = max(self.group_size, min(self.HIGHEST, limit))
        self._num_finished = 0
        self._queued.clear()


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
