"""Which workers are alive, by their heartbeats."""

import logging
from collections.abc import Callable
from typing import NamedTuple

from asyncrl_runtime.contract.messages import HEARTBEAT_SECONDS, Heartbeat

log = logging.getLogger(__name__)

SILENCE_SECONDS = 3.0
"""How long a worker may say nothing before it counts as dead; one whose last word came late may be silent for
longer: it may have little of a CPU."""
LATE_SECONDS = 1.0
"""The lateness from which a worker is busy: it may have been given tickets that it does not know of."""
BLOCKED_SECONDS = 300.0
"""How long a worker may be busy before it counts as dead all the same: its tickets wait for so long."""


class _LastWord(NamedTuple):
    """What a worker said last."""

    heard_at: float
    patience: float
    """How long the next word is waited for, in seconds."""
    beat: Heartbeat


class Fleet:
    """The workers, by their heartbeats. Pure but for the clock that is passed in."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._listening_since = clock()
        self._last: dict[str, _LastWord] = {}
        self._ran, self._could_run = 0, 0
        self.listener: Callable[[Heartbeat], None] = lambda beat: None
        """Is told of each heartbeat, once it counts."""

    def now(self) -> float:
        """Return the time by the fleet's clock, in seconds."""
        return self._clock()

    def heard(self, heartbeat: Heartbeat) -> None:
        could_run = max(0, heartbeat.max_running_samples)
        self._ran += max(0, min(could_run, heartbeat.num_running_samples))
        self._could_run += could_run
        now, before, patience = self._clock(), self._last.get(heartbeat.worker), SILENCE_SECONDS
        if before is not None:
            gap = now - max(before.heard_at, self._listening_since)
            patience += 2 * max(0.0, gap - HEARTBEAT_SECONDS)
        if _is_blocked(heartbeat) and not (before is not None and _is_blocked(before.beat)):
            log.warning(
                "worker %s has been blocked for %.0f s, by user code, say: its tickets go to others",
                heartbeat.worker,
                heartbeat.late_seconds,
            )
        self._last[heartbeat.worker] = _LastWord(now, 0.0 if _is_blocked(heartbeat) else patience, heartbeat)
        self.listener(heartbeat)

    def take_load(self) -> float | None:
        """Return which share of the samples that the engines could run at once they ran since the last call.

        None if no engine has said anything.
        """
        load = self._ran / self._could_run if self._could_run else None
        self._ran, self._could_run = 0, 0
        return load

    def was_deaf(self) -> None:
        """Note that nothing could be heard until now, so nobody counts as dead for having been silent."""
        self._listening_since = self._clock()

    def seconds_heard(self) -> float:
        """Return for how long this controller has been listening."""
        return self._clock() - self._listening_since

    @property
    def living(self) -> list[Heartbeat]:
        """The last heartbeat of every worker that is not silent, in the order of their names."""
        now = self._clock()
        alive = [word.beat for word in self._last.values() if now - word.heard_at < word.patience]
        return sorted(alive, key=lambda beat: beat.worker)

    @property
    def has_busy(self) -> bool:
        """Whether a worker that may be alive is late, so that it cannot say what it was given."""
        return any(beat.late_seconds >= LATE_SECONDS for beat in self._last_words(dead=False))

    def is_full(self, group_size: int) -> bool:
        """Return whether there are workers, and none of them could take a ticket now."""
        rooms = [
            beat.engine_state == "ready" and beat.num_running_samples + group_size <= beat.max_running_samples
            for beat in self.living
        ]
        return bool(rooms) and not any(rooms)

    @property
    def held(self) -> set[int]:
        """The tickets that are held by workers that may be alive."""
        return {ticket for beat in self._last_words(dead=False) for ticket in beat.held}

    @property
    def left_behind(self) -> set[int]:
        """The tickets that workers held when they died."""
        return {ticket for beat in self._last_words(dead=True) for ticket in beat.held}

    def _last_words(self, *, dead: bool) -> list[Heartbeat]:
        now = self._clock()
        return [
            word.beat
            for word in self._last.values()
            if (now - max(word.heard_at, self._listening_since) >= word.patience) == dead
        ]


def _is_blocked(beat: Heartbeat) -> bool:
    return beat.late_seconds >= BLOCKED_SECONDS
