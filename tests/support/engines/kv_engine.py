"""An engine as a few formulas, in virtual time: what a limit on its samples does to its throughput.

A step takes longer the more tokens are in the cache; the cache fills over minutes; when it is full, the
youngest samples are thrown out, wait, and are computed anew. There is always another prompt group to sample.
"""

from collections import deque
from typing import Protocol

import numpy as np

from asyncrl_runtime.rollout.engine_api import EngineLoad

STEP_SECONDS = 0.008
"""A decoding step with an empty cache."""
TOKEN_SECONDS = 14e-9
"""What each token in the cache adds to a step: 28 KB read at 2 TB/s."""
PREFILL_TOKENS_PER_SECOND = 50_000
PROMPT_TOKENS = 500
MAX_TOKENS = 27_000


class Limit(Protocol):
    """What decides how many samples are given to the engine."""

    limit: int

    def has_room(self, num_running: int) -> bool: ...
    def observe(self, load: EngineLoad, num_running: int) -> None: ...
    def finished(self, prompt_tokens: int, response_tokens: int) -> None: ...


class Fixed:
    """Always the same number."""

    def __init__(self, limit: int, group_size: int) -> None:
        self.limit = limit
        self._group_size = group_size

    def has_room(self, num_running: int) -> bool:
        return num_running + self._group_size <= self.limit

    def observe(self, load: EngineLoad, num_running: int) -> None:
        pass

    def finished(self, prompt_tokens: int, response_tokens: int) -> None:
        pass


class KvEngine:
    """The engine and its worker's admission of groups; `run` advances both.

    Args:
        median, sigma: the log-normal distribution of the tokens of an answer, cut at MAX_TOKENS.
        capacity: the tokens that fit into the cache.
    """

    def __init__(self, *, median: float, sigma: float, capacity: int, group_size: int, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._median, self._sigma = median, sigma
        self._capacity = capacity
        self._group_size = group_size
        self._length = np.zeros(0)
        self._done = np.zeros(0)
        self._waiting: deque[tuple[float, float]] = deque()
        """Samples that have no place: (length, tokens sampled already)."""
        self._num_retracted = 0
        self._late = 0.0
        """The seconds that prefills still take."""
        self.num_tokens = 0.0
        """The tokens sampled so far."""
        self.limits: list[int] = []

    def run(self, limit: Limit, seconds: int) -> float:
        """Return the tokens/s of these seconds."""
        before = self.num_tokens
        for _ in range(seconds):
            self._take_groups(limit)
            self._step(limit)
            limit.observe(self._load(), self._num_given)
            self.limits.append(limit.limit)
        return (self.num_tokens - before) / seconds

    @property
    def _num_given(self) -> int:
        return len(self._length) + len(self._waiting)

    @property
    def _used(self) -> float:
        return float(self._done.sum()) + PROMPT_TOKENS * len(self._done)

    def _load(self) -> EngineLoad:
        used = self._used
        return EngineLoad(
            kv_usage=used / self._capacity,
            num_queued=len(self._waiting),
            num_retracted=self._num_retracted,
            num_generated_tokens=int(self.num_tokens),
            num_used_tokens=int(used),
        )

    def _take_groups(self, limit: Limit) -> None:
        while limit.has_room(self._num_given):
            drawn = self._rng.lognormal(np.log(self._median), self._sigma, self._group_size)
            self._waiting.extend((float(length), 0.0) for length in np.minimum(drawn, MAX_TOKENS).round() + 1)
        room = self._capacity - self._used
        while self._waiting and room >= (need := PROMPT_TOKENS + self._waiting[0][1] + 1):
            length, done = self._waiting.popleft()
            self._length, self._done = np.append(self._length, length), np.append(self._done, done)
            self._late += need / PREFILL_TOKENS_PER_SECOND
            room -= need

    def _step(self, limit: Limit) -> None:
        """Decode for one second, less what prefills take."""
        free = max(0.0, 1.0 - self._late)
        self._late = max(0.0, self._late - 1.0)
        num_steps = free / (STEP_SECONDS + TOKEN_SECONDS * self._used)
        gained = np.minimum(num_steps, self._length - self._done)
        self._done = self._done + gained
        self.num_tokens += float(gained.sum())
        has_ended = self._done >= self._length
        for length in self._length[has_ended]:
            limit.finished(PROMPT_TOKENS, int(length))
        self._length, self._done = self._length[~has_ended], self._done[~has_ended]
        while self._used > self._capacity:  # the youngest go
            youngest = int(np.argmin(self._done))
            self._waiting.appendleft((float(self._length[youngest]), float(self._done[youngest])))
            self._length, self._done = np.delete(self._length, youngest), np.delete(self._done, youngest)
            self._num_retracted += 1
