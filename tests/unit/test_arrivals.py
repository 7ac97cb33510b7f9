"""Messages of the trajectory stream that are not what was asked for: refused, counted, and nothing stops."""

import logging
from typing import Any

import msgspec
import pytest

from asyncrl_runtime.contract.broker import StreamMessage
from asyncrl_runtime.contract.messages import (
    Group,
    GroupPart,
    Message,
    SampleFailure,
    Tombstone,
    encode,
    ids_to_bytes,
)
from asyncrl_runtime.trainer.books.books import Books
from support.messages.samples import make_group, make_job, make_sample

ISSUED, NUM_IDS = 8, 256


@pytest.fixture
def books() -> Books:
    """The books of attempt 2 at version 0, which has issued tickets 1 to 8 for groups of two."""
    spec = make_job("sampling.groupSize=2", "training.batchSize=4").spec
    made = Books(spec, attempt=2, vocabulary_size=NUM_IDS)
    made.issued(0)
    made.issued(ISSUED)
    return made


def message(subject: str, content: Message | bytes, message_id: str = "") -> StreamMessage:
    data = content if isinstance(content, bytes) else encode(content)
    return StreamMessage(1, f"rl.job.traj{subject}", data, message_id)


def whole(ticket: int, *, size: int = 2, **changes: Any) -> Group:
    """A group as a worker publishes it, but for the changes to its first sample."""
    group = make_group(ticket, [0] * size, attempt=1)
    first = msgspec.structs.replace(group.samples[0], **changes)
    return msgspec.structs.replace(group, samples=(first, *group.samples[1:]))


def spans(attempt: int, version: int) -> dict[str, Any]:
    return {"version_spans": make_sample(spans=[(attempt, version, 4)]).version_spans}


NO_TICKET = {
    "a word": ".x",
    "nothing": ".",
    "zero": ".0",
    "a negative number": ".-1",
    "digits of another script": ".٣",
    "leading zeros": ".01",
    "a number without end": "." + "9" * 5000,
    "a sample that is a word": ".1.x",
    "too many words": ".1.2.3",
    "a far ticket": ".1000000",
}


@pytest.mark.parametrize("subject", NO_TICKET.values(), ids=NO_TICKET.keys())
@pytest.mark.parametrize("content", [Tombstone(ticket=1, reason="x"), b"\xc1", whole(1)])
def test_a_message_of_no_ticket_that_was_issued_closes_none(
    books: Books, subject: str, content: Message | bytes
) -> None:
    books.take(message(subject, content, subject.removeprefix(".")))
    assert books.refusals.num == 1
    assert books.left_over() == {"leftover": list(range(1, ISSUED + 1))}
    assert books.inbox.last_sequence == books.inbox.position == 1, "it comes again at each restart"


ODD = {
    "another ticket": whole(2),
    "another ticket's tombstone": Tombstone(ticket=2, reason="x"),
    "fewer samples than were asked for": whole(1, size=1),
    "more samples than were asked for": whole(1, size=3),
    "a part of a larger group": GroupPart(ticket=1, group_size=3, outcome=make_sample(2)),
    "a part of a group without end": GroupPart(ticket=1, group_size=2**40, outcome=make_sample(5)),
    "a version of a later attempt": whole(1, **spans(3, 0)),
    "a version that does not exist yet": whole(1, **spans(2, 2)),
    "a version beyond all bounds": whole(1, **spans(1, 2**40)),
    "a negative version": whole(1, **spans(1, -1)),
    "a token outside of the vocabulary": whole(1, response_ids=ids_to_bytes([7, 8, NUM_IDS, 9])),
    "a negative token": whole(1, prompt_ids=ids_to_bytes([-1])),
    "a negative temperature": whole(1, temperature=-1.0),
    "lists in lists without end": b"\x91" * 100_000,
    "a negative group": msgspec.msgpack.encode(["group.v1", 1, -1, [], []]),
    "a group without end": msgspec.msgpack.encode(["group.v1", 1, 2**62, [], []]),
    "garbage": b"\xc1garbage",
    "nothing": b"",
}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD.keys())
def test_an_outcome_that_was_not_asked_for_costs_its_ticket_only_if_no_other_can_follow(
    books: Books, content: Message | bytes
) -> None:
    """The broker takes only one message under an id, so behind a bad one of that id the ticket is lost."""
    books.take(message(".1", content))
    assert books.refusals.num == 1 and not books.is_closed(1)
    books.take(message(".1", content, "1"))
    assert books.left_over()["undecodable"] == [1] and books.refusals.num == 2
    books.take(message(".2", whole(2), "2"))
    assert list(books.inbox.arrived) == [2]


def test_the_next_version_is_none_of_the_future() -> None:
    """An engine has it a moment before the gate moves."""
    books = Books(make_job("sampling.groupSize=2").spec, attempt=2)
    books.issued(4)
    books.take(message(".1", whole(1, **spans(2, 1))))
    assert list(books.inbox.arrived) == [1] and books.refusals.num == 0


def test_tickets_of_an_earlier_attempt_may_have_another_group_size() -> None:
    """`groupSize` may be edited, and what was asked for before is still answered."""
    books = Books(make_job("sampling.groupSize=2").spec, attempt=2)
    books.issued(4)
    books.issued(8)
    books.take(message(".4", whole(4, size=3)))
    books.take(message(".5", whole(5, size=3)))
    assert list(books.inbox.arrived) == [4] and books.refusals.num == 1


def test_a_ticket_that_a_worker_held_when_the_streams_were_lost_still_counts() -> None:
    """Nobody knows any more how far tickets went; refused under its id, it could never come again."""
    books = Books(make_job("sampling.groupSize=2").spec, attempt=1)
    books.issued(0)
    books.take(message(".6", whole(6), "6"))
    assert list(books.inbox.arrived) == [6]


def test_parts_of_groups_of_different_sizes_end_their_ticket(books: Books) -> None:
    books = Books(make_job("sampling.groupSize=2").spec)
    books.issued(1)
    books.take(message(".1.2", GroupPart(ticket=1, group_size=3, outcome=make_sample(2))))
    books.take(message(".1.0", GroupPart(ticket=1, group_size=1, outcome=make_sample(0))))
    assert books.left_over() == {"undecodable": [1]}


def test_foreign_words_become_no_keys_of_the_ledger_and_no_lines_of_the_log(
    books: Books, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for ticket, reason in enumerate(("a\u2028b", "x" * 300, "", "generation_error"), start=1):
        books.take(message(f".{ticket}", Tombstone(ticket=ticket, reason=reason, message="one\ntwo\x1b[31m")))
    failure = SampleFailure(index=0, reason="reward_error", message="three\nfour" + "!" * 10_000)
    group = Group(ticket=5, group_size=2, samples=(make_sample(1),), failures=(failure,))
    books.take(message(".5", group))
    told = books.left_over()
    assert told["undecodable"] == [1, 2, 3] and told["generation_error"] == [4] and told["failed"] == [5]
    said = [record.getMessage() for record in caplog.records]
    assert said and not any(set(line) & {"\n", "\x1b"} or len(line) > 1200 for line in said)


def test_the_log_is_bounded_however_much_is_refused(books: Books, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(1000):
        books.take(message(".x", b""))
    assert books.refusals.num == 1000
    assert [record.getMessage().split(",")[1] for record in caplog.records] == [
        " 1 so far; the last: message 1 on 'rl.job.traj.x'",
        " 10 so far; the last: message 1 on 'rl.job.traj.x'",
        " 100 so far; the last: message 1 on 'rl.job.traj.x'",
        " 1000 so far; the last: message 1 on 'rl.job.traj.x'",
    ]
