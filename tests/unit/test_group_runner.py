"""What becomes of each sample of a ticket, with an engine and a reward that fail as told."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec
import pytest

from asyncrl_api.protocols import Row, Score, Session, Workflow
from asyncrl_runtime.contract.messages import (
    PolicyVersion,
    ResumePoint,
    Sample,
    SampleFailure,
    ids_from_bytes,
)
from asyncrl_runtime.contract.rows import PromptError
from asyncrl_runtime.rollout.concurrency import Slots
from asyncrl_runtime.rollout.engine_api import (
    EngineFailed,
    EngineLost,
    EngineRefused,
    Generation,
    SamplingRequest,
)
from asyncrl_runtime.rollout.group_runner import (
    MAX_TOKENS_TOGETHER,
    MAX_WORKFLOW_ATTEMPTS,
    WORKFLOW_IDLE_SECONDS,
    GroupRunner,
    GroupTask,
    HandedBack,
    SampleOutcome,
)
from asyncrl_runtime.rollout.prompts import PromptRenderer
from asyncrl_runtime.rollout.rewards.backend import RewardFailure
from asyncrl_runtime.rollout.rewards.frames import ScoreRequest
from asyncrl_runtime.rollout.rewards.scorer import Scorer
from asyncrl_runtime.rollout.session import PromptTooLong, SampleLimits, sampling_seed
from asyncrl_runtime.rollout.workflows import MultiTurn, SingleTurn
from support.engines.tiny_models import build_tokenizer
from support.fakes import Cut, FakeBackend, FakeEngine, run_in_virtual_time

RENDERER = PromptRenderer(build_tokenizer(), "question")
ROW: Row = {"question": "17 + 4 ="}
LIMITS = SampleLimits(max_new_tokens=20, context_length=2000, temperature=1.0)
LONG = SampleLimits(max_new_tokens=MAX_TOKENS_TOGETHER + 1, context_length=2000, temperature=1.0)
"""Answers that are streamed one by one."""


def endless() -> FakeEngine:
    """Every answer is as long as its bound, so that a cut always cuts."""
    return FakeEngine(num_tokens_mean=10**9)


def judge(request: ScoreRequest) -> Score | RewardFailure:
    return Score(len(request.response) / 100, "no")


class Rig:
    """A runner with everything around it."""

    def __init__(
        self,
        engine: FakeEngine | None = None,
        workflow: Workflow | None = None,
        backend: FakeBackend | None = None,
    ) -> None:
        self.engine = engine or FakeEngine()
        self.backend = backend or FakeBackend(judge)
        self.slots = Slots()
        self.salt: str | None = None
        self.runner = GroupRunner(
            self.engine,
            RENDERER,
            workflow or SingleTurn(),
            Scorer(self.backend, max_attempts=2, backoff_seconds=0),
            lambda: self.salt,
            lambda: asyncio.get_running_loop().time(),
        )

    async def run(
        self,
        resume: ResumePoint | None = None,
        *,
        size: int = 4,
        limits: SampleLimits = LIMITS,
        rows: Mapping[int, Row] | None = None,
    ) -> list[SampleOutcome]:
        rows = rows or dict.fromkeys(range(size), ROW)
        task = GroupTask(7, rows, limits, lambda sample, turn: sampling_seed(1, 7, sample, turn), resume)
        taken = self.slots.take(len(rows))
        try:
            return await self.runner.run(task, taken)
        finally:
            taken.close()

    async def handed_back(self, resume: ResumePoint | None = None, **options: Any) -> ResumePoint:
        with pytest.raises(HandedBack) as handed_back:
            await self.run(resume, **options)
        return handed_back.value.resume


def samples(outcomes: Sequence[SampleOutcome]) -> list[Sample]:
    assert all(isinstance(outcome, Sample) for outcome in outcomes), outcomes
    return cast(list[Sample], list(outcomes))


def failures(outcomes: Sequence[SampleOutcome]) -> dict[int, tuple[str, str]]:
    found = [outcome for outcome in outcomes if isinstance(outcome, SampleFailure)]
    return {failure.index: (failure.reason, failure.message) for failure in found}


# -- a group that goes well


async def test_a_group_is_one_request_and_one_scoring_in_order_of_its_samples() -> None:
    rig = Rig()
    outcomes = samples(await rig.run())
    assert [sample.index for sample in outcomes] == [0, 1, 2, 3]
    [requests], [scored] = rig.engine.calls, rig.backend.calls
    assert [request.seed for request in requests] == [sampling_seed(1, 7, sample, 0) for sample in range(4)]
    for sample, request, judged in zip(outcomes, requests, scored, strict=True):
        assert ids_from_bytes(sample.response_ids).tolist() == rig.engine.sample(request).output_ids
        assert sample.reward == len(judged.response) / 100
        assert (judged.prompt, judged.row) == (ROW["question"], ROW)
    assert rig.runner.num_sampled_tokens == sum(sample.num_tokens for sample in outcomes)


async def test_samples_are_in_order_whichever_ends_first() -> None:
    class LastFirst:
        def __init__(self) -> None:
            self.num_done = 0

        async def run(self, session: Session) -> float:
            await session.generate()
            number = int(session.row["number"])
            while self.num_done < 3 - number:
                await asyncio.sleep(0)
            self.num_done += 1
            return float(self.num_done)

    rows = {index: {**ROW, "number": index} for index in range(4)}
    outcomes = samples(await Rig(workflow=LastFirst()).run(rows=rows))
    assert [(sample.index, sample.reward) for sample in outcomes] == [(0, 4), (1, 3), (2, 2), (3, 1)]


async def test_long_answers_are_streamed_one_by_one() -> None:
    rig = Rig()
    await rig.run(limits=LONG)
    assert rig.engine.streams == 4 and all(len(call) == 1 for call in rig.engine.calls)
    rig = Rig()
    await rig.run(limits=SampleLimits(MAX_TOKENS_TOGETHER, 2000, 1.0))
    assert rig.engine.streams == 0


@pytest.mark.parametrize("limits", [LIMITS, LONG])
async def test_requests_carry_the_salt_of_their_moment(limits: SampleLimits) -> None:
    rig = Rig(workflow=MultiTurn(2))
    rig.salt = "1.4"
    await rig.run(size=1, limits=limits)
    assert rig.engine.salts == ["1.4", "1.4"]


async def test_a_slot_is_free_as_soon_as_its_sample_ends() -> None:
    class WaitsForItsTurn:
        def __init__(self) -> None:
            self.seen: list[int] = []

        async def run(self, session: Session) -> float:
            await session.generate()
            while rig.slots.num_taken > 4 - int(session.row["number"]):
                await asyncio.sleep(0)
            self.seen.append(rig.slots.num_taken)
            return 1.0

    workflow = WaitsForItsTurn()
    rig = Rig(workflow=workflow)
    await rig.run(rows={index: {**ROW, "number": index} for index in range(4)})
    assert workflow.seen == [4, 3, 2, 1] and rig.slots.num_taken == 0


# -- samples that leave their group


@pytest.mark.parametrize("reason", ["reward_timeout", "reward_error"])
async def test_a_reward_that_fails_to_the_last_attempt_takes_its_sample_out(reason: Any) -> None:
    attempts: list[str] = []

    def judge_one_badly(request: ScoreRequest) -> Score | RewardFailure:
        attempts.append(request.response)
        bad = len(request.response) == min(map(len, responses))
        return RewardFailure(reason, "no number came") if bad else Score(1.0)

    rig = Rig()
    responses = [RENDERER.decode(rig.engine.sample(r).output_ids) for r in await requests_of_a_group()]
    outcomes = await Rig(backend=FakeBackend(judge_one_badly)).run()
    shortest = responses.index(min(responses, key=len))
    assert failures(outcomes) == {shortest: (reason, "no number came")}
    assert [outcome.index for outcome in outcomes] == [0, 1, 2, 3]
    assert attempts.count(responses[shortest]) == 2


async def requests_of_a_group() -> Any:
    rig = Rig()
    await rig.run()
    return rig.engine.requests


async def test_a_workflow_that_fails_is_run_again_with_the_turns_it_had() -> None:
    class FailsTwice:
        def __init__(self) -> None:
            self.turns: list[Sequence[int]] = []

        async def run(self, session: Session) -> float:
            self.turns.append((await session.generate()).token_ids)
            session.tell("Go on.")
            await session.generate()
            if len(self.turns) < MAX_WORKFLOW_ATTEMPTS:
                raise KeyError("tool")
            return 0.5

    rig = Rig(workflow=(workflow := FailsTwice()))
    [sample] = samples(await rig.run(size=1))
    assert sample.reward == 0.5 and sample.num_turns == 2
    assert len(rig.engine.requests) == 2  # for three runs of two turns
    assert workflow.turns[0] == workflow.turns[1] == workflow.turns[2]


async def test_a_workflow_that_keeps_failing_takes_its_sample_out_with_its_error() -> None:
    class Fails:
        num_runs = 0

        async def run(self, session: Session) -> float:
            await session.generate()
            if session.row["number"] == 1:
                self.num_runs += 1
                raise KeyError("tool")
            return 1.0

    workflow = Fails()
    outcomes = await Rig(workflow=workflow).run(rows={n: {**ROW, "number": n} for n in range(3)})
    assert failures(outcomes) == {1: ("workflow_error", "KeyError: 'tool'")}
    assert workflow.num_runs == MAX_WORKFLOW_ATTEMPTS


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()], ids=repr)
async def test_a_workflow_that_ends_its_process_ends_its_sample_alone(error: BaseException) -> None:
    class Leaves:
        async def run(self, session: Session) -> float:
            await session.generate()
            raise error

    outcomes = await Rig(workflow=Leaves()).run(size=2)
    assert [failures(outcomes)[index][0] for index in (0, 1)] == ["workflow_error"] * 2


async def test_a_workflow_that_samples_nothing_is_told_so() -> None:
    class Lazy:
        async def run(self, session: Session) -> float:
            return 1.0

    outcomes = await Rig(workflow=Lazy()).run(size=1)
    [(reason, message)] = failures(outcomes).values()
    assert reason == "workflow_error" and "before any token was sampled" in message


async def test_what_the_engine_refuses_is_a_failed_generation_with_the_engines_word() -> None:
    engine = FakeEngine()
    engine.faults.append(EngineRefused("/generate: too long"))
    outcomes = await Rig(engine).run(size=2)
    assert failures(outcomes) == dict.fromkeys([0, 1], ("generation_error", "/generate: too long"))
    assert len(engine.calls) == 1


async def test_a_logprob_that_is_no_number_costs_its_sample_alone() -> None:
    class Broken(FakeEngine):
        def sample(self, request: SamplingRequest) -> Generation:
            generation = super().sample(request)
            if request.seed == sampling_seed(1, 7, 2, 0):
                generation.logprobs[0] = cast(float, None)  # SGLang's JSON has null for NaN
            return generation

    outcomes = await Rig(Broken()).run()
    [(reason, message)] = failures(outcomes).values()
    assert list(failures(outcomes)) == [2] and reason == "generation_error"
    assert message.startswith("the engine gave log-prob None to token 0 of turn 1")


async def test_a_stored_outcome_with_a_number_that_cannot_be_trained_is_sampled_again() -> None:
    whole = samples(await Rig().run())
    spoiled = [
        msgspec.structs.replace(sample, reward=reward)
        for sample, reward in zip(whole[:2], (1e39, 0.5), strict=True)
    ]
    rig = Rig()
    outcomes = samples(await rig.run(ResumePoint(ticket=7, outcomes=tuple(spoiled))))
    assert outcomes == [whole[0], spoiled[1], *whole[2:]]
    assert len(rig.engine.requests) == 3


def test_a_workflow_that_does_nothing_for_long_ends() -> None:
    class Sleeps:
        async def run(self, session: Session) -> float:
            await session.generate()
            await asyncio.Event().wait()
            return 1.0

    async def check() -> None:
        rig = Rig(workflow=Sleeps())
        outcomes = await rig.run(size=2)
        message = f"TimeoutError: the workflow did nothing for {1.1 * WORKFLOW_IDLE_SECONDS:.0f} s"
        assert failures(outcomes) == dict.fromkeys([0, 1], ("workflow_error", message))
        assert len(rig.engine.requests) == 2  # for three runs of two samples
        assert asyncio.get_running_loop().time() == 1.1 * WORKFLOW_IDLE_SECONDS * MAX_WORKFLOW_ATTEMPTS

    run_in_virtual_time(check())


def test_a_workflow_may_wait_for_its_engine_as_long_as_it_takes() -> None:
    class Slow(FakeEngine):
        async def generate(self, requests: Any, *, cache_salt: str | None = None) -> Any:
            await asyncio.sleep(20 * WORKFLOW_IDLE_SECONDS)
            return await super().generate(requests)

    class Thinks:
        async def run(self, session: Session) -> float:
            await session.generate()
            await asyncio.sleep(0.8 * WORKFLOW_IDLE_SECONDS)
            await session.generate()
            await asyncio.sleep(0.8 * WORKFLOW_IDLE_SECONDS)
            return 1.0

    assert len(samples(run_in_virtual_time(Rig(Slow(), Thinks()).run(size=2)))) == 2


# -- engines that go away


async def test_a_group_handed_back_goes_on_elsewhere_with_all_that_it_had() -> None:
    """One sample has finished, one failed, one is broken off in its second turn and one in its first."""

    class ByRow:
        async def run(self, session: Session) -> float:
            await session.generate(5)
            if session.row["number"] == 1:
                raise KeyError("tool")
            if session.row["number"] == 2:
                session.tell("Go on.")
                await session.generate(9)
            if session.row["number"] == 3:
                await session.generate(15)
            return 1.0

    rows = {n: {**ROW, "number": n} for n in range(4)}
    whole = await Rig(endless(), ByRow()).run(rows=rows)
    engine = endless()
    engine.faults += [None, Cut(3, "aborted")]
    resume = await Rig(engine, ByRow()).handed_back(rows=rows)
    assert [outcome.index for outcome in resume.outcomes] == [0, 1]
    assert [progress.index for progress in resume.progress] == [2, 3]
    assert [[len(turn.output_ids) // 4 for turn in progress.turns] for progress in resume.progress] == [
        [5, 3],
        [5, 3],
    ]

    another = endless()
    rig = Rig(another, ByRow())
    assert await rig.run(resume, rows=rows) == whole
    assert [request.max_new_tokens for request in another.requests] == [6, 12]


async def test_a_resumed_group_takes_slots_only_for_what_is_left_of_it() -> None:
    engine = endless()
    engine.faults += [None, Cut(3, "aborted")]
    resume = await Rig(engine, MultiTurn(2), FakeBackend(rate_by_parity)).handed_back()
    assert len(resume.outcomes) + len(resume.progress) == 4 and resume.outcomes and resume.progress

    class Watching(FakeEngine):
        async def generate(self, requests: Any, *, cache_salt: str | None = None) -> Any:
            seen.append(rig.slots.num_taken)
            return await super().generate(requests)

    seen: list[int] = []
    rig = Rig(Watching(), MultiTurn(2), FakeBackend(rate_by_parity))
    await rig.run(resume)
    assert seen == [len(resume.progress)]


def rate_by_parity(request: ScoreRequest) -> Score:
    return Score(float(len(request.response) % 2), "no")


@pytest.mark.parametrize(
    ("error", "num_failures"),
    [
        (EngineLost("killed"), 0),
        (EngineFailed("500: out of memory"), 1),  # once for the whole group
        (Cut(3, "aborted"), 0),
    ],
)
@pytest.mark.parametrize("before", [0, 3])
async def test_only_reported_failures_count(error: Cut | Exception, num_failures: int, before: int) -> None:
    engine = endless()
    engine.faults.append(error)
    resume = await Rig(engine).handed_back(ResumePoint(ticket=7, num_failures=before))
    assert (resume.ticket, resume.num_failures) == (7, before + num_failures)


async def test_a_streamed_answer_that_fails_is_reported_whatever_else_breaks() -> None:
    engine = endless()
    engine.faults += [None, Cut(9), EngineFailed("500: out of memory")]
    resume = await Rig(engine).handed_back(size=3, limits=LONG)
    assert (resume.num_failures, len(resume.outcomes), len(resume.progress)) == (1, 1, 2)


@pytest.mark.parametrize("limits", [LIMITS, LONG])
async def test_work_goes_on_under_new_weights_with_its_tokens_and_their_versions(
    limits: SampleLimits,
) -> None:
    engine = endless()
    engine.faults += [Cut(10, "aborted")] * 4
    resume = await Rig(engine).handed_back(limits=limits)
    another = endless()
    another.version = PolicyVersion(2, 5)
    for sample in samples(await Rig(another).run(resume, limits=limits)):
        assert [(span.attempt, span.version, span.end) for span in sample.version_spans] == [
            (1, 0, 10),
            (2, 5, limits.max_new_tokens),
        ]


async def test_a_workflow_that_turns_a_lost_engine_into_an_error_of_its_own_is_handed_back() -> None:
    class Wraps:
        async def run(self, session: Session) -> float:
            try:
                await session.generate()
            except Exception as error:
                raise RuntimeError("tool call failed") from error
            return 1.0

    class Swallows:
        async def run(self, session: Session) -> float:
            await session.generate(5)
            try:
                await session.generate()
            except Exception:
                return 0.0
            return 1.0

    for workflow, faults in ((Wraps(), [Cut(3)]), (Swallows(), [None, Cut(3)])):
        engine = endless()
        engine.faults += faults
        resume = await Rig(engine, workflow).handed_back(size=1, limits=LONG)
        assert not resume.outcomes and len(resume.progress[0].turns[-1].output_ids) == 4 * 3


# -- rows


@pytest.mark.parametrize(
    ("row", "error"), [({"question": "7 + " * 2000}, PromptTooLong), ({"answer": "7"}, PromptError)]
)
async def test_a_ticket_whose_row_makes_no_prompt_is_no_ticket(row: Row, error: type[Exception]) -> None:
    rig = Rig()
    with pytest.raises(error):
        await rig.run(rows=dict.fromkeys(range(4), row))
    assert not rig.engine.requests and rig.slots.num_taken == 0


async def test_of_several_rows_only_those_that_make_no_prompt_go_without_an_answer() -> None:
    rows: dict[int, Row] = {16: ROW, 17: {"question": "7 + " * 2000}, 18: {"answer": "7"}, 19: ROW}
    outcomes = await Rig().run(rows=rows)
    assert [outcome.index for outcome in outcomes] == [16, 17, 18, 19]
    found = failures(outcomes)
    assert {index: reason for index, (reason, _) in found.items()} == dict.fromkeys([17, 18], "unusable_row")
    assert "spec.model.contextLength is 2000" in found[17][1] and "'question' is missing" in found[18][1]
