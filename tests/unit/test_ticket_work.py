"""What a worker does with a ticket or a question that nobody can answer: it does not come back for ever."""

from dataclasses import dataclass, field
from typing import Any, Self, cast

import pytest

from asyncrl_runtime.contract.messages import (
    EvaluationTicket,
    Message,
    ResumePoint,
    SampleFailure,
    Ticket,
    Tombstone,
    decode,
    encode,
)
from asyncrl_runtime.rollout.concurrency import Slots
from asyncrl_runtime.rollout.group_runner import GroupRunner
from asyncrl_runtime.rollout.ticket_work import MAX_REPORTED_FAILURES, TicketWork, fitting
from support.messages.samples import make_job, make_sample

TICKET = Ticket(ticket=7, row={"question": "1+1"}, group_size=2, max_new_tokens=8, temperature=1.0)
QUESTION = EvaluationTicket(evaluation="1-1", first_index=0, rows=({"question": "1"},), max_new_tokens=8)


@dataclass
class OneDelivery:
    """A message in the worker's hands, and what became of it."""

    data: bytes
    is_ticket: bool = True
    sequence: int = 7
    is_redelivered: bool = True
    ends: list[str] = field(default_factory=list)

    async def acknowledge(self) -> None:
        self.ends.append("acknowledged")

    async def hand_back(self, delay_seconds: float = 0) -> None:
        self.ends.append("handed back")

    async def keep_alive(self) -> None: ...

    async def renew(self, again: Self) -> None: ...


class Results:
    """A store of results in memory."""

    def __init__(self, resume: ResumePoint | None = None) -> None:
        self.resume = resume
        self.published: list[bytes] = []

    async def is_stored(self, ticket: int) -> bool:
        return False

    async def publish_trajectory(
        self, ticket: int, sample: int | None, payload: bytes, message_id: str
    ) -> None:
        self.published.append(payload)

    async def publish_answer(self, key: str, payload: bytes) -> None:
        self.published.append(payload)

    async def write_resume_point(self, resume: ResumePoint) -> None:
        self.resume = resume

    async def read_resume_point(self, ticket: int) -> ResumePoint | None:
        return self.resume

    async def delete_resume_point(self, ticket: int) -> None:
        self.resume = None


class Broken:
    """A runner with a mistake in it that no ticket is to blame for."""

    async def run(self, task: Any, slots: Any) -> Any:
        raise ZeroDivisionError("a mistake of ours")


def make_work(results: Results) -> TicketWork:
    runner = cast(GroupRunner, Broken())
    return TicketWork("w-0", make_job().spec, results, runner, lambda message: None, lambda: 0.0)


async def test_a_ticket_that_fails_again_and_again_is_given_up() -> None:
    results = Results()
    for _ in range(MAX_REPORTED_FAILURES - 1):
        delivery = OneDelivery(encode(TICKET))
        await make_work(results).sample(delivery, Slots().take(2))
        assert delivery.ends == ["handed back"] and not results.published
    delivery = OneDelivery(encode(TICKET))
    await make_work(results).sample(delivery, Slots().take(2))
    assert delivery.ends == ["acknowledged"]
    told = decode(results.published[0], Tombstone)
    assert (told.reason, told.message) == ("worker_error", "a mistake of ours")


ODD = {
    "no message": b"\xc1",
    "another ticket": encode(Ticket(ticket=8, row={}, group_size=2, max_new_tokens=8, temperature=1.0)),
    "a group without end": encode(
        Ticket(ticket=7, row={}, group_size=2**40, max_new_tokens=8, temperature=1.0)
    ),
    "a group of nobody": encode(Ticket(ticket=7, row={}, group_size=0, max_new_tokens=8, temperature=1.0)),
    "no temperature": encode(
        Ticket(ticket=7, row={}, group_size=2, max_new_tokens=8, temperature=float("nan"))
    ),
}


@pytest.mark.parametrize("data", ODD.values(), ids=ODD.keys())
async def test_a_ticket_that_nobody_can_answer_is_given_up_at_once(data: bytes) -> None:
    results, delivery = Results(), OneDelivery(data)
    await make_work(results).sample(delivery, Slots().take(2))
    assert delivery.ends == ["acknowledged"]
    assert decode(results.published[0], Tombstone).reason == "unusable_row"


async def test_a_question_that_is_none_is_dropped() -> None:
    results, delivery = Results(), OneDelivery(b"\xc1", is_ticket=False)
    await make_work(results).answer(delivery, Slots().take(1))
    assert delivery.ends == ["acknowledged"] and not results.published


async def test_a_question_that_fails_twice_is_answered_with_that() -> None:
    results = Results()
    first = OneDelivery(encode(QUESTION), is_ticket=False, is_redelivered=False)
    with pytest.raises(ZeroDivisionError):  # the worker hands it back
        await make_work(results).answer(first, Slots().take(1))
    second = OneDelivery(encode(QUESTION), is_ticket=False)
    await make_work(results).answer(second, Slots().take(1))
    assert second.ends == ["acknowledged"] and b"worker_error" in results.published[0]


FAILURE: SampleFailure = SampleFailure(index=0, reason="reward_error")
FOREIGN: dict[str, Message] = {
    "another ticket's": ResumePoint(ticket=8),
    "the same sample twice": ResumePoint(ticket=7, outcomes=(make_sample(0), FAILURE)),
    "a sample beyond all bounds": ResumePoint(ticket=7, outcomes=(make_sample(2**40),)),
    "fewer failures than none": ResumePoint(ticket=7, num_failures=-(2**40)),
}


@pytest.mark.parametrize("resume", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_resume_point_that_cannot_be_this_tickets_is_left_out(resume: ResumePoint) -> None:
    assert fitting(resume, 7) is None
