"""The books of rank 0: which tickets may be issued, what has arrived, what the next batch is.

Everything here is decided from the ledger, the checkpoint and what arrives; the I/O around it is in
side_tasks.py, so that this can be tested with any order of events.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from asyncrl_api.job import Spec, StalenessSpec
from asyncrl_api.ledger import RecordedStep
from asyncrl_api.spec_views import LiveSpec
from asyncrl_runtime.contract.bell import Bell
from asyncrl_runtime.contract.broker import StreamMessage
from asyncrl_runtime.contract.messages import Group, Tombstone
from asyncrl_runtime.contract.refused import Refusals, one_line
from asyncrl_runtime.trainer.books.arrivals import Expected, Unwanted, examine
from asyncrl_runtime.trainer.books.freshness import Freshness
from asyncrl_runtime.trainer.books.inbox import Inbox
from asyncrl_runtime.trainer.books.staleness import LiveGroup, assess, cannot_be_trained, form_batch, reject
from asyncrl_runtime.trainer.books.tickets import (
    Discard,
    DiscardCount,
    RewardRange,
    TicketBook,
    top_reward,
    widened,
)
from asyncrl_runtime.trainer.books.verdicts import Verdicts

log = logging.getLogger(__name__)

UNBOUNDED_DISCARDS = 10**6
"""More discards between two steps than there will be, where the manifest does not bound them."""


@dataclass(frozen=True)
class Batch:
    """The prompt groups of one step, with the live values in force."""

    version: int
    """The policy version that the groups train; the step makes the next one."""
    groups: tuple[LiveGroup, ...]
    discards: Mapping[str, tuple[int, ...]]
    """Tickets that were discarded since the step before, by reason."""
    max_steps: int
    max_new_tokens: int
    """`spec.sampling.maxNewTokens`, for samples of older workers, which do not say what theirs was."""
    frozen: Mapping[str, Any] = field(default_factory=dict)
    """If the step is repeated, the values of the attempt that recorded it (`StepValues.as_recorded`)."""
    is_repeat: bool = False
    """Whether an earlier attempt recorded the step: it is trained again, but not recorded again."""
    skipped: tuple[int, ...] = ()
    """The minibatches that, as the ledger says, were not applied when the step was trained before."""

    @property
    def tickets(self) -> tuple[int, ...]:
        return tuple(group.ticket for group in self.groups)


class Foreseen(NamedTuple):
    """The batch that will probably be the next, but for its discards."""

    batch: Batch
    verdicts: Verdicts
    """What was worked out to form it, at its version."""


class RecordedBatchLost(Exception):
    """A batch of the ledger can no longer be had: its trajectories are gone with their stream."""


@dataclass
class Counters:
    """What happened to groups, samples and tokens, since this attempt began."""

    num_dropped_samples: int = 0
    num_masked_tokens: int = 0
    num_failed_samples: int = 0
    discards: dict[str, int] = field(default_factory=lambda: defaultdict(int))


class Books:
    """Holds the books. Others may read them, and change them only through the methods here.

    Args:
        spec: the spec as the attempt begins; `use` replaces its live values as they change.
        version: the version in the checkpoint.
        book: the tickets that were closed up to `version`, from the checkpoint.
        recorded: the steps of the ledger from `version` on, which are repeated first.
        began: the version at which each attempt began new steps (attempt -> version).
        position: how far the trajectory stream has been dealt with, from the checkpoint.
        rewards: the range of rewards that the job has seen, from the checkpoint.
        attempt: this attempt's number; 0: versions of samples are not checked.
        vocabulary_size: the number of token ids; None: token ids of samples are not checked.
        refusals: counts what arrives and is not taken.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        version: int = 0,
        book: TicketBook | None = None,
        recorded: Sequence[RecordedStep] = (),
        began: Mapping[int, int] | None = None,
        position: int = 0,
        rewards: RewardRange | None = None,
        attempt: int = 0,
        vocabulary_size: int | None = None,
        refusals: Refusals | None = None,
    ) -> None:
        self.gate_moved = Bell()
        """Rings for whoever issues tickets: the limit may have moved."""
        self.news = Bell()
        """Rings for the training loop: a group has arrived, or something else needs to be looked at."""
        self.inbox = Inbox(position)
        self.counters = Counters()
        self.refusals = refusals or Refusals()
        self._verdicts = Verdicts()
        self._batch_size = spec.training.batch_size
        self._group_size = spec.sampling.group_size
        self._attempt = attempt
        self._vocabulary_size = vocabulary_size
        self._live: LiveSpec = spec
        self._version = version
        self._book = book or TicketBook()
        self._began: dict[int, int] = dict(began or {})
        self._recorded = list(recorded)
        self._is_recorded_lost = False
        self._pending: list[Discard] = []
        self._unpublished: dict[int, int] = {}  # tickets of recorded steps, by the version that they make
        self._published = version
        self._discard_count = DiscardCount()
        self._reward_type = spec.reward.type
        self._rewards = rewards
        self._mastered = ""
        self._freshness = Freshness()
        self._num_issued = 0
        self._most_issued = max([0, *(ticket for step in self._recorded for ticket in step.tickets)])
        self._own_after: int | None = None

    @property
    def live(self) -> LiveSpec:
        """The values of the fields marked L that are in force."""
        return self._live

    def use(self, live: LiveSpec) -> None:
        """Put other live values into force."""
        self._live = live
        self.gate_moved.ring()
        self.news.ring()

    @property
    def version(self) -> int:
        """The trainer's version: the number of steps that were trained. Batches are judged by it."""
        return self._version

    @property
    def published(self) -> int:
        """The number of steps whose weights were published or offered. The gate goes by it.

        It lags behind `version` while weights are published beside the next step.
        """
        return self._published

    @property
    def book(self) -> TicketBook:
        """Every ticket that is closed; whoever reads it must not change it."""
        return self._book

    @property
    def rewards(self) -> RewardRange | None:
        """The lowest and the highest reward that the job has seen; None before the first."""
        return self._rewards

    @property
    def mastered(self) -> str:
        """Why there is nothing left to learn, in words; empty while there may be. `next_batch` decides it."""
        return self._mastered

    @property
    def began(self) -> Mapping[int, int]:
        """The version at which each attempt began new steps (attempt -> version)."""
        return self._began

    def begin(self, attempt: int) -> None:
        """Note that this attempt forms new steps from now on, as the ledger says."""
        self._began[attempt] = self._version

    # -- issuing

    @property
    def num_issued(self) -> int:
        """The last ticket of the prompt stream; the formulas call it N."""
        return self._num_issued

    def issued(self, last_ticket: int) -> None:
        """Note that the prompt stream holds tickets up to this one."""
        if self._own_after is None:
            self._own_after = last_ticket
        self._num_issued = last_ticket
        self._most_issued = max(self._most_issued, last_ticket)

    def issue_from(self, ticket: int) -> None:
        """Note that the prompt stream was made again and is empty: this ticket is its next."""
        self._num_issued = ticket - 1
        self.gate_moved.ring()

    @property
    def limit(self) -> int:
        """The highest ticket that may be issued now.

        A discard is replaced at once; a trained batch only when its weights are published.
        """
        staleness = self._live.staleness
        return self._book.limit(
            version=self._published,
            batch_size=self._batch_size,
            max_versions=staleness.max_versions,
            max_steps=self._live.training.max_steps,
            at_most=self._freshness.open_tickets(staleness.target, self._batch_size, staleness.max_versions),
            num_in_step=sum(self._unpublished.values()),
            pending={discard.ticket for discard in self._pending},
        )

    def is_closed(self, ticket: int) -> bool:
        return self._book.is_closed(ticket) or any(discard.ticket == ticket for discard in self._pending)

    @property
    def num_open(self) -> int:
        """The number of tickets that were issued and are not closed."""
        return sum(not self.is_closed(ticket) for ticket in self._book.open_tickets(self._num_issued))

    @property
    def waiting_tickets(self) -> list[int]:
        """The tickets that were issued and have brought nothing yet, or no whole group."""
        open_tickets = self._book.open_tickets(self._num_issued)
        return [t for t in open_tickets if t not in self.inbox.arrived and not self.is_closed(t)]

    # -- arriving

    def take(self, message: StreamMessage) -> None:
        """Take the next message of the trajectory stream."""
        if self._recorded:  # how far the stream is read decides whether a recorded step is lost
            self.news.ring()
        content = examine(message, self._expected())
        if isinstance(content, Unwanted):
            self.refusals.add(content.kind, content.why)
            if content.given_up is None:
                self.inbox.pass_over(message.sequence)
                return
            content = content.given_up
        arrived = self.inbox.take(message.sequence, content, self.is_closed(content.ticket))
        if arrived is None:
            return
        self.news.ring()
        if isinstance(arrived, Group):
            self._rewards = widened(self._rewards, (sample.reward for sample in arrived.samples))
        if self._is_recorded(arrived.ticket):
            return
        if isinstance(arrived, Group):
            self.counters.num_failed_samples += len(arrived.failures)
        if (rejected := reject(arrived, self._live.sampling.filter)) is not None:
            self._discard(rejected, arrived)
        elif isinstance(arrived, Group) and isinstance(self._assess(arrived), LiveGroup):
            self._discard_count.group_kept()

    def _assess(self, group: Group) -> LiveGroup | Discard:
        live = self._live
        return self._verdicts.on(group, self._version, live.staleness, self._began, live.sampling.filter)

    def _expected(self) -> Expected:
        highest = self._highest_plausible()
        return Expected(
            highest_ticket=highest,
            group_size=self._group_size,
            own_after=highest if self._own_after is None else self._own_after,
            attempt=self._attempt,
            version=self._version + 1,  # an engine may have it a moment before `advance` is called
            vocabulary_size=self._vocabulary_size,
        )

    def _highest_plausible(self) -> int:
        """Return a ticket that surely no worker was ever given a higher one than.

        After a restart the prompt stream may be gone, and with it what an earlier attempt has issued. It did
        not go further beyond what is closed than the gate and its discards allowed it, and the ledger does
        not tell of discards before the next step.
        """
        ahead = (self._live.staleness.max_versions + 1) * self._batch_size
        discards = self._live.sampling.max_discards_in_a_row or UNBOUNDED_DISCARDS
        return max(self._most_issued, self._book.highest) + 2 * (ahead + discards)

    def is_known(self, ticket: int) -> bool:
        """Return whether a ticket is closed, or its group or a part of it has arrived.

        One that a recorded step discards is closed when that step is repeated; it need not have arrived.
        """
        return self.is_closed(ticket) or self.inbox.has_seen(ticket) or self._is_recorded_discard(ticket)

    # -- batches

    def batch_wanted(self) -> None:
        """Note that the trainer wants the batch of its next new step."""
        if not self.is_repeating:
            max_versions = self._live.staleness.max_versions
            self._freshness.batch_wanted(len(self.inbox.arrived), self._batch_size, max_versions)
            self.gate_moved.ring()

    @property
    def is_recorded_lost(self) -> bool:
        """Whether steps still to be repeated have lost their trajectories: `cut` gives them up."""
        return self._is_recorded_lost

    @property
    def is_repeating(self) -> bool:
        """Whether steps of the ledger are still to be repeated."""
        return bool(self._recorded)

    def next_batch(self) -> Batch | None:
        """Return the batch of the next step, or None while too few groups have arrived.

        Raises:
            EndlessDiscards: no batch will ever form, and not because everything is solved (`mastered`).
            RecordedBatchLost: a recorded step cannot be repeated; call `cut` to go on.
        """
        if self._recorded:
            return self._recorded_batch(self._recorded[0])
        groups, discards = form_batch(
            (group for group in self.inbox.arrived.values() if isinstance(group, Group)),
            self._assess,
            batch_size=self._batch_size,
            freshest_first=self._live.staleness.order == "FreshestFirst",
        )
        for discard in discards:
            self._discard(discard, self.inbox.arrived[discard.ticket])
        if groups is None:
            top = top_reward(self._reward_type, self._rewards)
            self._mastered = self._discard_count.mastered(self._live.sampling.max_discards_in_a_row, top)
            return None
        by_reason: dict[str, list[int]] = defaultdict(list)
        for discard in self._pending:
            by_reason[discard.reason].append(discard.ticket)
        return Batch(
            version=self._version,
            groups=tuple(groups),
            discards={reason: tuple(sorted(tickets)) for reason, tickets in sorted(by_reason.items())},
            max_steps=self._live.training.max_steps,
            max_new_tokens=self._live.sampling.max_new_tokens,
        )

    def foresee(self, batch: Batch) -> Callable[[], Foreseen | None]:
        """Return what works out, apart from the event loop, what `next_batch` will say after `batch`.

        That is so if nothing arrives and nothing changes meanwhile; it decides and changes nothing.
        """
        live, began, version = self._live, dict(self._began), batch.version + 1
        arrived = [group for group in self.inbox.arrived.values() if isinstance(group, Group)]
        if self._recorded or len(arrived) < self._batch_size or version >= live.training.max_steps:
            return lambda: None

        def work_out() -> Foreseen | None:
            verdicts = Verdicts()
            groups, _ = form_batch(
                arrived,
                lambda group: verdicts.on(group, version, live.staleness, began, live.sampling.filter),
                batch_size=self._batch_size,
                freshest_first=live.staleness.order == "FreshestFirst",
            )
            if groups is None:
                return None
            limit, max_steps = live.sampling.max_new_tokens, live.training.max_steps
            return Foreseen(Batch(version, tuple(groups), {}, max_steps, limit), verdicts)

        return work_out

    def take_foreseen(self, foreseen: Foreseen) -> None:
        """Keep what was worked out about groups, for the version that it is about."""
        self._verdicts.take_over(foreseen.verdicts)

    def _recorded_batch(self, step: RecordedStep) -> Batch | None:
        """Return a batch as it was recorded, under the values that were in force then."""
        if self._is_recorded_lost:
            raise RecordedBatchLost(f"step {step.version} was recorded, but its trajectories are lost")
        recorded = with_recorded_values(self._live, step.live)
        groups = []
        for ticket in step.tickets:
            group = self.inbox.arrived.get(ticket)
            if group is None:
                return None
            if isinstance(group, Tombstone):
                raise RecordedBatchLost(f"ticket {ticket} of step {step.version} is a tombstone now")
            verdict = assess(group, step.version, recorded.staleness, step.began, "None")
            if isinstance(verdict, Discard):
                raise RecordedBatchLost(
                    f"ticket {ticket} of step {step.version} cannot be trained: {verdict.reason}"
                )
            groups.append(verdict)
        return Batch(
            version=step.version,
            groups=tuple(groups),
            discards=step.discards,
            max_steps=recorded.max_steps,
            max_new_tokens=recorded.max_new_tokens,
            frozen=step.frozen,
            is_repeat=True,
            skipped=step.skipped,
        )

    def missing_of_recorded(self) -> list[int]:
        """Return the tickets of the next step to be repeated that have not arrived."""
        if not self._recorded:
            return []
        return [ticket for ticket in self._recorded[0].tickets if ticket not in self.inbox.arrived]

    def cut(self) -> None:
        """Give up the steps still to be repeated; their tickets are open again."""
        self._recorded.clear()
        self._is_recorded_lost = False
        for group in list(self.inbox.arrived.values()):
            if (rejected := reject(group, self._live.sampling.filter)) is not None:
                self._discard(rejected, group)

    def close(self, batch: Batch) -> None:
        """Close the tickets of a step that is in the ledger: its own as trained, the others as discarded."""
        discarded = [ticket for tickets in batch.discards.values() for ticket in tickets]
        self._book.train(batch.tickets)
        self._book.discard(discarded)
        self._unpublished[batch.version + 1] = len(batch.tickets)
        for ticket in (*batch.tickets, *discarded):
            self.inbox.close(ticket)
            self._verdicts.forget(ticket)
        self._pending = [discard for discard in self._pending if not self._book.is_closed(discard.ticket)]

    def advance(self, batch: Batch) -> None:
        """Note that a step is trained. The gate stays until its weights are published."""
        self._version = batch.version + 1
        if batch.is_repeat:
            self._recorded.pop(0)
        for group in batch.groups:
            self.counters.num_dropped_samples += group.num_dropped_samples
            self.counters.num_masked_tokens += group.num_masked_tokens
        self._discard_count.step_ended(self._num_issued)

    def publish(self, version: int) -> None:
        """Move the gate, now that a version, and so all before it, is published or offered."""
        assert version <= self._version, f"version {version} is published before it is trained"
        self._published = max(self._published, version)
        for made in [made for made in self._unpublished if made <= version]:
            del self._unpublished[made]
        self.gate_moved.ring()

    @property
    def last_ticket(self) -> int:
        """The last ticket ever issued; above N if streams were made again and N is not that far yet."""
        return max(self._num_issued, self._book.highest, *(discard.ticket for discard in self._pending), 0)

    def left_over(self) -> dict[str, list[int]]:
        """Return what is discarded at the end, by reason: decided but not recorded, or still open."""
        by_reason: dict[str, list[int]] = defaultdict(list)
        for discard in self._pending:
            by_reason[discard.reason].append(discard.ticket)
        decided = {discard.ticket for discard in self._pending}
        open_tickets = [t for t in self._book.open_tickets(self.last_ticket) if t not in decided]
        if open_tickets:
            by_reason["leftover"] = open_tickets
        return dict(by_reason)

    def add_discards(self, by_reason: Mapping[str, Sequence[int]]) -> None:
        """Take over the discards of the ledger's end line, when a finished job goes on with more steps."""
        for reason, tickets in by_reason.items():
            self._pending += [Discard(ticket, reason) for ticket in tickets if not self.is_closed(ticket)]

    def streams_lost(self) -> None:
        """Forget what has arrived: it is gone with its stream, and every open ticket is issued again.

        Steps still to be repeated are lost too. Their tickets will be sampled anew, and the new
        samples are not what was recorded.
        """
        self.inbox.forget_all()
        self._verdicts.clear()
        self._pending.clear()
        self._is_recorded_lost = bool(self._recorded)

    # -- helpers

    def _is_recorded(self, ticket: int) -> bool:
        return self._is_recorded_discard(ticket) or any(ticket in step.tickets for step in self._recorded)

    def _is_recorded_discard(self, ticket: int) -> bool:
        return any(ticket in tickets for step in self._recorded for tickets in step.discards.values())

    def _discard(self, discard: Discard, group: Group | Tombstone) -> None:
        log.info(
            "ticket %d is discarded: %s",
            discard.ticket,
            ": ".join([discard.reason, *_causes(discard, group)]),
        )
        self._pending.append(discard)
        self.inbox.set_aside(discard.ticket)
        self._verdicts.forget(discard.ticket)
        self.counters.discards[discard.reason] += 1
        rewards = [sample.reward for sample in group.samples] if isinstance(group, Group) else []
        self._discard_count.add(discard, min(rewards, default=None))
        self.gate_moved.ring()


def _causes(discard: Discard, group: Group | Tombstone) -> list[str]:
    """Return in words why a ticket was given up, if that was reported; of many failures, the first."""
    if isinstance(group, Tombstone):
        return [group.message] if group.message else []
    if discard.reason == "unusable_number":
        return [fault for sample in group.samples if (fault := cannot_be_trained(sample))][:1]
    if discard.reason != "failed":
        return []
    return [one_line(f"{failure.reason}: {failure.message}", 1000) for failure in group.failures[:1]]


class RecordedValues(NamedTuple):
    """The live values that decide what a step trains."""

    staleness: StalenessSpec
    max_steps: int
    max_new_tokens: int


def recorded_values(live: LiveSpec) -> dict[str, Any]:
    """Return the live values that decide what a step trains, for the ledger."""
    return {
        "staleness": live.staleness.model_dump(by_alias=True, exclude={"target"}),
        "training": {"maxSteps": live.training.max_steps},
        "sampling": {"maxNewTokens": live.sampling.max_new_tokens},
    }


def with_recorded_values(live: LiveSpec, values: Mapping[str, Any]) -> RecordedValues:
    """Return the values that were in force when a step was recorded; `live` supplies what is missing."""
    return RecordedValues(
        staleness=live.staleness.model_validate(values.get("staleness", {})),
        max_steps=values.get("training", {}).get("maxSteps", live.training.max_steps),
        max_new_tokens=values.get("sampling", {}).get("maxNewTokens", live.sampling.max_new_tokens),
    )
