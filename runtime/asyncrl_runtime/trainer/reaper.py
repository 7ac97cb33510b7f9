"""How tickets that a dead worker held come back.

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
from typing import NamedTuple

from asyncrl_runtime.contract.broker import TicketReturns
from asyncrl_runtime.weights.fleet import Fleet

log = logging.getLogger(__name__)

UNHELD_SECONDS = 2.5
"""So long after its delivery a living worker has said that it holds a ticket, even if one word was lost."""
AGAIN_SECONDS, LONGEST_AGAIN_SECONDS = 10.0, 160.0
"""A ticket that has brought nothing so long after it was handed back is handed back once more. Each time the
wait doubles, so that workers which are slow rather than dead are not given ever more to do."""


class _Unheld(NamedTuple):
    """A ticket that was delivered, and that nobody says it holds."""

    since: float
    """The time from which somebody could have said so."""
    last_delivered: int
    """The highest ticket that was delivered when it was first seen."""


class Orphans:
    """Finds delivered tickets that nobody holds. Pure but for the clock.

    A worker that is given a ticket when its engine has just begun to drain, say, hands it back, and then the
    ticket is queued until somebody has room. It is delivered before all that have never been. So nobody needs
    to hand it back as long as no worker has room, and nothing else has been delivered since.

    Args:
        group_size: the samples of a ticket.
    """

    def __init__(self, fleet: Fleet, clock: Callable[[], float], group_size: int) -> None:
        self._fleet = fleet
        self._clock = clock
        self._group_size = group_size
        self._unheld: dict[int, _Unheld] = {}
        self._not_before: dict[int, float] = {}
        self._pause: dict[int, float] = {}
        """The wait after the last time that a ticket was handed back, in seconds."""

    def find(self, delivered: Iterable[int], last_delivered: int) -> list[int]:
        """Return the tickets to be handed back now, and take it that they are.

        Args:
            delivered: tickets that a worker was given, and of which nothing has arrived.
            last_delivered: the highest ticket that any worker was given.
        """
        now, held, left_behind = self._clock(), self._fleet.held, self._fleet.left_behind
        waiting = set(delivered)
        self._pause = {ticket: pause for ticket, pause in self._pause.items() if ticket in waiting}
        unheld = sorted(waiting - held)
        if self._fleet.has_busy:  # it may have been given any of them, and cannot say so yet
            self._unheld = {}
        new = _Unheld(now, last_delivered)
        self._unheld = {ticket: self._unheld.get(ticket, new) for ticket in unheld}
        if self._fleet.is_full(self._group_size):
            self._unheld = {
                ticket: each if last_delivered > each.last_delivered else each._replace(since=now)
                for ticket, each in self._unheld.items()
            }
        orphans = [ticket for ticket in unheld if ticket in left_behind or self._has_waited(ticket, now)]
        orphans = [ticket for ticket in orphans if now >= self._not_before.get(ticket, now)]
        for ticket in orphans:
            self._pause[ticket] = min(2 * self._pause.get(ticket, AGAIN_SECONDS / 2), LONGEST_AGAIN_SECONDS)
            self._not_before[ticket] = now + self._pause[ticket]
        self._not_before = {ticket: at for ticket, at in self._not_before.items() if ticket in self._pause}
        return orphans

    def _has_waited(self, ticket: int, now: float) -> bool:
        listened = min(now - self._unheld[ticket].since, self._fleet.seconds_heard())
        return listened >= UNHELD_SECONDS


class Reaper:
    """Hands back what dead workers held."""

    def __init__(
        self, broker: TicketReturns, fleet: Fleet, clock: Callable[[], float], group_size: int
    ) -> None:
        self._broker = broker
        self._orphans = Orphans(fleet, clock, group_size)

    async def reap(self, waiting: Iterable[int]) -> list[int]:
        """Do it once; return the tickets that were handed back.

        Args:
            waiting: tickets that were issued, and of which nothing has arrived.

        Raises:
            TransportError: the broker is away; call again.
        """
        last_delivered = await self._broker.last_delivered_ticket()
        delivered = (ticket for ticket in waiting if ticket <= last_delivered)
        orphans = self._orphans.find(delivered, last_delivered)
        if orphans:
            await self._broker.hand_back(orphans)
            log.warning("tickets %s are held by nobody: handed back", orphans[:20])
        return orphans
