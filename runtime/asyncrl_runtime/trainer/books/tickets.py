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
        at_most: int | None = None,
        num_in_step: int = 0,
        pending: Collection[int] = (),
    ) -> int:
        """Return the highest ticket number that may be issued now.

        At most `min(eta + 1, maxSteps - v) * B` tickets may be open: eta + 1 batches ahead of the policy, and
        none beyond the last step. Where every closed ticket is among the N issued, that is
        `N <= trained + discarded + min(eta + 1, maxSteps - v) * B`; a stream that was made again begins
        below tickets that are closed, and passes over them.

        Args:
            at_most: the number of tickets that are meant to be open, if that is fewer (`Freshness`).
            num_in_step: the tickets trained in a step whose weights are not published yet: still open here.
            pending: tickets that will be discarded, though no ledger line says so yet.
        """
        bound = max(0, min(max_versions + 1, max_steps - version)) * batch_size
        allowance = (bound if at_most is None else min(bound, at_most)) - num_in_step
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
    """So many prompt groups were discarded in a row that no batch will ever form."""


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


MASTERED_SHARE = 0.9
"""The share of discarded groups that must be solved for the policy to have mastered its prompts. Not all,
since a data set may hold prompts that nobody can solve, such as those with a wrong answer."""
TOP_REWARDS = {"Math": 1.0, "ReasoningGym": 1.0, "Code": 1.0}
"""The highest reward that a type can give; of the user's own (`Function`, `Service`) it is not known."""


class RewardRange(NamedTuple):
    """The lowest and the highest reward that samples of the job have had."""

    low: float
    high: float


def widened(seen: RewardRange | None, rewards: Iterable[float]) -> RewardRange | None:
    """Return the range that holds `rewards` too; None while there is no reward."""
    known = (*(seen or ()), *rewards)
    return RewardRange(min(known), max(known)) if known else None


def top_reward(reward_type: str, seen: RewardRange | None) -> float | None:
    """Return the reward of a solved prompt; None if that cannot be known.

    The highest reward that was seen counts as the top only if a lower one was seen as well: a policy that has
    never solved anything has always had the same reward, too.
    """
    if reward_type in TOP_REWARDS:
        return TOP_REWARDS[reward_type]
    return seen.high if seen is not None and seen.low < seen.high else None


@dataclass
class DiscardCount:
    """Counts the prompt groups that are discarded in a row, to end a job that has nothing to learn from.

    A group that is kept ends the row, and so does a step: a filter may discard nearly everything and still
    make progress. Only tickets issued since the last step count: older ones may be stale for a reason that
    has passed.
    """

    issued_before: int = 0
    """The last ticket that was issued before the last step ended."""
    reasons: Counter[str] = field(default_factory=Counter)
    uniform_rewards: Counter[float] = field(default_factory=Counter)
    """The number of groups by the lowest reward of their samples, of those discarded as uniform."""

    def step_ended(self, num_issued: int) -> None:
        self.issued_before = num_issued
        self.group_kept()

    def group_kept(self) -> None:
        """Note that a group can be trained: the row ends."""
        self.reasons.clear()
        self.uniform_rewards.clear()

    def add(self, discard: Discard, lowest_reward: float | None) -> None:
        """Count one discard.

        Args:
            lowest_reward: the lowest reward of the group's samples; None if it has none.
        """
        if discard.ticket <= self.issued_before:
            return
        self.reasons[discard.reason] += 1
        if discard.reason == "uniform" and lowest_reward is not None:
            self.uniform_rewards[lowest_reward] += 1

    def mastered(self, bound: int, top: float | None) -> str:
        """Return that the policy has mastered its prompts, in words; empty while the row may still end.

        Args:
            bound: `spec.sampling.maxDiscardsInARow`.
            top: the reward of a solved prompt, if it is known.

        Raises:
            EndlessDiscards: the row is too long, and it is not because the prompts are solved; the message
                holds the count by reason.
        """
        total = self.reasons.total()
        if bound == 0 or total < bound:
            return ""
        solved = 0 if top is None else sum(n for low, n in self.uniform_rewards.items() if low >= top)
        if solved >= MASTERED_SHARE * total:
            return (
                f"the policy has mastered its prompts: {solved} of the last {total} prompt groups had the "
                f"top reward, {top:g}, in every sample, and the others were discarded too"
            )
        by_reason = ", ".join(f"{reason}: {count}" for reason, count in self.reasons.most_common())
        [(most_common, _)] = self.reasons.most_common(1)
        raise EndlessDiscards(
            f"{total} prompt groups in a row were discarded, and none was kept ({by_reason}); the limit is "
            f"spec.sampling.maxDiscardsInARow = {bound}; "
            + REMEDIES.get(most_common, "see the log lines above")
        )
