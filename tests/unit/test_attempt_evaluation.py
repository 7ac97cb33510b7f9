"""What the trainer does with evaluations: alone with the policy, or beside its training."""

import asyncio
import json
from pathlib import Path
from typing import Any

import torch

from asyncrl_api.ledger import RecordedStep
from asyncrl_api.report import EvaluationReport
from asyncrl_runtime.trainer.attempt import Attempt
from asyncrl_runtime.trainer.books.books import Books, recorded_values
from asyncrl_runtime.trainer.books.checkpoints import Checkpoints
from asyncrl_runtime.trainer.evaluation import Evaluated
from asyncrl_runtime.trainer.update.ranks import Command, Export, Logprobs
from support.fakes import FakeEvaluator, FakeRanks, FakeStreams, FakeWeights, run_in_virtual_time
from support.jobs.attempt_parts import make_attempt_parts
from support.messages.samples import make_job, make_sample

GAP = 0.25


def answer(command: Command) -> Any:
    """Answer with log-probs that are off by GAP at each token."""
    match command:
        case Logprobs(samples):
            return [torch.tensor(s.behavior_logprobs[s.sampled_mask]) + GAP for s in samples]
        case Export(folder):
            folder.mkdir(parents=True)
    return None


def at_version(version: int) -> Evaluated:
    """Return the evaluation by engines that all have the same version."""
    samples = tuple(make_sample(index, spans=[(1, version, 4)]) for index in range(3))
    report = EvaluationReport(
        step=version, accuracy=1.0, num_prompts=3, lowest_version=version, highest_version=version
    )
    return Evaluated(report, samples)


class Rig:
    """A job at its last step, whose evaluations are all answered with the policy's version."""

    def __init__(self, folder: Path, evaluator: FakeEvaluator, *, is_repeating: bool = False) -> None:
        clock = asyncio.get_running_loop().time
        spec = make_job("training.maxSteps=1", 'evaluation={"source": "m:f", "everySteps": 1}').spec
        recorded = [RecordedStep(1, 0, (1,), {}, recorded_values(spec), {1: 0})] if is_repeating else []
        self.folder = folder
        self.weights = FakeWeights()
        self.ranks = FakeRanks(answer)
        books = Books(spec, recorded=recorded)
        parts = make_attempt_parts(
            folder, spec, books, FakeStreams(), self.ranks, self.weights, evaluator, clock
        )
        self.job = Attempt(parts, None)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "evaluations.jsonl").read_text().splitlines()]


def test_engine_and_trainer_are_compared_while_the_trainer_waits_alone(tmp_path: Path) -> None:
    """During training the weights may be one step ahead of the version that they are still named after."""

    async def check() -> None:
        rig = Rig(tmp_path, FakeEvaluator(at_version(0)))
        rig.job.evaluate_if_due()
        await asyncio.sleep(1)
        assert len(rig.evaluations) == 1 and not rig.ranks.commands
        await rig.job.evaluate_first()
        beside, alone = rig.evaluations
        assert "mismatch_absolute_gap" not in beside and alone["mismatch_absolute_gap"] == GAP
        assert [type(command) for command in rig.ranks.commands] == [Logprobs]
        await rig.job.finish()
        assert rig.evaluations[2]["mismatch_absolute_gap"] == GAP

    run_in_virtual_time(check())


def test_the_first_policy_is_measured_once_and_the_checkpoint_says_how_it_did(tmp_path: Path) -> None:
    async def check() -> None:
        rig = Rig(tmp_path, FakeEvaluator(at_version(0)))
        await rig.job.evaluate_first()
        await rig.job.evaluate_first()
        assert len(rig.evaluations) == 1
        [checkpoint] = Checkpoints(rig.folder, "uid").restorable()
        assert checkpoint.position.first_evaluation == at_version(0).report.model_dump(by_alias=True)

    run_in_virtual_time(check())


def test_the_first_policy_is_not_measured_where_steps_are_to_be_repeated(tmp_path: Path) -> None:
    """Engines have a later policy, or none, and get no other before the steps are repeated."""

    async def check() -> None:
        evaluator = FakeEvaluator(at_version(0))
        evaluator.may_end = lambda: False
        rig = Rig(tmp_path, evaluator, is_repeating=True)
        await asyncio.wait_for(rig.job.evaluate_first(), 60)

    run_in_virtual_time(check())


def test_engines_that_come_late_are_updated_while_the_end_waits_for_an_evaluation(tmp_path: Path) -> None:
    """The evaluation began during training, and its last engine has died since."""

    async def check() -> None:
        evaluator = FakeEvaluator(at_version(0))
        rig = Rig(tmp_path, evaluator)
        evaluator.may_end = lambda: bool(rig.weights.published)
        rig.weights.are_behind = True
        rig.job.evaluate_if_due()
        await asyncio.sleep(1)
        assert evaluator.num_running == 1 and not rig.weights.published
        await asyncio.wait_for(rig.job.finish(), 60)
        assert len(rig.evaluations) == 2

    run_in_virtual_time(check())


def test_a_job_that_is_told_to_stop_waits_for_no_evaluation(tmp_path: Path) -> None:
    async def check() -> None:
        evaluator = FakeEvaluator(at_version(0))
        evaluator.may_end = lambda: False
        rig = Rig(tmp_path, evaluator)
        rig.job.evaluate_if_due()
        await asyncio.sleep(1)
        rig.job.request_stop()
        await asyncio.wait_for(rig.job.finish(), 60)
        await asyncio.sleep(1)
        assert evaluator.num_running == 0 and rig.job.version == 0

    run_in_virtual_time(check())
