"""The books of rank 0: what may be issued, what arrives, what the next batch is."""

import math
from collections import Counter
from typing import Any

import msgspec
import pytest

from asyncrl_api.job import Spec
from asyncrl_api.ledger import RecordedStep
from asyncrl_api.parsing import parse_spec
from asyncrl_runtime.contract.broker import StreamMessage
from asyncrl_runtime.contract.messages import (
    Group,
    GroupPart,
    Message,
    SampleFailure,
    Tombstone,
    encode,
    floats_to_bytes,
)
from asyncrl_runtime.trainer.books import verdicts
from asyncrl_runtime.trainer.books.books import Books, RecordedBatchLost, recorded_values
from asyncrl_runtime.trainer.books.inbox import Inbox
from asyncrl_runtime.trainer.books.staleness import LiveGroup, assess
from asyncrl_runtime.trainer.books.tickets import Discard, EndlessDiscards
from support.messages.samples import make_group, make_sample


def make_spec(**sampling: object) -> Spec:
    return parse_spec(
        {
            "model": {"source": "file://m"},
            "dataset": {"source": "file://d"},
            "reward": {"type": "Math"},
            "sampling": {"groupSize": 2, **sampling},
            "training": {"batchSize": 2, "maxSteps": 9, "minibatches": 1},
            "gpuBudget": {"total": 2},
            "checkpoint": {"location": {"claimName": "c"}},
        }
    )


def message(sequence: int, content: Message, ticket: int) -> StreamMessage:
    return StreamMessage(sequence, f"rl.job.traj.{ticket}", encode(content))


def uniform_group(ticket: int) -> Group:
    samples = (make_sample(0, reward=1), make_sample(1, reward=1))
    return Group(ticket=ticket, group_size=2, samples=samples)


def recorded(spec: Spec, *tickets: int, **discards: tuple[int, ...]) -> RecordedStep:
    return RecordedStep(1, 0, tickets, discards, recorded_values(spec), {1: 0})


def test_a_recorded_step_is_repeated_whatever_the_filter_is_now() -> None:
    before, now = make_spec(), make_spec(filter="DropUniformGroups")
    books = Books(now, recorded=[recorded(before, 1, 2)])
    books.take(message(1, uniform_group(1), 1))
    assert books.missing_of_recorded() == [2]
    books.take(message(2, uniform_group(2), 2))
    batch = books.next_batch()
    assert batch is not None and batch.is_repeat and batch.tickets == (1, 2)


def test_recorded_discards_are_not_decided_again() -> None:
    spec = make_spec(filter="DropUniformGroups")
    books = Books(spec, recorded=[recorded(spec, 1, 3, uniform=(2,))])
    for number, group in enumerate((make_group(1), uniform_group(2), make_group(3)), start=1):
        books.take(message(number, group, number))
    batch = books.next_batch()
    assert batch is not None
    books.close(batch)
    books.advance(batch)
    books.publish(books.version)
    assert (books.book.num_trained, books.book.num_discarded) == (2, 1)
    assert books.left_over() == {} and books.inbox.position == 3


def test_after_a_cut_what_can_never_be_trained_is_discarded() -> None:
    spec = make_spec()
    books = Books(spec, recorded=[recorded(spec, 1, 2)])
    books.take(message(1, Tombstone(ticket=1, reason="prompt_too_long"), 1))
    books.take(message(2, make_group(2), 2))
    with pytest.raises(RecordedBatchLost):
        books.next_batch()
    books.cut()
    assert books.is_closed(1) and not books.is_closed(2)
    assert books.left_over() == {"prompt_too_long": [1]}


def test_a_recorded_group_with_a_number_that_cannot_be_trained_is_given_up_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An earlier version recorded such steps, and could not train them at any attempt."""
    spec = make_spec()
    books = Books(spec, recorded=[recorded(spec, 1, 2)])
    spoiled = floats_to_bytes([-1, -1, math.nan, -1])
    samples = (make_sample(0), msgspec.structs.replace(make_sample(1), behavior_logprobs=spoiled))
    books.take(message(1, Group(ticket=1, group_size=2, samples=samples), 1))
    books.take(message(2, make_group(2), 2))
    with pytest.raises(RecordedBatchLost, match="ticket 1 of step 0 cannot be trained: unusable_number"):
        books.next_batch()
    with caplog.at_level("INFO"):
        books.cut()
    assert books.left_over() == {"unusable_number": [1]} and not books.is_closed(2)
    assert "ticket 1 is discarded: unusable_number: token 2 of sample 1 has log-prob nan" in caplog.text


def test_steps_to_be_repeated_are_lost_with_the_stream_though_their_tickets_come_again() -> None:
    spec = make_spec()
    books = Books(spec, recorded=[recorded(spec, 1, 2)])
    books.streams_lost()
    for ticket in (1, 2):
        books.take(message(ticket, make_group(ticket), ticket))
    with pytest.raises(RecordedBatchLost, match="step 0 was recorded"):
        books.next_batch()


DROPPING = {"filter": "DropUniformGroups", "maxDiscardsInARow": 20}


def unsolved_group(ticket: int) -> Group:
    samples = (make_sample(0, reward=0), make_sample(1, reward=0))
    return Group(ticket=ticket, group_size=2, samples=samples)


def test_endless_discards_end_the_job_with_the_count() -> None:
    books = Books(make_spec(**DROPPING))
    for number in range(1, 21):
        assert books.next_batch() is None
        books.take(message(number, unsolved_group(number), number))
    with pytest.raises(EndlessDiscards, match="uniform: 20"):
        books.next_batch()
    assert not books.mastered


def test_a_job_whose_prompts_are_solved_has_mastered_them() -> None:
    books = Books(make_spec(**DROPPING))
    for number in range(1, 21):
        assert books.next_batch() is None and not books.mastered
        books.take(message(number, uniform_group(number), number))
    assert books.next_batch() is None
    assert "20 of the last 20 prompt groups" in books.mastered


def test_a_kept_group_ends_the_row_of_discards_though_no_batch_forms() -> None:
    books = Books(make_spec(**DROPPING))
    for number in [*range(1, 20), *range(21, 40)]:
        books.take(message(number, unsolved_group(number), number))
        if number == 19:
            books.take(message(20, make_group(20), 20))
    assert books.next_batch() is None
    books.take(message(40, unsolved_group(40), 40))
    with pytest.raises(
        EndlessDiscards, match="uniform: 20"
    ):  # the kept one is still there, but ends only one row
        books.next_batch()


def test_a_group_that_is_stale_when_it_arrives_does_not_end_the_row() -> None:
    spec = parse_spec(
        make_spec(**DROPPING).model_dump(by_alias=True, exclude_none=True)
        | {"staleness": {"maxVersions": 0, "onExceed": "Drop"}}
    )
    books = Books(spec, version=5)
    for number in range(1, 21):
        books.take(message(number, make_group(number), number))  # sampled at version 0
        batch = books.next_batch() if number < 20 else None
        assert batch is None
    with pytest.raises(EndlessDiscards, match="stale: 20"):
        books.next_batch()


def test_a_batch_that_can_be_formed_is_formed_before_anything_is_given_up() -> None:
    books = Books(make_spec(**DROPPING))
    for number in (1, 2):
        books.take(message(number, make_group(number), number))
    for number in range(3, 40):
        books.take(message(number, unsolved_group(number), number))
    batch = books.next_batch()
    assert batch is not None and batch.tickets == (1, 2)


def test_parts_make_a_group_with_the_last_of_them() -> None:
    inbox = Inbox(position=0)
    parts = [
        GroupPart(ticket=5, group_size=3, outcome=make_sample(2)),
        GroupPart(ticket=5, group_size=3, outcome=SampleFailure(index=0, reason="reward_error")),
        GroupPart(ticket=5, group_size=3, outcome=make_sample(1)),
    ]
    assert inbox.take(7, parts[0], is_closed=False) is None
    assert inbox.take(8, parts[0], is_closed=False) is None  # the same again
    assert inbox.position == 6
    inbox.take(9, parts[1], is_closed=False)
    group = inbox.take(10, parts[2], is_closed=False)
    assert isinstance(group, Group)
    assert [s.index for s in group.samples] == [1, 2] and group.failures[0].index == 0
    inbox.close(5)
    assert inbox.position == 10


def test_the_first_complete_form_counts() -> None:
    inbox = Inbox(position=0)
    first = make_group(3, [1, 1])
    assert inbox.take(1, first, is_closed=False) == first
    assert inbox.take(2, Tombstone(ticket=3, reason="x"), is_closed=False) is None
    assert inbox.arrived[3] == first and inbox.num_duplicates == 1


def test_what_cannot_be_decoded_is_a_discarded_ticket_and_not_a_lost_one() -> None:
    books = Books(make_spec())
    books.issued(4)
    books.take(StreamMessage(1, "rl.job.traj.4", b"\xc1garbage", message_id="4"))
    assert books.left_over() == {"undecodable": [4], "leftover": [1, 2, 3]}  # issued before it


class Assessments:
    """Counts how often each group is assessed, at which version."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by_ticket: Counter[tuple[int, int]] = Counter()
        monkeypatch.setattr(verdicts, "assess", self._assess)

    def _assess(self, group: Group, version: int, *rule: Any) -> LiveGroup | Discard:
        self.by_ticket[group.ticket, version] += 1
        return assess(group, version, *rule)


def test_each_group_is_assessed_once_per_version_however_often_the_trainer_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise the groups of a large batch cost the square of their number while it waits for the last."""
    size = 512
    spec = make_spec()
    training = spec.training.model_copy(update={"batch_size": size})
    books, assessments = Books(spec.model_copy(update={"training": training})), Assessments(monkeypatch)
    for ticket in range(1, size):
        books.take(message(ticket, make_group(ticket), ticket))
        assert books.next_batch() is None
    assert assessments.by_ticket == {(ticket, 0): 1 for ticket in range(1, size)}
    books.take(message(size, make_group(size), size))
    batch = books.next_batch()
    assert batch is not None and len(batch.groups) == size
    assert assessments.by_ticket.total() == size, "the batch is made of what is known already"


def test_a_group_is_assessed_again_at_another_version_and_under_another_rule(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = make_spec()
    books, assessments = Books(spec), Assessments(monkeypatch)
    for ticket in (1, 2, 3):
        books.take(message(ticket, make_group(ticket), ticket))
    batch = books.next_batch()
    assert batch is not None and batch.tickets == (1, 2)
    books.close(batch)
    books.advance(batch)
    assert books.next_batch() is None and books.next_batch() is None
    assert assessments.by_ticket == {(1, 0): 1, (2, 0): 1, (3, 0): 1, (3, 1): 1}
    strict = spec.staleness.model_copy(update={"max_versions": 0})
    books.use(spec.model_copy(update={"staleness": strict}))
    assert books.next_batch() is None
    assert assessments.by_ticket[3, 1] == 2 and books.counters.discards == {"stale": 1}


def test_a_ticket_that_is_sampled_anew_is_assessed_anew() -> None:
    """Its stream was lost, and with it what was known of the ticket."""
    books = Books(make_spec())
    books.take(message(1, make_group(1), 1))
    assert books.next_batch() is None
    books.streams_lost()
    samples = (make_sample(0, reward=5), make_sample(1, reward=7))
    books.take(message(1, Group(ticket=1, group_size=2, samples=samples), 1))
    books.take(message(2, make_group(2), 2))
    batch = books.next_batch()
    assert batch is not None and [each.sample.reward for each in batch.groups[0].samples] == [5, 7]
