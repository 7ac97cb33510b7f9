"""One sample over its turns: every token is in its place, however often the sample is broken off."""

import asyncio
import math
import re
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from asyncrl_api.protocols import Row, Score, Session, Workflow
from asyncrl_runtime.contract.messages import (
    PolicyVersion,
    ResumePoint,
    Sample,
    SampleProgress,
    TurnRecord,
    VersionSpan,
    decode,
    encode,
    floats_to_bytes,
    ids_from_bytes,
)
from asyncrl_runtime.rollout.engine_api import (
    BrokenStream,
    EngineLost,
    EngineRefused,
    Generation,
    SamplingRequest,
)
from asyncrl_runtime.rollout.prompts import PromptRenderer
from asyncrl_runtime.rollout.session import (
    PromptTooLong,
    SampleLimits,
    Sampler,
    SampleSession,
    sampling_seed,
)
from asyncrl_runtime.rollout.workflows import MultiTurn
from support.engines.tiny_models import build_tokenizer
from support.fakes import Cut, FakeEngine

RENDERER = PromptRenderer(build_tokenizer(), "question")
ROW: Row = {"question": "17 + 4 ="}
PROMPT = RENDERER.prompt_ids(ROW)
LIMITS = SampleLimits(max_new_tokens=20, context_length=200, temperature=0.7)


async def judge(prompt: str, response: str, row: Row) -> Score:
    """Never satisfied; what it says depends on the response."""
    return Score(len(response) / 1000, f"{len(response)} characters are wrong.")


def open_session(
    engine: FakeEngine,
    replay: Sequence[TurnRecord] = (),
    limits: SampleLimits = LIMITS,
    sampler: Sampler | None = None,
    **options: Any,
) -> SampleSession:
    def seed(turn: int) -> int:
        return sampling_seed(1, 7, 0, turn)

    return SampleSession(0, ROW, RENDERER, limits, sampler or engine.stream, judge, seed, replay, **options)


async def run(session: SampleSession, workflow: Workflow) -> Sample:
    return session.sample(await workflow.run(session))


def tokens(sample: Sample) -> list[int]:
    return list(ids_from_bytes(sample.response_ids).tolist())


async def test_one_turn_is_a_sample() -> None:
    engine = FakeEngine()
    session = open_session(engine)
    turn = await session.generate()
    sample = session.sample(0.5)
    answer = engine.sample(engine.requests[0])
    assert tokens(sample) == list(turn.token_ids) == answer.output_ids
    assert sample.behavior_logprobs == floats_to_bytes(answer.logprobs)
    assert sample.mask().all() and sample.version_spans == answer.spans
    assert ids_from_bytes(sample.prompt_ids).tolist() == PROMPT == list(engine.requests[0].input_ids)
    assert (sample.reward, sample.temperature, sample.num_turns) == (0.5, 0.7, 1)
    assert sample.finish_reason == turn.finish_reason == answer.finish_reason
    assert turn.text == RENDERER.decode(answer.output_ids)


async def test_every_token_keeps_its_logprob_its_mask_and_its_version_over_turns() -> None:
    engine = FakeEngine()
    session = open_session(engine)
    first = await session.generate()
    session.tell("Wrong.")
    told = RENDERER.next_turn_ids("Wrong.", first.token_ids[-1])
    engine.version = PolicyVersion(1, 1)
    second = await session.generate(4)
    sample = session.sample(1.0)

    assert tokens(sample) == [*first.token_ids, *told, *second.token_ids]
    assert sample.mask().tolist() == [True] * len(first.token_ids) + [False] * len(told) + [True] * 4
    logprobs = [engine.sample(request).logprobs for request in engine.requests]
    assert sample.behavior_logprobs == floats_to_bytes([*logprobs[0], *[0.0] * len(told), *logprobs[1]])
    until = len(first.token_ids) + len(told)  # nobody sampled what was told: the span only covers it
    assert sample.version_spans == (VersionSpan(1, 0, until), VersionSpan(1, 1, until + 4))
    assert list(engine.requests[1].input_ids) == [*PROMPT, *first.token_ids, *told]
    assert (sample.num_turns, sample.finish_reason) == (2, second.finish_reason)


async def test_tokens_told_after_the_last_answer_are_left_out() -> None:
    session = open_session(FakeEngine())
    turn = await session.generate()
    session.tell("Thank you.")
    sample = session.sample(1.0)
    assert tokens(sample) == list(turn.token_ids)
    assert sample.version_spans == (VersionSpan(1, 0, len(turn.token_ids)),) and sample.mask().all()


async def test_nothing_can_be_told_before_an_answer() -> None:
    with pytest.raises(ValueError, match="no answer yet"):
        open_session(FakeEngine()).tell("Hello.")


async def test_a_sample_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="before any token was sampled"):
        open_session(FakeEngine()).sample(1.0)


@pytest.mark.parametrize("reward", [math.nan, math.inf, 1e39])
async def test_a_reward_that_is_no_number_is_refused(reward: float) -> None:
    session = open_session(FakeEngine())
    await session.generate()
    with pytest.raises(ValueError, match=re.escape(f"returned {reward} as reward")):
        session.sample(reward)


@pytest.mark.parametrize("logprob", [None, math.nan, -math.inf, 1e39])
async def test_a_logprob_that_is_no_number_fails_the_sample(logprob: Any) -> None:
    engine = FakeEngine()

    async def sampler(request: SamplingRequest) -> Generation:
        generation = await engine.stream(request)
        generation.logprobs[1] = logprob
        return generation

    session = open_session(engine, sampler=sampler)
    with pytest.raises(EngineRefused, match=re.escape(f"log-prob {logprob} to token 1 of turn 1;")):
        await session.generate()
    with pytest.raises(EngineRefused):  # also if the workflow goes on as if nothing had happened
        session.sample(1.0)


async def test_a_recorded_turn_with_a_logprob_that_is_no_number_is_sampled_again() -> None:
    engine = FakeEngine()
    engine.faults.append(Cut(4, "broken"))
    broken = open_session(engine)
    with pytest.raises(EngineLost):
        await broken.generate()
    [turn] = broken.progress.turns
    spoiled = msgspec.structs.replace(turn, logprobs=floats_to_bytes([-1.0, math.nan, -1.0, -1.0]))
    again = open_session(engine, [spoiled])
    assert (await again.generate()).token_ids == (await open_session(FakeEngine()).generate()).token_ids
    assert list(engine.requests[-1].input_ids) == PROMPT, "nothing of the record is kept"


@pytest.mark.parametrize(
    ("asked", "limits", "granted"),
    [
        (None, LIMITS, 20),
        (5, LIMITS, 5),
        (99, LIMITS, 20),
        (None, SampleLimits(20, len(PROMPT) + 3, 1.0), 3),
    ],
)
async def test_a_turn_is_bounded_by_what_was_asked_the_ticket_and_the_context(
    asked: int | None, limits: SampleLimits, granted: int
) -> None:
    engine = FakeEngine()
    await open_session(engine, limits=limits).generate(asked)
    [request] = engine.requests
    assert (request.max_new_tokens, request.temperature) == (granted, limits.temperature)


async def test_where_nothing_fits_a_turn_is_empty_and_asks_nobody() -> None:
    engine = FakeEngine(num_tokens_mean=10**9)
    session = open_session(engine, limits=SampleLimits(20, len(PROMPT) + 20, 1.0))
    full = await session.generate()
    assert len(full.token_ids) == 20
    assert await session.generate() == await session.generate(0) == ("", [], "length")
    assert len(engine.requests) == 1 and session.sample(1.0).num_turns == 1


async def test_a_bound_of_nothing_is_not_taken_for_no_bound() -> None:
    engine = FakeEngine()
    assert await open_session(engine).generate(0) == ("", [], "length")
    assert not engine.requests


def test_a_prompt_that_leaves_no_room_says_how_long_it_is() -> None:
    with pytest.raises(PromptTooLong, match=rf"{len(PROMPT)} tokens; spec.model.contextLength is 3"):
        open_session(FakeEngine(), limits=SampleLimits(20, 3, 1.0))
    open_session(FakeEngine(), limits=SampleLimits(20, len(PROMPT) + 1, 1.0))


def test_a_seed_depends_on_seed_ticket_sample_and_turn_alone() -> None:
    seeds = {sampling_seed(s, n, i, t) for s in (1, 2) for n in range(20) for i in range(8) for t in range(4)}
    assert len(seeds) == 2 * 20 * 8 * 4 and all(0 <= seed < 2**63 for seed in seeds)
    assert sampling_seed(1, 7, 3, 0) == 7457398611423625038  # a later version must go on where this one was


async def test_each_turn_has_its_own_seed() -> None:
    engine = FakeEngine()
    await run(open_session(engine), MultiTurn(3))
    assert [request.seed for request in engine.requests] == [sampling_seed(1, 7, 0, t) for t in range(3)]


async def test_recorded_turns_are_handed_out_and_not_sampled_again() -> None:
    first = open_session(FakeEngine())
    sample = await run(first, MultiTurn(3))
    another = FakeEngine()
    assert await run(open_session(another, first.progress.turns), MultiTurn(3)) == sample
    assert not another.requests


async def test_a_turn_broken_off_goes_on_where_it_was() -> None:
    engine = FakeEngine(num_tokens_mean=10**9)
    engine.faults += [None, Cut(3)]
    session = open_session(engine)
    with pytest.raises(EngineLost):
        await run(session, MultiTurn(2))
    assert [turn.finish_reason for turn in session.progress.turns] == ["length", ""]

    another = FakeEngine(num_tokens_mean=10**9)
    another.version = PolicyVersion(1, 4)
    sample = await run(open_session(another, session.progress.turns), MultiTurn(2))
    [request] = another.requests
    whole = engine.requests[1]
    assert list(request.input_ids) == [*whole.input_ids, *engine.sample(whole).output_ids[:3]]
    assert (request.seed, request.max_new_tokens) == (whole.seed, whole.max_new_tokens - 3)
    before = len(request.input_ids) - len(PROMPT)
    assert sample.version_spans == (VersionSpan(1, 0, before), VersionSpan(1, 4, before + 17))


async def test_a_turn_broken_off_at_its_bound_is_over() -> None:
    engine = FakeEngine(num_tokens_mean=10**9)
    session = open_session(engine)
    engine.faults.append(Cut(19))
    with pytest.raises(EngineLost):
        await session.generate()
    another = FakeEngine()
    turn = await open_session(another, session.progress.turns).generate(19)
    assert (len(turn.token_ids), turn.finish_reason) == (19, "length") and not another.requests


async def test_records_are_dropped_where_what_precedes_them_differs() -> None:
    first = open_session(FakeEngine())
    await run(first, MultiTurn(3))
    engine = FakeEngine()
    session = open_session(engine, first.progress.turns)
    turn = await session.generate()
    assert not engine.requests
    session.tell("something else than last time")
    await session.generate()
    assert session.progress.turns[0] == first.progress.turns[0] and len(session.progress.turns) == 2
    session.tell("and so on")
    await session.generate()
    assert len(engine.requests) == 2  # the third record followed the second, so it went with it
    assert list(turn.token_ids) == ids_from_bytes(first.progress.turns[0].output_ids).tolist()


async def test_records_that_were_not_reached_yet_stay_in_the_progress() -> None:
    first = open_session(FakeEngine())
    await run(first, MultiTurn(3))
    session = open_session(FakeEngine(), first.progress.turns)
    assert session.progress == first.progress
    await session.generate()
    assert session.progress == first.progress


@pytest.mark.parametrize("error", [EngineLost("gone"), EngineRefused("never")])
async def test_a_workflow_cannot_hide_that_the_engine_failed(error: Exception) -> None:
    """Otherwise an answer that was not sampled would be scored as a bad one."""
    engine = FakeEngine()
    engine.faults += [None, error]
    session = open_session(engine)
    await session.generate()
    with pytest.raises(type(error)):
        await session.generate()
    with pytest.raises(type(error)):
        await session.generate()
    with pytest.raises(type(error)):
        session.sample(0.0)
    assert len(engine.requests) == 2


async def test_a_cancelled_turn_keeps_what_was_earned_before_it() -> None:
    engine = FakeEngine()
    engine.faults.append(Cut(3))
    broken = open_session(engine)
    with pytest.raises(EngineLost):
        await broken.generate()

    class NeverAnswers(FakeEngine):
        async def stream(self, request: SamplingRequest, *, cache_salt: str | None = None) -> Any:
            await asyncio.Event().wait()

    session = open_session(NeverAnswers(), broken.progress.turns)
    task = asyncio.create_task(session.generate())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert session.progress == broken.progress


async def test_only_a_workflow_that_waits_for_nobody_is_idle() -> None:
    now = 100.0
    engine = FakeEngine()
    session = open_session(engine, clock=lambda: now)
    now = 130.0
    assert session.idle_seconds(now) == 30
    turn = asyncio.create_task(session.generate())
    await asyncio.sleep(0)
    now = 900.0
    assert session.idle_seconds(now) == 0  # it waits for the engine
    await turn
    assert session.idle_seconds(now) == 0
    assert session.idle_seconds(901.0) == 1


class UnevenTurns:
    """Turns of different bounds, an answer after two messages, and a last word that nobody answers."""

    async def run(self, session: Session) -> float:
        await session.generate(7)
        session.tell("Go on.")
        turn = await session.generate()
        session.tell(f"{len(turn.token_ids)} tokens.")
        session.tell("Once more.")
        await session.generate(3)
        session.tell("Enough.")
        return 0.25


lives = st.lists(
    st.tuples(
        st.integers(0, 3),  # calls that are answered before
        st.builds(Cut, st.integers(0, 19), st.sampled_from(["broken", "aborted", "lost"])),
    ),
    max_size=6,
)


@example([(0, Cut(3)), (0, Cut(4)), (0, Cut(2, "aborted")), (0, Cut(1, "lost"))], MultiTurn(2), 90, True)
@given(
    lives,
    st.sampled_from([MultiTurn(1), MultiTurn(4), UnevenTurns()]),
    st.integers(20, 90),
    st.booleans(),
)
@settings(max_examples=60)
def test_a_sample_is_the_same_however_it_was_broken_off(
    lives: list[tuple[int, Cut]], workflow: Workflow, room: int, are_weights_updated: bool
) -> None:
    """If the weights were updated, who sampled which token may differ; it is as each engine attested it."""
    limits = SampleLimits(20, len(PROMPT) + room, 0.7)

    async def check() -> None:
        whole = await run(open_session(FakeEngine(num_tokens_mean=30), limits=limits), workflow)
        sampled_by: dict[int, int] = {}
        replay: Sequence[TurnRecord] = ()
        for life, (num_answered, cut) in enumerate([*lives, (0, None)]):
            engine = FakeEngine(num_tokens_mean=30)
            engine.version = PolicyVersion(1, life if are_weights_updated else 0)
            engine.faults += [None] * num_answered + [cut]
            session = open_session(engine, replay, limits, sampler=recording(engine, sampled_by))
            try:
                sample = await run(session, workflow)
                break
            except EngineLost:
                replay = over_the_wire(session.progress).turns
        assert msgspec.structs.replace(sample, version_spans=whole.version_spans) == whole
        if not are_weights_updated:
            assert sample.version_spans == whole.version_spans
        for place, (was_sampled, version) in enumerate(zip(sample.mask(), versions(sample), strict=True)):
            assert not was_sampled or sampled_by[len(PROMPT) + place] == version

    asyncio.run(check())


def recording(engine: FakeEngine, sampled_by: dict[int, int]) -> Sampler:
    """A sampler that notes which version sampled each position, and checks that none is sampled twice."""

    def note(request: SamplingRequest, generation: Generation) -> None:
        for place in range(len(generation.output_ids)):
            position = len(request.input_ids) + place
            assert position not in sampled_by
            sampled_by[position] = engine.version.version

    async def sampler(request: SamplingRequest) -> Generation:
        try:
            generation = await engine.stream(request)
        except BrokenStream as error:
            note(request, error.earned)
            raise
        note(request, generation)
        return generation

    return sampler


def over_the_wire(progress: SampleProgress) -> SampleProgress:
    resume = ResumePoint(ticket=7, progress=(progress,))
    return decode(encode(resume), ResumePoint).progress[0]


def versions(sample: Sample) -> list[int]:
    result: list[int] = []
    for span in sample.version_spans:
        result += [span.version] * (span.end - len(result))
    return result
