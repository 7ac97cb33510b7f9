"""Which tickets exist, which are closed, and when another may be issued. Pure.

A ticket is open from its issue until it is trained in a step or counted as discarded. AReaL (arXiv
2505.24298, eq. 3) admits generation N while `floor((N-1)/B) <= v + eta`; in tickets that is the bound of
`TicketBook.limit`, which also holds when B changes and when tickets are discarded.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec


class Discard(NamedTuple):
    """A ticket that will never be trained; another one is issued in its place."""

    ticket: int
    reason: str
    """`stale`, `uniform`, `failed` (too few samples), `unusable_number`, `step_failed`, `out_of_memory`, a
    tombstone's reason, or `leftover`."""


class BookRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A TicketBook as a checkpoint holds it."""

    num_trained: int = 0
    num_discarded: int = 0
    low: int = 0
    trained_above: tuple[int, ...] = ()
    discarded_above: tuple[int, ...] = ()


@dataclass
class TicketBook:
    """Every ticket that is closed. Up to `low` all are; above it the two sets say which."""

    num_trained: int = 0
    num_discarded: int = 0
    low: int = 0
    trained_above: set[int] = field(default_factory=set)
    discarded_above: set[int] = field(default_factory=set)

    def is_closed(self, ticket: int) -> bool:
        return ticket <= self.low or ticket in self.trained_above or ticket in self.discarded_above

    def train(self, tickets: Iterable[int]) -> None:
        """Count tickets as trained in one step.

        Raises:
            AssertionError: one was closed before; it would be trained twice.
        """
        for ticket in tickets:
            assert not self.is_closed(ticket), f"ticket {ticket} is closed already"
            self.trained_above.add(ticket)
            self.num_trained += 1
        self._raise_low()

    def discard(self, tickets: Iterable[int]) -> None:
        for ticket in tickets:
            assert not self.is_closed(ticket), f"ticket {ticket} is closed already"
            self.discarded_above.add(ticket)
            self.num_discarded += 1
        self._raise_low()

    def limit(
        self,
        *,
        version: int,
        batch_size: int,
        max_versions: int,
        max_steps: int,
        num_in_step: int = 0,
        pending: Collection[int] = (),
    ) -> int:
        """Return the highest ticket number that may be issued now.

        At most `min(eta + 1, maxSteps - v) * B` tickets may be open: eta + 1 batches ahead of the policy, and
        none beyond the last step. Where every closed ticket is among the N issued, that is
        `N <= trained + discarded + min(eta + 1, maxSteps - v) * B`; a stream that was made again begins
        below tickets that are closed, and passes over them.

        Args:
            num_in_step: the tickets trained in a step whose weights are not published yet: still open here.
            pending: tickets that will be discarded, though no ledger line says so yet.
        """
        allowance = max(0, min(max_versions + 1, max_steps - version)) * batch_size - num_in_step
        ticket, num_open = self.low, 0
        while (is_closed := self.is_closed(ticket + 1) or ticket + 1 in pending) or num_open < allowance:
            num_open += not is_closed
            ticket += 1
        return ticket

    @property
    def highest(self) -> int:
        """The highest ticket that is closed; 0 if none."""
        return max((self.low, *self.trained_above, *self.discarded_above))

    def open_tickets(self, num_issued: int) -> list[int]:
        return [ticket for ticket in range(self.low + 1, num_issued + 1) if not self.is_closed(ticket)]

    def record(self) -> BookRecord:
        return BookRecord(
            num_trained=self.num_trained,
            num_discarded=self.num_discarded,
            low=self.low,
            trained_above=tuple(sorted(self.trained_above)),
            discarded_above=tuple(sorted(self.discarded_above)),
        )

    @classmethod
    def restore(cls, record: BookRecord) -> "TicketBook":
        return cls(
            num_trained=record.num_trained,
            num_discarded=record.num_discarded,
            low=record.low,
            trained_above=set(record.trained_above),
            discarded_above=set(record.discarded_above),
        )

    def copy(self) -> "TicketBook":
        return self.restore(self.record())

    def _raise_low(self) -> None:
        while (ticket := self.low + 1) in self.trained_above or ticket in self.discarded_above:
            self.trained_above.discard(ticket)
            self.discarded_above.discard(ticket)
            self.low = ticket


class EndlessDiscards(Exception):
    """So many tickets were discarded since the last step that no batch will ever form."""


REMEDIES = {
    "failed": "see why samples fail in the log lines above: the reward or workflow raises or times out",
    "generation_error": "see the engines' logs",
    "out_of_memory": "lower spec.training.tokensPerMicroBatch or spec.model.contextLength",
    "prompt_too_long": "raise spec.model.contextLength, or leave long prompts out of spec.dataset",
    "stale": "raise spec.staleness.maxVersions, or set spec.staleness.onExceed to Keep",
    "step_failed": "see the exception in the trainer's log lines above",
    "uniform": "set spec.sampling.filter to None, or choose prompts that are neither too easy nor too hard",
    "unusable_number": "see the engines' logs for log-probs, and spec.reward for rewards: numbers must be "
    "finite, and within float32",
    "unusable_row": "correct the rows of spec.dataset that the log lines above name",
}
"""What to do about endless discards, by their reason."""


@dataclass
class DiscardCount:
    """Counts the discards since the last step, to end a job whose prompts can never form a batch.

    A filter may discard most groups and still make progress, so the bound is generous: ten batches.
    Only tickets issued since the last step count: older ones may be stale for a reason that has passed.
    """

    issued_before: int = 0
    """The last ticket that was issued before the last step ended."""
    reasons: Counter[str] = field(default_factory=Counter)

    def step_ended(self, num_issued: int) -> None:
        self.issued_before = num_issued
        self.reasons.clear()

    def add(self, discard: Discard, batch_size: int) -> None:
        """Count one discard.

        Raises:
            EndlessDiscards: ten batches of tickets issued since the last step were discarded; the
                message holds the count by reason.
        """
        if discard.ticket <= self.issued_before:
            return
        self.reasons[discard.reason] += 1
        if (total := self.reasons.total()) >= 10 * batch_size:
            by_reason = ", ".join(f"{reason}: {count}" for reason, count in self.reasons.most_common())
            [(most_common, _)] = self.reasons.most_common(1)
            raise EndlessDiscards(
                f"{total} prompt groups in a row were discarded without a step ({by_reason}); the limit is "
                f"10 x batchSize = {10 * batch_size}; " + REMEDIES.get(most_common, "see the log lines above")
            )
