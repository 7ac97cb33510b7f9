"""Prompt groups that have arrived and are not closed, and how far the stream has been dealt with."""

from asyncrl_runtime.contract.messages import Group, GroupPart, Sample, SampleFailure, Tombstone
from asyncrl_runtime.trainer.books.arrivals import UNDECODABLE, Arrived


class Inbox:
    """Takes messages in stream order; the first complete form of each ticket counts. No I/O.

    `position` is what a checkpoint holds: everything up to it is closed or a duplicate, so a reader that
    begins behind it misses nothing.
    """

    def __init__(self, position: int) -> None:
        self.arrived: dict[int, Group | Tombstone] = {}
        """Complete groups, and tombstones, of tickets that are not closed, by ticket."""
        self.num_duplicates = 0
        self._last_sequence = position
        self._first_sequence: dict[int, int] = {}  # for each ticket that is arriving or has arrived
        self._parts: dict[int, dict[int, GroupPart]] = {}

    @property
    def last_sequence(self) -> int:
        """The place in the stream of the last message taken."""
        return self._last_sequence

    @property
    def position(self) -> int:
        return min(self._first_sequence.values(), default=self._last_sequence + 1) - 1

    def pass_over(self, sequence: int) -> None:
        """Note that the next message has been read and holds nothing for us."""
        self._last_sequence = sequence

    def take(self, sequence: int, content: Arrived, is_closed: bool) -> Group | Tombstone | None:
        """Take the content of the next message; return the group that it completes, if any.

        Args:
            is_closed: whether its ticket is trained or discarded already.
        """
        self._last_sequence = sequence
        ticket = content.ticket
        if is_closed or ticket in self.arrived:
            self.num_duplicates += 1
            return None
        self._first_sequence.setdefault(ticket, sequence)
        complete = self._assemble(content) if isinstance(content, GroupPart) else content
        if complete is not None:
            self._parts.pop(ticket, None)
            self.arrived[ticket] = complete
        return complete

    def has_seen(self, ticket: int) -> bool:
        """Return whether a message of this ticket has come that is still needed."""
        return ticket in self._first_sequence

    def close(self, ticket: int) -> None:
        """Drop the messages of a ticket that is trained or discarded, now that the ledger says so."""
        self.arrived.pop(ticket, None)
        self._parts.pop(ticket, None)
        self._first_sequence.pop(ticket, None)

    def set_aside(self, ticket: int) -> None:
        """Drop a group that will be discarded, but keep its place in the stream until the ledger says so."""
        self.arrived.pop(ticket, None)

    def forget_all(self) -> None:
        """Forget all that arrived: it is lost with the stream, and those tickets are issued again."""
        self.arrived.clear()
        self._parts.clear()
        self._first_sequence.clear()

    def _assemble(self, part: GroupPart) -> Group | Tombstone | None:
        parts = self._parts.setdefault(part.ticket, {})
        if any(other.group_size != part.group_size for other in parts.values()):
            message = "its samples came as parts of groups of different sizes"
            return Tombstone(ticket=part.ticket, reason=UNDECODABLE, message=message)
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
