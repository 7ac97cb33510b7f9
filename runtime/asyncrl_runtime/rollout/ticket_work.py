"""What a worker does with one delivery, from the ticket to the acknowledgement."""

import logging
import math
import re
from collections.abc import Callable

import msgspec

from asyncrl_api.base import MAX_INT
from asyncrl_api.sampling_spec import MAX_GROUP_SIZE
from asyncrl_api.spec_views import FrozenSpec
from asyncrl_runtime.contract.broker import Delivery, ResultStore, TransportError
from asyncrl_runtime.contract.messages import (
    EVALUATION_ROWS,
    EvaluationResult,
    EvaluationTicket,
    Group,
    GroupPart,
    ResumePoint,
    SampleFailure,
    Ticket,
    Tombstone,
    decode,
    encode,
)
from asyncrl_runtime.contract.refused import Refusals, one_line
from asyncrl_runtime.contract.rows import PromptError
from asyncrl_runtime.rollout.concurrency import Taken
from asyncrl_runtime.rollout.group_runner import GroupRunner, GroupTask, HandedBack, SampleOutcome
from asyncrl_runtime.rollout.session import PromptTooLong, SampleLimits, sampling_seed

log = logging.getLogger(__name__)

MAX_GROUP_BYTES = 7 * 2**20
"""The maximum size of a group in one message; a larger group is sent in parts."""
MAX_REPORTED_FAILURES = 5
"""How many failures of its generation make a ticket a tombstone. Kills are not counted: chaos must not throw
away good tickets."""


class TicketWork:
    """Works on deliveries, and tells `report_failure`, in a sentence, whatever fails."""

    def __init__(
        self,
        worker: str,
        spec: FrozenSpec,
        results: ResultStore,
        runner: GroupRunner,
        report_failure: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._worker = worker
        self._spec = spec
        self._results = results
        self._runner = runner
        self._report_failure = report_failure
        self._clock = clock
        self._refusals = Refusals()

    async def sample(self, delivery: Delivery, slots: Taken) -> None:
        """Turn a ticket into a stored group, or a tombstone, and acknowledge it; or hand it back.

        A message without data is a ticket that was closed before the stream was made again: it is only
        acknowledged.
        """
        number, began = delivery.sequence, self._clock()
        resume = None
        if delivery.is_redelivered:
            if await self._results.is_stored(number):
                await delivery.acknowledge()
                return
            resume = fitting(await self._results.read_resume_point(number), number)
        if delivery.data:
            result = await self._result(number, delivery.data, resume, slots, began)
            if isinstance(result, ResumePoint):
                await self._results.write_resume_point(result)
                await delivery.hand_back()
                return
            await publish_result(self._results, result)
        await delivery.acknowledge()
        if resume is not None:
            await self._results.delete_resume_point(number)

    async def answer(self, delivery: Delivery, slots: Taken) -> None:
        """Answer held-out prompts greedily, one sample each.

        What cannot be a question is dropped, since it would come again for ever; the trainer asks again what
        has no answer.
        """
        try:
            question = parse_question(delivery.data)
        except ValueError as error:
            self._refusals.add("held-out prompts", str(error))
            await delivery.acknowledge()
            return
        rows = dict(enumerate(question.rows, start=question.first_index))
        limits = SampleLimits(question.max_new_tokens, self._spec.model.context_length, temperature=0.0)
        task = GroupTask(0, rows, limits, seeds=lambda sample, turn: 0)
        try:
            outcomes = await self._runner.run(task, slots)
        except HandedBack:
            await delivery.hand_back()
            return
        except (PromptTooLong, PromptError) as error:
            outcomes = [SampleFailure(index=i, reason="unusable_row", message=str(error)) for i in rows]
        except Exception as error:
            if not delivery.is_redelivered:
                raise
            outcomes = [
                SampleFailure(index=i, reason="worker_error", message=_described(error)) for i in rows
            ]
        result = EvaluationResult(evaluation=question.evaluation, outcomes=tuple(outcomes))
        key = f"{question.evaluation}.{question.first_index}"
        await self._results.publish_answer(key, encode(result))
        await delivery.acknowledge()

    async def _result(
        self, number: int, data: bytes, resume: ResumePoint | None, slots: Taken, began: float
    ) -> Group | Tombstone | ResumePoint:
        try:
            ticket = parse_ticket(data, number)
            rows = dict.fromkeys(range(ticket.group_size), ticket.row)
            limits = SampleLimits(ticket.max_new_tokens, self._spec.model.context_length, ticket.temperature)
            seed = self._spec.training.seed
            task = GroupTask(number, rows, limits, lambda s, t: sampling_seed(seed, number, s, t), resume)
            outcomes = await self._runner.run(task, slots)
        except HandedBack as error:
            if error.resume.num_failures < MAX_REPORTED_FAILURES:
                log.info("ticket %d: handed back: %s", number, error)
                return error.resume
            return self._tombstone(number, "generation_error", error)
        except PromptTooLong as error:
            return self._tombstone(number, "prompt_too_long", error)
        except ValueError as error:  # an undecodable ticket, or a row that makes no prompt
            return self._tombstone(number, "unusable_row", error)
        except TransportError:
            raise
        except Exception as error:  # whatever is wrong with this ticket, it must not come back for ever
            log.exception("ticket %d", number)
            before = resume or ResumePoint(ticket=number)
            if before.num_failures + 1 < MAX_REPORTED_FAILURES:
                self._report_failure(f"ticket {number}: {_described(error)}")
                return msgspec.structs.replace(before, num_failures=before.num_failures + 1)
            return self._tombstone(number, "worker_error", error)
        failures = tuple(outcome for outcome in outcomes if isinstance(outcome, SampleFailure))
        for failure in failures:
            self._report_failure(f"ticket {number}/{failure.index}: {failure.reason}: {failure.message}")
        return Group(
            ticket=number,
            group_size=ticket.group_size,
            samples=tuple(outcome for outcome in outcomes if not isinstance(outcome, SampleFailure)),
            failures=failures,
            worker=self._worker,
            seconds=self._clock() - began,
        )

    def _tombstone(self, number: int, reason: str, error: Exception) -> Tombstone:
        self._report_failure(f"ticket {number} is given up: {reason}: {error}")
        return Tombstone(ticket=number, reason=reason, message=str(error)[:1000], worker=self._worker)


def parse_ticket(data: bytes, number: int) -> Ticket:
    """Return the ticket in the message with that sequence.

    Raises:
        ValueError: it is no ticket, another one, or one that nobody could answer.
    """
    ticket = decode(data, Ticket)
    if ticket.ticket != number:
        raise ValueError(f"message {number} holds ticket {ticket.ticket}")
    if not 1 <= ticket.group_size <= MAX_GROUP_SIZE:
        raise ValueError(f"a group of {ticket.group_size}; must be from 1 to {MAX_GROUP_SIZE}")
    if not 1 <= ticket.max_new_tokens <= MAX_INT or not 0 < ticket.temperature < math.inf:
        raise ValueError(f"{ticket.max_new_tokens} tokens at temperature {ticket.temperature}")
    return ticket


def parse_question(data: bytes) -> EvaluationTicket:
    """Return the held-out prompts in a message.

    Raises:
        ValueError: there are none, or nobody could answer them.
    """
    question = decode(data, EvaluationTicket)
    if not 1 <= len(question.rows) <= EVALUATION_ROWS or not 0 <= question.first_index <= MAX_INT:
        raise ValueError(f"{len(question.rows)} rows from {question.first_index} on")
    if not 1 <= question.max_new_tokens <= MAX_INT:
        raise ValueError(f"{question.max_new_tokens} tokens")
    if not _WORD.fullmatch(question.evaluation):
        raise ValueError(f"an evaluation named {question.evaluation[:80]!r}")
    return question


def fitting(resume: ResumePoint | None, number: int) -> ResumePoint | None:
    """Return a resume point that is one of this ticket; None for any other: it costs its tokens alone."""
    if resume is None:
        return None
    indices = [*(each.index for each in resume.outcomes), *(each.index for each in resume.progress)]
    is_odd = len(set(indices)) < len(indices) or not all(0 <= index < MAX_GROUP_SIZE for index in indices)
    if resume.ticket != number or resume.num_failures < 0 or is_odd:
        log.warning("ticket %d: its resume point is another ticket's, and is left out", number)
        return None
    return resume


_WORD = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
"""The name of an evaluation becomes part of a subject."""


def _described(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}", 1000)


async def publish_result(results: ResultStore, result: Group | Tombstone) -> None:
    """Store what became of a ticket; its id is the ticket, so that whoever comes second changes nothing."""
    data = encode(result)
    number = result.ticket
    if len(data) <= MAX_GROUP_BYTES:
        await results.publish_trajectory(number, None, data, str(number))
        return
    assert isinstance(result, Group)
    outcomes: list[SampleOutcome] = [*result.samples, *result.failures]
    for outcome in outcomes:
        part = GroupPart(
            ticket=number,
            group_size=result.group_size,
            outcome=outcome,
            worker=result.worker,
            seconds=result.seconds,
        )
        await results.publish_trajectory(number, outcome.index, encode(part), f"{number}/{outcome.index}")
