"""What a worker does with one delivery, from the ticket to the acknowledgement."""

import logging
from collections.abc import Callable

from asyncrl_api.spec_views import FrozenSpec
from asyncrl_runtime.contract.broker import Delivery, ResultStore
from asyncrl_runtime.contract.messages import (
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
            resume = await self._results.read_resume_point(number)
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
        """Answer held-out prompts greedily, one sample each."""
        question = decode(delivery.data, EvaluationTicket)
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
        result = EvaluationResult(evaluation=question.evaluation, outcomes=tuple(outcomes))
        key = f"{question.evaluation}.{question.first_index}"
        await self._results.publish_answer(key, encode(result))
        await delivery.acknowledge()

    async def _result(
        self, number: int, data: bytes, resume: ResumePoint | None, slots: Taken, began: float
    ) -> Group | Tombstone | ResumePoint:
        try:
            ticket = decode(data, Ticket)
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
