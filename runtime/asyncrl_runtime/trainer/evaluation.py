"""Held-out prompts, answered greedily by the engines, outside the staleness gate and never trained on."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from asyncrl_api.report import EvaluationReport
from asyncrl_runtime.contract.broker import HeldOutQuestions, TransportError
from asyncrl_runtime.contract.messages import (
    EVALUATION_ROWS,
    EvaluationResult,
    EvaluationTicket,
    Sample,
    SampleFailure,
    decode,
    encode,
    unusable_number,
)
from asyncrl_runtime.contract.refused import Refusals
from asyncrl_runtime.trainer.books.arrivals import Expected, check_sample

log = logging.getLogger(__name__)

SILENT_SECONDS = 600.0
"""How long an evaluation may go without an answer until it is given up; the job goes on without it."""


@dataclass(frozen=True)
class Evaluated:
    """The answers of one evaluation."""

    report: EvaluationReport
    samples: tuple[Sample, ...]


class Evaluator:
    """Runs one evaluation at a time on whatever engines the job has."""

    def __init__(
        self,
        broker: HeldOutQuestions,
        attempt: int,
        rows: Sequence[dict[str, Any]],
        stream_generation: Callable[[], int],
        clock: Callable[[], float],
        refusals: Refusals | None = None,
        vocabulary_size: int | None = None,
    ) -> None:
        """
        Args:
            stream_generation: returns a number that changes when the streams are made again: what was asked
                is gone with them.
            refusals: counts what arrives and is not taken.
            vocabulary_size: the number of token ids; None: token ids of answers are not checked.
        """
        self._refusals = refusals or Refusals()
        self._vocabulary_size = vocabulary_size
        self._broker = broker
        self._attempt = attempt
        self._rows = rows
        self._stream_generation = stream_generation
        self._clock = clock
        self._count = 0

    async def run(self, step: int, max_new_tokens: int, tick: Callable[[], Any]) -> Evaluated | None:
        """Ask every held-out prompt and wait for the answers.

        Args:
            step: the policy's step when the evaluation begins, for the report.
            tick: awaited again and again while waiting, to bring late engines to the current weights, say.

        Returns:
            The report, with the mean reward, and the answers; None if no answer came for SILENT_SECONDS. A
            prompt that got no answer counts as reward 0, with a warning: it must not flatter the policy.
        """
        self._count += 1
        evaluation = f"{self._attempt}-{self._count}"
        outcomes = await self._collect(evaluation, max_new_tokens, tick)
        if outcomes is None:
            return None
        outcomes = [_checked(outcome) for outcome in outcomes]
        samples = tuple(outcome for outcome in outcomes if isinstance(outcome, Sample))
        failures = [outcome for outcome in outcomes if isinstance(outcome, SampleFailure)]
        if failures:
            log.warning(
                "evaluation at step %d: %d of %d prompts without an answer, the first: %s",
                step,
                len(failures),
                len(outcomes),
                failures[0].message or failures[0].reason,
            )
        versions = [span.version for sample in samples for span in sample.version_spans] or [step]
        report = EvaluationReport(
            step=step,
            accuracy=sum(sample.reward for sample in samples) / len(outcomes),
            num_prompts=len(outcomes),
            lowest_version=min(versions),
            highest_version=max(versions),
        )
        return Evaluated(report, samples)

    async def _ask(self, evaluation: str, start: int, max_new_tokens: int) -> None:
        ticket = EvaluationTicket(
            evaluation=evaluation,
            first_index=start,
            rows=tuple(self._rows[start : start + EVALUATION_ROWS]),
            max_new_tokens=max_new_tokens,
        )
        key = f"{evaluation}.{start}"
        message_id = f"ask.{key}.{self._stream_generation()}"
        await self._broker.ask(key, encode(ticket), message_id)

    async def _collect(
        self, evaluation: str, max_new_tokens: int, tick: Callable[[], Any]
    ) -> list[Sample | SampleFailure] | None:
        outcomes: dict[int, Sample | SampleFailure] = {}
        generation, answered_at = None, self._clock()
        async with self._broker.answers() as answers:
            while len(outcomes) < len(self._rows):
                if self._clock() - answered_at > SILENT_SECONDS:
                    log.warning("evaluation %s is given up: no answer in %.0f s", evaluation, SILENT_SECONDS)
                    return None
                await tick()
                try:
                    if generation != self._stream_generation():
                        generation = self._stream_generation()
                        await self._ask_open(evaluation, outcomes.keys(), max_new_tokens)
                    data = await answers.take()
                except TransportError as error:
                    log.info("evaluation %s: %s; waiting", evaluation, error)
                    await asyncio.sleep(0.5)
                    continue
                taken = {} if data is None else self._taken(data, evaluation)
                if taken.keys() - outcomes.keys():
                    answered_at = self._clock()
                outcomes |= taken
        return [outcomes[index] for index in sorted(outcomes)]

    def _taken(self, data: bytes, evaluation: str) -> dict[int, Sample | SampleFailure]:
        """Return the outcomes in an answer, by index; none if it is not about what was asked."""
        try:
            result = decode(data, EvaluationResult)
            if result.evaluation != evaluation:
                return {}  # a late answer to an earlier one
            for outcome in result.outcomes:
                if not 0 <= outcome.index < len(self._rows):
                    raise ValueError(f"row {outcome.index} of {len(self._rows)}")
                if isinstance(outcome, Sample):
                    asked = Expected(0, group_size=1, vocabulary_size=self._vocabulary_size)
                    check_sample(outcome, asked)
        except ValueError as error:
            self._refusals.add("answer to held-out prompts", f"evaluation {evaluation}: {error}")
            return {}
        return {outcome.index: _checked(outcome) for outcome in result.outcomes}

    async def _ask_open(self, evaluation: str, answered: Iterable[int], max_new_tokens: int) -> None:
        """Ask what has no answer yet, and nothing else: questions of an earlier evaluation are dropped.

        Answers stay: the server remembers their ids beyond a purge, so a second answer would not be stored.
        """
        await self._broker.drop_questions()
        done = set(answered)
        for start in range(0, len(self._rows), EVALUATION_ROWS):
            if start not in done:  # a ticket's rows are answered together
                await self._ask(evaluation, start, max_new_tokens)


def _checked(outcome: Sample | SampleFailure) -> Sample | SampleFailure:
    """Return the outcome, or a failure in place of a sample with numbers that no mean may contain."""
    if isinstance(outcome, Sample) and (fault := unusable_number(outcome)):
        return SampleFailure(index=outcome.index, reason="unusable_number", message=fault)
    return outcome
