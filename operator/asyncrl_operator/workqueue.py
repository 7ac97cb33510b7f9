"""Decides which job gets a pass next; each key has a time and one pass at a time. Pure; time is passed in."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

FIRST_RETRY_SECONDS = 0.5
MAX_RETRY_SECONDS = 30.0


class Key(NamedTuple):
    """The namespace and name of an AsyncRLJob."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass
class WorkQueue:
    """Keys by the time at which they are due.

    A key that is added again before its turn has one turn, at the earlier time. One that is added during its
    pass has another pass afterwards, so that no news is lost. One whose pass failed waits out its delay
    whatever is added: the API server that refused would only be asked the same again.

    Args:
        jitter: returns a factor of about 1 for each delay, so that keys that failed together do not come
            back together.
    """

    jitter: Callable[[], float] = lambda: 1.0
    _due: dict[Key, float] = field(default_factory=dict)
    _order: list[tuple[float, Key]] = field(default_factory=list)
    """A heap of times and keys; an entry that differs from `_due` is out of date."""
    _active: set[Key] = field(default_factory=set)
    _failures: dict[Key, int] = field(default_factory=dict)
    _held_until: dict[Key, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._due)

    def add(self, key: Key, at: float) -> None:
        """Schedule a pass for `key`, no later than `at` unless it waits after a failure."""
        at = max(at, self._held_until.get(key, at))
        if key not in self._due or at < self._due[key]:
            self._due[key] = at
            heapq.heappush(self._order, (at, key))

    def take(self, now: float) -> Key | None:
        """Return the key that has been due for longest, and begin its pass; None if no key is due."""
        while self._order and self._order[0][0] <= now:
            at, key = heapq.heappop(self._order)
            if self._due.get(key) != at or key in self._active:
                continue
            del self._due[key]
            self._active.add(key)
            return key
        return None

    def done(self, key: Key, wake_at: float | None) -> None:
        """End a pass that succeeded; `wake_at` is the time of the next pass if nothing changes before."""
        self._failures.pop(key, None)
        self._held_until.pop(key, None)
        self._end(key, wake_at)

    def failed(self, key: Key, now: float, least_seconds: float = 0.0) -> float:
        """End a pass that failed, and return the time of the next one.

        Args:
            least_seconds: the wait that the API server asked for (Retry-After).
        """
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        doublings = min(failures - 1, 16)  # past the longest delay; keeps the number small
        delay = min(FIRST_RETRY_SECONDS * 2.0**doublings, MAX_RETRY_SECONDS) * self.jitter()
        at = self._held_until[key] = now + max(delay, least_seconds)
        self._due.pop(key, None)
        self._end(key, at)
        return at

    def next_at(self) -> float | None:
        """Return when the next key is due, among those that are not in a pass."""
        while self._order:
            at, key = self._order[0]
            if self._due.get(key) == at and key not in self._active:
                return at
            heapq.heappop(self._order)
        return None

    def num_failures(self, key: Key) -> int:
        """Return how many passes have failed since the last one that succeeded."""
        return self._failures.get(key, 0)

    def _end(self, key: Key, at: float | None) -> None:
        self._active.discard(key)
        if at is not None:
            self.add(key, at)
        if key in self._due:  # its entry may have been dropped while the pass was under way
            heapq.heappush(self._order, (self._due[key], key))
