"""Prompt groups that have arrived and are not closed, and how far the stream is done with."""

import logging

from asyncrl_api.names import ticket_of
from asyncrl_runtime.contract.broker import StreamMessage
from asyncrl_runtime.contract.messages import (
    Group,
    GroupPart,
    Sample,
    SampleFailure,
    Tombstone,
    decode,
)

log = logging.getLogger(__name__)


class Inbox:
    """Takes messages in stream order; of each ticket the first complete form counts. No I/O.

    `position` is what a checkpoint holds: everything up to it is closed or a duplicate, so a reader that
    begins behind it misses nothing.
    """

    def __init__(self, position: int) -> None:
        self.arrived: dict[int, Group | Tombstone] = {}
        """By ticket; complete and not closed."""
        self.num_duplicates = 0
        self._last_sequence = position
        self._first_sequence: dict[int, int] = {}  # of each ticket that is arriving or has arrived
        self._parts: dict[int, dict[int, GroupPart]] = {}

    @property
    def last_sequence(self) -> int:
        """Of the last message taken."""
        return self._last_sequence

    @property
    def position(self) -> int:
        return min(self._first_sequence.values(), default=self._last_sequence + 1) - 1

    def take(self, message: StreamMessage, is_closed: bool) -> Group | Tombstone | None:
        """Take the next message; return the group that it completes, if any.

        Args:
            is_closed: whether its ticket is trained or discarded already.
        """
        self._last_sequence = message.sequence
        parsed = _parse(message)
        ticket = parsed.ticket
        if is_closed or ticket in self.arrived:
            self.num_duplicates += 1
            return None
        self._first_sequence.setdefault(ticket, message.sequence)
        complete = self._assemble(parsed) if isinstance(parsed, GroupPart) else parsed
        if complete is not None:
            self._parts.pop(ticket, None)
            self.arrived[ticket] = complete
        return complete

    def has_seen(self, ticket: int) -> bool:
        """Whether a message of this ticket has come that is not done with."""
        return ticket in self._first_sequence

    def close(self, ticket: int) -> None:
        """A ticket is trained or discarded, and the ledger says so: its messages are no longer needed."""
        self.arrived.pop(ticket, None)
        self._parts.pop(ticket, None)
        self._first_sequence.pop(ticket, None)

    def set_aside(self, ticket: int) -> None:
        """A ticket will be discarded, but the ledger does not say so yet: keep its place in the stream."""
        self.arrived.pop(ticket, None)

    def forget_all(self) -> None:
        """The stream is lost, and with it all that arrived: those tickets are issued again."""
        self.arrived.clear()
        self._parts.clear()
        self._first_sequence.clear()

    def _assemble(self, part: GroupPart) -> Group | None:
        parts = self._parts.setdefault(part.ticket, {})
        parts[part.outcome.index] = part
        if len(parts) < part.group_size:
            return None
        outcomes = [parts[index].outcome for index in sorted(parts)]
        return Group(
            ticket=part.ticket,
            group_size=part.group_size,
            samples=tuple(outcome for outcome in outcomes if isinstance(outcome, Sample)),
            failures=tuple(outcome for outcome in outcomes if isinstance(outcome, SampleFailure)),
            worker=part.worker,
            seconds=part.seconds,
        )


def _parse(message: StreamMessage) -> Group | GroupPart | Tombstone:
    """Decode; what can never be decoded is a tombstone, since its id keeps any other form out."""
    try:
        return decode(message.data, Group, GroupPart, Tombstone)
    except ValueError as error:
        log.error("message %d on %s: %s", message.sequence, message.subject, error)
        return Tombstone(ticket=ticket_of(message.subject), reason="undecodable", message=str(error))
