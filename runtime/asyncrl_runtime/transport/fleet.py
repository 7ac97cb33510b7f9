"""Who is alive, and how what the dead held comes back.

`ack_wait` is long, because a broker outage beyond it would redeliver every ticket in flight. So a dead
worker's tickets come back another way: anybody may publish a NAK for a delivery (NATS ADR-15), and it is
redelivered in milliseconds. Workers say once a second what they hold; a ticket that the queue has delivered,
that has brought nothing yet, and that nobody living says it holds, is handed back. That needs no record that
a worker must write before it may begin, hence could miss: a kill between a delivery and its record once cost
the whole `ack_wait` (213 s in a chaos run). NAKs are not fenced: one too many makes a ticket sampled twice
and trained once.
"""

import logging
from collections.abc import Callable, Iterable

from asyncrl_api.names import PROMPT_CONSUMER, JobNames
from asyncrl_runtime.contract.messages import Heartbeat
from asyncrl_runtime.transport.broker import Broker

log = logging.getLogger(__name__)

SILENCE_SECONDS = 3.0
"""A worker that says nothing for so long is dead; it speaks every second."""
UNHELD_SECONDS = 2.5
"""So long after its delivery a living worker has said that it holds a ticket, even if one word was lost."""
AGAIN_SECONDS = 10.0
"""A ticket that still waits for a worker after so long is handed back once more."""


class Fleet:
    """The workers, by their heartbeats. Pure but for the clock that is passed in."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._listening_since = clock()
        self._last: dict[str, tuple[float, Heartbeat]] = {}

    def heard(self, heartbeat: Heartbeat) -> None:
        self._last[heartbeat.worker] = (self._clock(), heartbeat)

    def was_deaf(self) -> None:
        """Nothing could be heard until now, so nobody is dead for having been silent."""
        self._listening_since = self._clock()

    def seconds_heard(self) -> float:
        """How long this controller has been listening."""
        return self._clock() - self._listening_since

    @property
    def living(self) -> list[Heartbeat]:
        """The last word of every worker that is not silent, in order of their names."""
        now = self._clock()
        alive = [beat for heard, beat in self._last.values() if now - heard < SILENCE_SECONDS]
        return sorted(alive, key=lambda beat: beat.worker)

    @property
    def held(self) -> set[int]:
        """Tickets that a worker holds, as far as it may be alive."""
        return {ticket for beat in self._last_words(dead=False) for ticket in beat.held}

    @property
    def left_behind(self) -> set[int]:
        """Tickets that a worker held when it died."""
        return {ticket for beat in self._last_words(dead=True) for ticket in beat.held}

    def _last_words(self, *, dead: bool) -> list[Heartbeat]:
        now = self._clock()
        return [
            beat
            for heard, beat in self._last.values()
            if (now - max(heard, self._listening_since) >= SILENCE_SECONDS) == dead
        ]


class Orphans:
    """Finds delivered tickets that nobody holds. Pure but for the clock."""

    def __init__(self, fleet: Fleet, clock: Callable[[], float]) -> None:
        self._fleet = fleet
        self._clock = clock
        self._unheld_since: dict[int, float] = {}
        self._handed_back_at: dict[int, float] = {}

    def find(self, delivered: Iterable[int]) -> list[int]:
        """Return the tickets to be handed back now, and take it that they are.

        Args:
            delivered: tickets that a worker was given, and of which nothing has arrived.
        """
        now, held, left_behind = self._clock(), self._fleet.held, self._fleet.left_behind
        unheld = [ticket for ticket in delivered if ticket not in held]
        self._unheld_since = {ticket: self._unheld_since.get(ticket, now) for ticket in unheld}
        self._handed_back_at = {
            ticket: at for ticket, at in self._handed_back_at.items() if ticket in self._unheld_since
        }
        orphans = [ticket for ticket in unheld if ticket in left_behind or self._has_waited(ticket, now)]
        orphans = [t for t in orphans if now - self._handed_back_at.get(t, float("-inf")) >= AGAIN_SECONDS]
        self._handed_back_at |= dict.fromkeys(orphans, now)
        return orphans

    def _has_waited(self, ticket: int, now: float) -> bool:
        listened = min(now - self._unheld_since[ticket], self._fleet.seconds_heard())
        return listened >= UNHELD_SECONDS


class Reaper:
    """Hands back what dead workers held."""

    def __init__(self, broker: Broker, names: JobNames, fleet: Fleet, clock: Callable[[], float]) -> None:
        self._broker = broker
        self._stream = names.prompt_stream
        self._orphans = Orphans(fleet, clock)

    async def reap(self, waiting: Iterable[int]) -> list[int]:
        """Do it once; return the tickets that were handed back.

        Args:
            waiting: tickets that were issued, and of which nothing has arrived.

        Raises:
            one of broker.TRANSIENT or APIError: the broker is away; call again.
        """
        info = await self._broker.jetstream.consumer_info(self._stream, PROMPT_CONSUMER)
        delivered = info.delivered
        assert delivered is not None
        orphans = self._orphans.find(ticket for ticket in waiting if ticket <= delivered.stream_seq)
        for ticket in orphans:
            # A delivery is known by its ticket; the consumer's sequence has only to be one it has reached.
            subject = f"$JS.ACK.{self._stream}.{PROMPT_CONSUMER}.1.{ticket}.{delivered.consumer_seq}.0.0"
            await self._broker.client.publish(subject, b"-NAK")
        if orphans:
            log.warning("tickets %s are held by nobody: handed back", orphans[:20])
        return orphans
