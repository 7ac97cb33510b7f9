"""Turns a ticket into samples: runs the workflow once per sample and returns the outcome of each."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from asyncrl_api.protocols import RewardFailed, Row, Score, Workflow
from asyncrl_runtime.contract.messages import (
    ResumePoint,
    Sample,
    SampleFailure,
    TurnRecord,
    unusable_number,
)
from asyncrl_runtime.contract.rows import PromptError
from asyncrl_runtime.rollout.coalesce import Coalescer
from asyncrl_runtime.rollout.concurrency import Taken
from asyncrl_runtime.rollout.engine_api import (
    EngineLost,
    EngineRefused,
    Generation,
    SamplingEngine,
    SamplingRequest,
)
from asyncrl_runtime.rollout.prompts import PromptRenderer
from asyncrl_runtime.rollout.rewards.backend import RewardFailure
from asyncrl_runtime.rollout.rewards.frames import ScoreRequest
from asyncrl_runtime.rollout.rewards.scorer import Scorer
from asyncrl_runtime.rollout.session import PromptTooLong, SampleLimits, SampleSession

log = logging.getLogger(__name__)

MAX_TOKENS_TOGETHER = 128
"""The longest answer that is asked for together with others. Longer ones are streamed one by one, so that
little is lost with their engine."""
MAX_WORKFLOW_ATTEMPTS = 3
WORKFLOW_IDLE_SECONDS = 600.0
"""The time for which user code may ask neither the engine nor a reward before its sample fails."""

SampleOutcome = Sample | SampleFailure


class HandedBack(Exception):
    """The engine went away: the ticket goes to another worker, with what was sampled so far."""

    def __init__(self, cause: str, resume: ResumePoint) -> None:
        super().__init__(cause)
        self.resume = resume


@dataclass(frozen=True)
class GroupTask:
    """The samples that a ticket asks for."""

    ticket: int
    rows: Mapping[int, Row]
    """The row of each sample (index -> row); in training all samples have the same one."""
    limits: SampleLimits
    seeds: Callable[[int, int], int]
    """Returns the seed of a turn's noise: (sample, turn) -> seed."""
    resume: ResumePoint | None = None


Opener = Callable[[int, Sequence[TurnRecord]], SampleSession]


class GroupRunner:
    """Runs groups on one engine. Groups run concurrently, and so do the samples of a group.

    Args:
        finished: is told the tokens of prompt and response of each sample that has finished.
    """

    def __init__(
        self,
        engine: SamplingEngine,
        renderer: PromptRenderer,
        workflow: Workflow,
        scorer: Scorer,
        cache_salt: Callable[[], str | None],
        clock: Callable[[], float] = time.monotonic,
        finished: Callable[[int, int], None] = lambda prompt_tokens, response_tokens: None,
    ) -> None:
        self._engine = engine
        self._renderer = renderer
        self._workflow = workflow
        self._scorer = scorer
        self._cache_salt = cache_salt
        self._finished = finished
        self._clock = clock
        self.num_sampled_tokens = 0
        """The tokens sampled since the start, for metrics."""

    async def run(self, task: GroupTask, slots: Taken) -> list[SampleOutcome]:
        """Return the outcome of every sample, in the order of their index; each frees a slot as it ends.

        Raises:
            HandedBack: the engine is gone; finished samples are kept in the resume point.
            PromptTooLong, PromptError: none of the rows can ever be sampled. If some can, as in an
                evaluation, the others are failures among the outcomes.
        """
        resume = task.resume or ResumePoint(ticket=task.ticket)
        known = {
            outcome.index: outcome
            for outcome in resume.outcomes
            if outcome.index in task.rows and _is_kept(outcome)
        }
        replays = {progress.index: progress.turns for progress in resume.progress}
        open_session = self._opener(task)
        opened = {
            index: _open(open_session, index, replays.get(index, ()))
            for index in task.rows
            if index not in known
        }
        sessions = [each for each in opened.values() if isinstance(each, SampleSession)]
        unusable = {index: each for index, each in opened.items() if not isinstance(each, SampleSession)}
        if len(unusable) == len(task.rows):
            raise unusable[min(unusable)]
        for index, error in unusable.items():
            known[index] = SampleFailure(index=index, reason="unusable_row", message=str(error))
        for _ in known:
            slots.free_one()

        async def run_sample(session: SampleSession) -> "SampleOutcome | _Unfinished":
            try:
                return await self._run_sample(session, open_session)
            finally:
                slots.free_one()

        results = await asyncio.gather(*map(run_sample, sessions))
        outcomes = [result for result in results if not isinstance(result, _Unfinished)]
        unfinished = [result for result in results if isinstance(result, _Unfinished)]
        everything = sorted([*known.values(), *outcomes], key=lambda outcome: outcome.index)
        if unfinished:
            raise _handed_back(resume, everything, unfinished)
        return everything

    def _opener(self, task: GroupTask) -> Opener:
        """Return the function that opens sessions of one group, which ask engine and reward together."""
        generate: Coalescer[SamplingRequest, Generation] = Coalescer(self._generate_together)
        score: Coalescer[ScoreRequest, Score | RewardFailure] = Coalescer(self._scorer.score)

        async def sample_tokens(request: SamplingRequest) -> Generation:
            if request.max_new_tokens > MAX_TOKENS_TOGETHER:
                return await self._engine.stream(request, cache_salt=self._cache_salt())
            return await generate(request)

        async def score_response(prompt: str, response: str, row: Row) -> Score:
            result = await score(ScoreRequest(prompt, response, dict(row)))
            if isinstance(result, RewardFailure):
                raise _ScoringFailed(result)
            return result

        def open_session(index: int, replay: Sequence[TurnRecord]) -> SampleSession:
            return SampleSession(
                index,
                task.rows[index],
                self._renderer,
                task.limits,
                sample_tokens,
                score_response,
                lambda turn: task.seeds(index, turn),
                replay,
                self._clock,
            )

        return open_session

    async def _run_sample(self, session: SampleSession, reopen: Opener) -> "SampleOutcome | _Unfinished":
        """Run the workflow; if user code fails, run it again with the turns that were already sampled."""
        cause = ""
        for attempt in range(1, MAX_WORKFLOW_ATTEMPTS + 1):
            try:
                sample = session.sample(await self._with_idle_limit(session))
                self.num_sampled_tokens += sample.num_tokens
                self._finished(len(sample.prompt_ids) // 4, sample.num_tokens)
                return sample
            except _ScoringFailed as error:
                return SampleFailure(index=session.index, reason=error.reason, message=str(error))
            except Exception as error:  # the workflow is user code and may raise anything, for any reason
                match session.engine_error:
                    case EngineLost() as lost:
                        return _Unfinished(session, lost)
                    case EngineRefused() as refused:
                        return SampleFailure(
                            index=session.index, reason="generation_error", message=str(refused)
                        )
                cause = f"{type(error).__name__}: {error}"
                log.warning("workflow, sample %d, attempt %d: %s", session.index, attempt, cause)
                session = reopen(session.index, session.progress.turns)
        return SampleFailure(index=session.index, reason="workflow_error", message=cause)

    async def _with_idle_limit(self, session: SampleSession) -> float:
        task = asyncio.ensure_future(_run_contained(self._workflow, session))
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=WORKFLOW_IDLE_SECONDS / 10)
                idle = session.idle_seconds(self._clock())
                if not task.done() and idle > WORKFLOW_IDLE_SECONDS:
                    raise TimeoutError(f"the workflow did nothing for {idle:.0f} s")
            if task.cancelled():  # not by us: whoever cancels us ends the wait above
                raise RuntimeError("the workflow awaited something that was cancelled")
            return task.result()
        finally:
            task.cancel()

    async def _generate_together(self, requests: Sequence[SamplingRequest]) -> list[Generation]:
        return await self._engine.generate(requests, cache_salt=self._cache_salt())


def _is_kept(outcome: SampleOutcome) -> bool:
    """Return whether an outcome in a resume point stands; an earlier version may have stored any."""
    return isinstance(outcome, SampleFailure) or not unusable_number(outcome)


async def _run_contained(workflow: Workflow, session: SampleSession) -> float:
    """Run user code. One that exits fails its sample; as it is, it would take the worker with it."""
    try:
        return await workflow.run(session)
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"the workflow raised {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class _Unfinished:
    """A sample that is unfinished because its engine went away."""

    session: SampleSession
    cause: EngineLost


def _open(
    open_session: Opener, index: int, replay: Sequence[TurnRecord]
) -> SampleSession | PromptTooLong | PromptError:
    """Return the session of a row, or why it can never have one."""
    try:
        return open_session(index, replay)
    except (PromptTooLong, PromptError) as error:
        return error


def _handed_back(
    resume: ResumePoint, outcomes: Sequence[SampleOutcome], unfinished: Sequence[_Unfinished]
) -> HandedBack:
    return HandedBack(
        str(unfinished[0].cause),
        ResumePoint(
            ticket=resume.ticket,
            num_failures=resume.num_failures + any(u.cause.is_reported for u in unfinished),
            outcomes=tuple(outcomes),
            progress=tuple(u.session.progress for u in unfinished),
        ),
    )


class _ScoringFailed(RewardFailed):
    def __init__(self, failure: RewardFailure) -> None:
        super().__init__(failure.message)
        self.reason = failure.reason
