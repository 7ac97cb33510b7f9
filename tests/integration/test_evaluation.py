"""Held-out prompts: each is answered greedily and counted once, whatever happens, and never trained."""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from asyncrl_api.names import JobNames, NatsAddress
from asyncrl_runtime.contract.messages import (
    EVALUATION_ROWS,
    EvaluationResult,
    PolicyVersion,
    Sample,
    encode,
    ids_from_bytes,
)
from asyncrl_runtime.model.source import load_tokenizer
from asyncrl_runtime.trainer.evaluation import SILENT_SECONDS, Evaluated, Evaluator
from asyncrl_runtime.transport.streams import QUESTION_ACK_WAIT_SECONDS, delete_stream, make_streams
from support.engines.rollout_scene import STORAGE_BYTES, Scene, open_scene, publish
from support.engines.tiny_models import EOS, tiny_model
from support.jobs.job_harness import JobHarness, build_job
from support.jobs.job_witness import Engine, Witness, finish
from support.jobs.nats_server import NatsServer
from support.messages.samples import make_sample

V0, V1 = PolicyVersion(1, 0), PolicyVersion(1, 1)
ROWS = [{"question": f"{n} + 1 ="} for n in range(2 * EVALUATION_ROWS + 8)]
MAX_NEW_TOKENS = 6
DEADLINE_SECONDS = 90.0

Tick = Callable[[], Awaitable[None]]


@pytest.fixture
async def scene(nats_address: NatsAddress, names: JobNames) -> AsyncIterator[Scene]:
    async with open_scene(nats_address, names) as scene:
        yield scene


class Exam:
    """Evaluations of one attempt of a trainer."""

    def __init__(self, scene: Scene, rows: list[dict[str, Any]] = ROWS) -> None:
        self.stream_generation = 1
        self._evaluator = Evaluator(scene.end, 1, rows, lambda: self.stream_generation, time.monotonic)

    async def run(self, tick: Tick | None = None) -> Evaluated:
        async def nothing() -> None:
            pass

        evaluated = await asyncio.wait_for(
            self._evaluator.run(0, MAX_NEW_TOKENS, tick or nothing), DEADLINE_SECONDS
        )
        assert evaluated is not None
        return evaluated


def assert_each_once(evaluated: Evaluated, count: int = len(ROWS)) -> None:
    assert [sample.index for sample in evaluated.samples] == list(range(count))
    assert evaluated.report.num_prompts == count
    rewards = [sample.reward for sample in evaluated.samples]
    assert evaluated.report.accuracy == pytest.approx(sum(rewards) / count)


def versions(evaluated: Evaluated) -> tuple[int, int]:
    return evaluated.report.lowest_version, evaluated.report.highest_version


@torch.no_grad()
def greedy(model: PreTrainedModel, sample: Sample) -> list[int]:
    """Return a sample's response as the model alone gives it."""
    ids = ids_from_bytes(sample.prompt_ids).tolist()
    first = len(ids)
    while len(ids) - first < MAX_NEW_TOKENS and not (len(ids) > first and ids[-1] == EOS):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    response: list[int] = ids[first:]
    return response


async def test_every_prompt_is_answered_greedily_and_nothing_is_trained(scene: Scene) -> None:
    """It waits for the first engine, which gets its weights meanwhile."""
    publisher = scene.publisher()

    async def give_weights() -> None:
        if publisher.behind(V0):
            await publish(publisher, V0, seed=1)

    evaluation = asyncio.create_task(Exam(scene).run(give_weights))
    await scene.add("a", "b")
    evaluated = await evaluation
    assert_each_once(evaluated)
    assert versions(evaluated) == (0, 0) and evaluated.report.step == 0
    assert len({sample.reward for sample in evaluated.samples}) > 1
    model = AutoModelForCausalLM.from_pretrained(tiny_model(seed=1))
    for sample in evaluated.samples[::8]:
        assert ids_from_bytes(sample.response_ids).tolist() == greedy(model, sample)
    for stream in (scene.names.prompt_stream, scene.names.trajectory_stream):  # no ticket, no trajectory
        assert (await scene.broker.jetstream.stream_info(stream)).state.last_seq == 0


async def test_answers_to_an_earlier_evaluation_are_not_mixed_in(scene: Scene) -> None:
    """The earlier ones were broken off with questions open, and with answers that nobody has fetched."""
    [a] = await scene.add("a")
    publisher, exam = scene.publisher(), Exam(scene)
    await publish(publisher, V0, seed=1)
    await a.engine.slow_down(0.2)
    broken_off = asyncio.create_task(exam.run())
    await scene.until("it is asked", lambda: scene.beat("a").num_running_samples > 0)
    broken_off.cancel()
    await publish(publisher, V1, seed=2)
    await a.engine.slow_down(0)
    flattering = EvaluationResult(
        evaluation="1-1", outcomes=tuple(make_sample(index, reward=9.0) for index in range(len(ROWS)))
    )
    await scene.broker.jetstream.publish(scene.names.evaluation("answer", "1-1.0"), encode(flattering))

    evaluated = await exam.run()
    assert_each_once(evaluated)
    assert versions(evaluated) == (1, 1)
    assert max(sample.reward for sample in evaluated.samples) < 9


@pytest.mark.parametrize("loses_evaluation", [True, False])
async def test_streams_that_are_made_again_lose_no_prompt(scene: Scene, loses_evaluation: bool) -> None:
    """The streams are lost when everything has been answered and not everything has been fetched."""
    await scene.add("a")
    await publish(scene.publisher(), V0, seed=1)
    exam, jetstream, names = Exam(scene), scene.broker.jetstream, scene.names
    num_ticks = 0

    async def lose_streams() -> None:
        nonlocal num_ticks
        num_ticks += 1
        if num_ticks != 2:
            return
        while await num_stored(scene, "ask"):
            await asyncio.sleep(0.05)
        assert await num_stored(scene, "answer")
        await delete_stream(jetstream, names.evaluation_stream if loses_evaluation else names.prompt_stream)
        await make_streams(jetstream, names, STORAGE_BYTES)
        exam.stream_generation += 1

    assert_each_once(await exam.run(lose_streams))


async def num_stored(scene: Scene, direction: str) -> int:
    """Questions that are not answered yet, or answers that are not fetched."""
    info = await scene.broker.jetstream.stream_info(
        scene.names.evaluation_stream, subjects_filter=scene.names.evaluation(direction, ">")
    )
    return sum((info.state.subjects or {}).values())


async def test_a_broker_that_is_restarted_loses_no_prompt(own_nats: NatsServer, names: JobNames) -> None:
    async with open_scene(NatsAddress(url=own_nats.url), names) as scene:
        [a] = await scene.add("a")
        await publish(scene.publisher(), V0, seed=1)
        await a.engine.slow_down(0.2)
        evaluation = asyncio.create_task(Exam(scene).run())
        await scene.until("it has questions", lambda: scene.beat("a").num_running_samples > 0)
        own_nats.kill()
        await a.engine.slow_down(0)
        own_nats.start()
        assert_each_once(await evaluation)


async def test_a_prompt_without_an_answer_counts_as_wrong(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    """One is too long for the model, and one response cannot be scored."""
    rows: list[dict[str, Any]] = [*ROWS[:10], {"question": "7 + " * 100}, {**ROWS[10], "unscorable": True}]
    await scene.add("a")
    await publish(scene.publisher(), V0, seed=1)
    evaluated = await Exam(scene, rows).run()
    assert [sample.index for sample in evaluated.samples] == list(range(10))
    assert evaluated.report.num_prompts == 12
    assert evaluated.report.accuracy == pytest.approx(sum(s.reward for s in evaluated.samples) / 12)
    assert "evaluation at step 0: 2 of 12 prompts without an answer, the first: " in caplog.text


async def test_an_evaluation_that_nobody_answers_is_given_up(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0

    async def time_passes() -> None:
        nonlocal now
        now += SILENT_SECONDS / 2

    evaluator = Evaluator(scene.end, 1, ROWS, lambda: 1, lambda: now)
    assert await evaluator.run(0, MAX_NEW_TOKENS, time_passes) is None
    assert "evaluation 1-1 is given up: no answer in 600 s" in caplog.text


@pytest.mark.slow
async def test_a_job_measures_itself_on_prompts_that_it_does_not_train_on(
    own_nats: NatsServer, tmp_path: Path
) -> None:
    """Its training rows lose the held-out ones among them; a worker dies in the first evaluation."""
    held_out = [f"{n} + 1 =" for n in range(20)]
    job = build_job(
        dataset={"source": "harness_data:rows"},
        evaluation={
            "source": "harness_data:rows",
            "split": "train",
            "parameters": {"size": len(held_out)},
            "samples": len(held_out),
            "everySteps": 2,
        },
        training={"maxSteps": 4},
        gpuBudget={"total": 3},
        rollout={"maxConcurrency": 4},
    )
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        async with Witness(harness) as witness:
            engines = [Engine(harness, replica) for replica in (0, 1)]
            for replica, engine in enumerate(engines):
                harness.start_rollout(replica)
                await engine.slow_down(3)
            harness.start_trainer()
            await witness.until("each has questions", lambda: len(running(witness)) == 2)
            harness.kill("rollout-0-worker")
            died_at = time.monotonic()
            await engines[1].slow_down(0)
            await witness.until("all are answered", lambda: len(evaluations(harness)) == 1)
            seconds = time.monotonic() - died_at
            assert seconds < 3 * QUESTION_ACK_WAIT_SECONDS, "the dead worker's questions came back too late"
            await finish(harness)
            await witness.until("all is recorded", lambda: set(trained(harness)) <= witness.groups.keys())

        first, beside, last = evaluations(harness)
        assert [line["numPrompts"] for line in (first, beside, last)] == [len(held_out)] * 3
        assert (first["step"], first["lowestVersion"], first["highestVersion"]) == (0, 0, 0)
        assert (last["step"], last["lowestVersion"], last["highestVersion"]) == (4, 4, 4)
        assert first["mismatch_absolute_gap"] < 1e-5 and last["mismatch_absolute_gap"] < 1e-5
        assert beside["step"] == 2 and "mismatch_absolute_gap" not in beside
        report = harness.report
        assert report is not None and report.first_evaluation is not None
        assert report.first_evaluation.accuracy == first["accuracy"]
        assert report.last_evaluation is not None and report.last_evaluation.accuracy == last["accuracy"]

        assert report.num_held_out_in_training == 0 and report.num_held_out_in_warmup == 0
        assert "20 rows to train on, 20 held out" in harness.log_text("trainer")
        tokenizer = load_tokenizer(tiny_model())
        prompts = [
            tokenizer.decode(ids_from_bytes(sample.prompt_ids).tolist())
            for ticket in trained(harness)
            for sample in witness.groups[ticket].samples
        ]
        assert len(prompts) == 16
        assert not any(f"<|user|>{text}" in prompt for text in held_out for prompt in prompts)


@pytest.mark.slow
async def test_the_first_policy_is_measured_once_though_the_trainer_dies(
    own_nats: NatsServer, tmp_path: Path
) -> None:
    """Its engine dies with it, so until the recorded step is repeated nobody has weights to answer with."""
    job = build_job(
        evaluation={"source": "harness_data:rows", "samples": 8, "everySteps": 100},
        checkpoint={"everySteps": 100},
        training={"maxSteps": 3},
    )
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        async with Witness(harness):
            harness.start_rollout(0)
            killed = harness.start_trainer(kill_after="asyncrl_runtime.trainer.attempt:Attempt.advance#1")
            assert await asyncio.to_thread(killed.wait, 90) == -signal.SIGKILL, harness.log_tail("trainer")
            harness.kill("rollout-0-engine")
            harness.start("rollout-0-engine")
            harness.start_trainer()
            await finish(harness)
        first, last = evaluations(harness)
        assert (first["step"], first["highestVersion"], last["step"]) == (0, 0, 3)
        report = harness.report
        assert report is not None and report.first_evaluation is not None
        assert report.first_evaluation.accuracy == first["accuracy"]


def running(witness: Witness) -> list[str]:
    """Workers with questions or tickets in hand."""
    return [name for name, beat in witness.said.items() if beat.num_running_samples > 0]


def evaluations(harness: JobHarness) -> list[dict[str, Any]]:
    path = harness.folder.path / "evaluations.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trained(harness: JobHarness) -> list[int]:
    return [ticket for step in harness.history.steps for ticket in step.tickets]
