"""The books of rank 0: what may be issued, what arrives, what the next batch is."""

import pytest

from asyncrl_api.job import Spec
from asyncrl_api.ledger import RecordedStep
from asyncrl_api.parsing import parse_spec
from asyncrl_runtime.contract.broker import StreamMessage
from asyncrl_runtime.contract.messages import Group, GroupPart, Message, SampleFailure, Tombstone, encode
from asyncrl_runtime.trainer.books.books import Books, RecordedBatchLost, recorded_values
from asyncrl_runtime.trainer.books.inbox import Inbox
from asyncrl_runtime.trainer.books.tickets import EndlessDiscards
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


def test_steps_to_be_repeated_are_lost_with_the_stream_though_their_tickets_come_again() -> None:
    spec = make_spec()
    books = Books(spec, recorded=[recorded(spec, 1, 2)])
    books.streams_lost()
    for ticket in (1, 2):
        books.take(message(ticket, make_group(ticket), ticket))
    with pytest.raises(RecordedBatchLost, match="step 0 was recorded"):
        books.next_batch()


def test_endless_discards_end_the_job_with_the_count() -> None:
    books = Books(make_spec(filter="DropUniformGroups"))
    with pytest.raises(EndlessDiscards, match="uniform: 20"):
        for number in range(1, 30):
            books.take(message(number, uniform_group(number), number))


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
