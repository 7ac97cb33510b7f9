"""The books under every order of events, crashes, restarts from older checkpoints, and lost streams.

The model around it is the smallest that is true: a prompt queue whose last sequence is N, a trajectory
stream with sequences, a ledger of lines, checkpoints that hold a position. What the real ones do over NATS
and on disk is tested elsewhere; this is about the decisions.
"""

from dataclasses import dataclass, field

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from asyncrl_api.job import Spec
from asyncrl_api.ledger import History, LedgerLine, read_history
from asyncrl_api.parsing import parse_spec
from asyncrl_runtime.contract.broker import StreamMessage
from asyncrl_runtime.contract.messages import Group, Sample, SampleFailure, Tombstone, VersionSpan, encode
from asyncrl_runtime.history.audit import audit
from asyncrl_runtime.trainer.books.books import Batch, Books, RecordedBatchLost, recorded_values
from asyncrl_runtime.trainer.books.failed_steps import step_to_give_up
from asyncrl_runtime.trainer.books.tickets import BookRecord, EndlessDiscards, TicketBook
from support.messages.samples import make_sample

MAX_STEPS = 6


BASE = parse_spec(
    {
        "model": {"source": "file://m"},
        "dataset": {"source": "file://d"},
        "reward": {"type": "Math"},
        "sampling": {"groupSize": 2},
        "training": {"batchSize": 2, "maxSteps": MAX_STEPS, "minibatches": 1},
        "gpuBudget": {"total": 2},
        "checkpoint": {"location": {"claimName": "c"}},
    }
)


def make_spec(
    batch_size: int,
    max_versions: int,
    on_exceed: str,
    sample_filter: str,
    order: str,
    target: int | str = "Auto",
) -> Spec:
    staleness = {"max_versions": max_versions, "on_exceed": on_exceed, "order": order, "target": target}
    blocks = {
        "training": BASE.training.model_copy(update={"batch_size": batch_size}),
        "sampling": BASE.sampling.model_copy(
            update={"filter": sample_filter, "max_discards_in_a_row": 10 * batch_size}
        ),
        "staleness": BASE.staleness.model_copy(update=staleness),
    }
    return BASE.model_copy(update=blocks)


@dataclass
class Saved:
    """A checkpoint."""

    version: int
    book: BookRecord
    position: int
    stream: int


@dataclass
class World:
    """What survives a crash of the trainer."""

    lines: list[str] = field(default_factory=list)
    checkpoints: list[Saved] = field(default_factory=list)
    stream: list[tuple[int, bytes, int]] = field(default_factory=list)  # (sequence, data, ticket)
    stream_number: int = 0
    last_sequence: int = 0
    last_ticket: int = 0
    queued: set[int] = field(default_factory=set)
    stored: set[int] = field(default_factory=set)  # message ids in the deduplication window

    def write(self, line: LedgerLine) -> None:
        self.lines.append(msgspec.json.encode(line).decode())

    @property
    def history(self) -> History:
        return read_history(self.lines)


class BooksMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.attempt = 0
        self.spec = make_spec(2, 1, "Mask", "None", "OldestFirst")
        self.held: set[int] = set()
        self.published: list[tuple[int, int]] = []
        self.recorded: dict[int, Batch] = {}
        self.finished = False
        self._start()

    # -- the trainer's life

    @rule(data=st.data(), num_steps=st.integers(1, 3), save=st.booleans())
    def go_on(self, data: st.DataObject, num_steps: int, save: bool) -> None:
        """Some rounds in which nothing is in the way, so that faults meet a job that is under way."""
        for _ in range(0 if self.finished else num_steps):
            self.sample(data, num_tickets=6, num_delivered=100)
            self.form_and_record()
            self.train(save)
            self.publish()

    def _start(self, checkpoint: int = -1) -> None:
        world = self.world
        self.attempt += 1
        world.write(LedgerLine(attempt=self.attempt, uid="u"))
        if given_up := step_to_give_up(world.history):
            world.write(
                LedgerLine(attempt=self.attempt, cut=given_up.version, discards=dict(given_up.discards))
            )
        history = world.history
        usable = [c for c in world.checkpoints if c.version <= history.version]
        world.checkpoints = usable
        saved = usable[max(checkpoint, -len(usable))] if usable else None
        if saved is None:
            self.books = Books(self.spec)
            self._save()
        else:
            del world.checkpoints[world.checkpoints.index(saved) + 1 :]
            self.books = Books(
                self.spec,
                version=saved.version,
                book=TicketBook.restore(saved.book),
                recorded=history.steps[saved.version :],
                began=history.began,
                position=saved.position,
            )
        self.books.add_discards(history.left_over)
        self.next_sequence = self.books.inbox.last_sequence + 1
        self.books.issued(world.last_ticket)
        self.has_begun = False
        self.batch: Batch | None = None
        self.offered = self.trained = self.books.version
        self.in_steps: dict[int, int] = {}
        if saved is not None and saved.stream != world.stream_number:
            self._make_streams_again(lost=True)

    def _save(self) -> None:
        books = self.books
        self.world.checkpoints = [c for c in self.world.checkpoints if c.version < books.version]
        self.world.checkpoints.append(
            Saved(
                books.version,
                books.book.record(),
                books.inbox.position,
                self.world.stream_number,
            )
        )
        oldest = self.world.checkpoints[-2:][0].position
        self.world.checkpoints = self.world.checkpoints[-2:]
        self.world.stream = [entry for entry in self.world.stream if entry[0] > oldest]

    def _make_streams_again(self, *, lost: bool) -> None:
        world, books = self.world, self.books
        if lost:
            books.streams_lost()
            world.stream, world.stored = [], set()
            world.stream_number += 1
            world.last_sequence = books.inbox.last_sequence
            self.next_sequence = world.last_sequence + 1
            if books.is_recorded_lost:
                self._give_up_recorded()
        world.queued.clear()
        books.issue_from(books.book.low + 1)
        world.last_ticket = books.num_issued
        self._save()

    # -- rules

    @rule(data=st.data(), num_tickets=st.integers(1, 6), num_delivered=st.integers(0, 8))
    def sample_some(self, data: st.DataObject, num_tickets: int, num_delivered: int) -> None:
        if not self.finished:
            self.sample(data, num_tickets, num_delivered)

    def sample(self, data: st.DataObject, num_tickets: int, num_delivered: int) -> None:
        """Tickets are issued, workers take some, end some of what they hold, the reader takes some."""
        self.issue()
        for _ in range(num_tickets):
            if self.world.queued:
                self.held.add(self._draw(data, self.world.queued))
        for _ in range(num_tickets):
            is_slow = data.draw(st.integers(0, 3)) == 0
            if self.held and not is_slow:
                self._end_group(data, self._draw(data, self.held))
        self.deliver(num_delivered)

    def issue(self) -> None:
        books = self.books
        while books.num_issued < books.limit:
            books.issued(books.num_issued + 1)
            ticket = self.world.last_ticket = books.num_issued
            if not books.is_known(ticket):
                self.world.queued.add(ticket)

    def _draw(self, data: st.DataObject, tickets: set[int]) -> int:
        ticket: int = data.draw(st.sampled_from(sorted(tickets)))
        tickets.discard(ticket)
        return ticket

    def _end_group(self, data: st.DataObject, ticket: int) -> None:
        """A worker ends with a ticket: stores what it has (once), or dies and it is queued again."""
        fate = data.draw(st.sampled_from(["ok", "ok", "ok", "uniform", "one failed", "given up", "dies"]))
        if fate == "dies":
            self.world.queued.add(ticket)
            return
        labels = self.published[-4:] or [(self.attempt, 0)]
        spans = sorted(data.draw(st.lists(st.sampled_from(labels), min_size=1, max_size=2)))
        message: Group | Tombstone = self._group(ticket, spans, is_uniform=fate == "uniform")
        if fate == "given up":
            message = Tombstone(ticket=ticket, reason="generation_error")
        elif fate == "one failed":
            failure = SampleFailure(index=1, reason="reward_error")
            samples = (self._sample(0, spans, 1.0),)
            message = Group(ticket=ticket, group_size=2, samples=samples, failures=(failure,))
        self._store(ticket, message)

    def _store(self, ticket: int, message: Group | Tombstone) -> None:
        """Publish with the ticket as its id: the second time nothing is stored."""
        world = self.world
        if ticket not in world.stored:
            world.last_sequence += 1
            world.stored.add(ticket)
            world.stream.append((world.last_sequence, encode(message), ticket))

    def _group(self, ticket: int, spans: list[tuple[int, int]], *, is_uniform: bool = False) -> Group:
        samples = (self._sample(0, spans, float(is_uniform)), self._sample(1, spans, 1.0))
        return Group(ticket=ticket, group_size=2, samples=samples)

    def _sample(self, index: int, labels: list[tuple[int, int]], reward: float) -> Sample:
        sample = make_sample(index, spans=[(0, 0, 2 * len(labels))], reward=reward)
        spans = tuple(
            VersionSpan(attempt, version, 2 * place)
            for place, (attempt, version) in enumerate(labels, start=1)
        )
        return msgspec.structs.replace(sample, version_spans=spans)

    def deliver(self, count: int) -> None:
        """The reader takes the next messages."""
        for sequence, data, ticket in list(self.world.stream):
            if count and sequence >= self.next_sequence:
                count -= 1
                self.next_sequence = sequence + 1
                self._take(StreamMessage(sequence, f"rl.j.traj.{ticket}", data))

    def _take(self, message: StreamMessage) -> None:
        try:
            self.books.take(message)
        except EndlessDiscards:
            self._start()

    @rule()
    def form_and_record(self) -> None:
        """`next_batch` and `record` of the training loop."""
        books = self.books
        if self.finished or self.batch is not None or books.version >= MAX_STEPS:
            return
        books.batch_wanted()
        try:
            batch = books.next_batch()
        except EndlessDiscards:
            self._start()
            return
        except RecordedBatchLost:
            self._cut()
            return
        caught_up = self.next_sequence > self.world.last_sequence
        if batch is None and books.missing_of_recorded() and caught_up:
            self._cut()
            return
        if not books.is_repeating and not self.has_begun:
            self.world.write(LedgerLine(attempt=self.attempt, began=books.version))
            books.begin(self.attempt)
            self.has_begun = True
            self.published.append((self.attempt, books.version))
        if batch is None:
            return
        self._check(batch)
        if not batch.is_repeat:
            self.recorded[batch.version] = batch
            live = recorded_values(books.live)
            discards = {reason: tuple(tickets) for reason, tickets in batch.discards.items()}
            self.world.write(
                LedgerLine(
                    attempt=self.attempt,
                    version=batch.version,
                    tickets=batch.tickets,
                    discards=discards,
                    live=live,
                )
            )
        books.close(batch)
        self.batch = batch
        self.in_steps[batch.version + 1] = len(batch.tickets)

    def _cut(self) -> None:
        self._give_up_recorded()
        self._make_streams_again(lost=False)

    def _give_up_recorded(self) -> None:
        version = self.books.version
        self.world.write(LedgerLine(attempt=self.attempt, cut=version))
        self.world.checkpoints = [c for c in self.world.checkpoints if c.version <= version]
        self.books.cut()

    @rule(save=st.booleans())
    def train(self, save: bool) -> None:
        """`train_step`, `advance` and `checkpoint_if_due`: the copy of a step waits for the one before it."""
        if self.batch is None:
            return
        self.publish()
        if self.batch.is_repeat:
            self.offered = self.batch.version + 1  # engines have a later version
        self.books.advance(self.batch)
        self.trained = self.batch.version + 1
        self.batch = None
        if self.offered == self.trained:
            self._move_gate()
        if save:
            self.publish()
            self._save()

    @rule()
    def publish(self) -> None:
        """The publication beside training ends, at any time, or never if the trainer is killed first."""
        if self.offered < self.trained:
            self.offered = self.trained
            self.published.append((self.attempt, self.offered))
            self._move_gate()

    def _move_gate(self) -> None:
        self.books.publish(self.offered)
        self.in_steps = {made: count for made, count in self.in_steps.items() if made > self.offered}

    @rule(times=st.integers(1, 2), is_guilt_known=st.booleans(), checkpoint=st.sampled_from([-1, -1, -2]))
    def fail(self, times: int, is_guilt_known: bool, checkpoint: int) -> None:
        """The step under way raises an exception of its own, and the trainer restarts; perhaps twice."""
        if self.batch is None:
            return
        tickets = self.batch.tickets[:1] if is_guilt_known else None
        failed = self.batch.version
        for _ in range(times):
            self.world.write(LedgerLine(attempt=self.attempt, failed=failed, cause="error", tickets=tickets))
        self._start(checkpoint)

    @rule(
        kind=st.sampled_from(["crash", "crash", "lose streams", "lose streams and crash", "batch size"]),
        checkpoint=st.sampled_from([-1, -1, -2]),
        batch_size=st.integers(1, 4),
    )
    def fault(self, kind: str, checkpoint: int, batch_size: int) -> None:
        """One rule for all faults, so that faults are rarer than the events that they disturb.

        A crash may come at any point, and the newest checkpoint may turn out not to be whole.
        """
        if self.finished:
            return
        if kind == "lose streams":
            if self.batch is None:  # the living trainer mends them at its next boundary
                if self.has_begun:
                    self._save()
                self._make_streams_again(lost=True)
            return
        if kind == "lose streams and crash":
            self.world.stream, self.world.stored, self.world.queued = [], set(), set()
            self.world.stream_number += 1
            self.world.last_sequence = self.world.last_ticket = 0
        elif kind == "batch size":  # marked R: the trainer restarts
            rule_ = self.spec.staleness
            self.spec = make_spec(
                batch_size, rule_.max_versions, rule_.on_exceed, self.spec.sampling.filter, rule_.order
            )
        self._start(checkpoint)

    @rule(
        max_versions=st.integers(0, 3),
        on_exceed=st.sampled_from(["Mask", "Drop", "Keep"]),
        sample_filter=st.sampled_from(["None", "DropUniformGroups"]),
        order=st.sampled_from(["OldestFirst", "FreshestFirst"]),
        ahead=st.sampled_from(["Auto", 0, 1, 3]),
    )
    def change_live_values(
        self, max_versions: int, on_exceed: str, sample_filter: str, order: str, ahead: int | str
    ) -> None:
        batch_size = self.spec.training.batch_size
        self.spec = make_spec(batch_size, max_versions, on_exceed, sample_filter, order, ahead)
        self.books.use(self.spec)

    @rule()
    def finish(self) -> None:
        if (
            self.finished
            or self.batch is not None
            or self.books.version < MAX_STEPS
            or self.offered < self.trained
            or self.books.is_repeating
        ):
            return
        left_over = {reason: tuple(t) for reason, t in self.books.left_over().items()}
        self.world.write(LedgerLine(attempt=self.attempt, issued=self.books.last_ticket, discards=left_over))
        self.finished = True

    def teardown(self) -> None:
        """Whatever happened, from here on nothing fails: the job must end, and its books close."""
        self.spec = make_spec(self.spec.training.batch_size, 1, "Mask", "None", "OldestFirst")
        self.books.use(self.spec)
        for _ in range(400):
            if self.finished:
                break
            self.issue()
            self.held |= self.world.queued
            self.world.queued.clear()
            for ticket in sorted(self.held):
                self._store(ticket, self._group(ticket, [(self.attempt, self.books.version)]))
            self.held.clear()
            self.deliver(100)
            if self.batch is None:
                self.form_and_record()
            if self.batch is not None:
                self.train(save=False)
            self.publish()
            self.finish()
        assert self.finished, (self.books.version, self.books.is_repeating)
        self.nothing_is_closed_twice()

    # -- what must hold

    def _check(self, batch: Batch) -> None:
        rule_ = self.spec.staleness
        if not batch.is_repeat:
            assert len(batch.groups) == self.spec.training.batch_size
            for group in batch.groups:
                for sample in group.samples:
                    if rule_.on_exceed != "Keep":
                        assert not (sample.loss_mask & (sample.staleness > rule_.max_versions)).any()
        else:  # the very trajectories, not others of the same tickets
            before = self.recorded[batch.version]
            assert _content(batch) == _content(before)
        assert len(set(batch.tickets)) == len(batch.tickets)

    @invariant()
    def nothing_is_closed_twice(self) -> None:
        result = audit(self.world.history)
        assert result.twice == ()
        if self.finished:
            assert result.missing == (), result

    @invariant()
    def the_gate_holds(self) -> None:
        """Never more than eta + 1 batches ahead of the published version, counted independently."""
        books = self.books
        steps_ahead = min(self.spec.staleness.max_versions + 1, max(0, MAX_STEPS - self.offered))
        if books.limit <= books.num_issued:
            return
        would_be_open = [n for n in range(1, books.limit + 1) if not books.is_closed(n)]
        assert len(would_be_open) + sum(self.in_steps.values()) <= steps_ahead * self.spec.training.batch_size

    @invariant()
    def at_most_one_version_is_unpublished(self) -> None:
        assert self.trained - self.books.published <= 1 and self.books.published == self.offered

    @invariant()
    def every_open_ticket_is_somewhere(self) -> None:
        """Queued, held by a worker, stored and not read yet, or arrived: so it will be closed."""
        books = self.books
        unread = {ticket for sequence, _, ticket in self.world.stream if sequence >= self.next_sequence}
        for ticket in books.book.open_tickets(min(books.num_issued, self.world.last_ticket)):
            assert (
                ticket in self.world.queued
                or ticket in self.held
                or ticket in unread
                or books.is_known(ticket)
            ), ticket


def _content(batch: Batch) -> list[tuple[int, tuple[Sample, ...], list[list[bool]]]]:
    return [
        (group.ticket, tuple(s.sample for s in group.samples), [s.loss_mask.tolist() for s in group.samples])
        for group in batch.groups
    ]


TestBooks = BooksMachine.TestCase
TestBooks.settings = settings(max_examples=150, stateful_step_count=40)
