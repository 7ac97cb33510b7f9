"""Which workers are alive, by their heartbeats."""

from collections.abc import Callable

from asyncrl_runtime.contract.messages import Heartbeat

SILENCE_SECONDS = 3.0
"""How long a worker may say nothing before it counts as dead; it speaks every second."""


class Fleet:
    """The workers, by their heartbeats. Pure but for the clock that is passed in."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._listening_since = clock()
        self._last: dict[str, tuple[float, Heartbeat]] = {}

    def now(self) -> float:
        """Return the time by the fleet's clock, in seconds."""
        return self._clock()

    def heard(self, heartbeat: Heartbeat) -> None:
        self._last[heartbeat.worker] = (self._clock(), heartbeat)

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
        alive = [beat for heard, beat in self._last.values() if now - heard < SILENCE_SECONDS]
        return sorted(alive, key=lambda beat: beat.worker)

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
            beat
            for heard, beat in self._last.values()
            if (now - max(heard, self._listening_since) >= SILENCE_SECONDS) == dead
        ]
