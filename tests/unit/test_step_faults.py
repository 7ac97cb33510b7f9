"""How an attempt keeps account of steps that fail, and of updates that were not applied."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from asyncrl_api.ledger import read_ledger
from asyncrl_runtime.trainer.attempt import Attempt
from asyncrl_runtime.trainer.books.books import Batch, Books
from asyncrl_runtime.trainer.books.staleness import LiveGroup, assess
from asyncrl_runtime.trainer.step_faults import NumbersUnusable
from asyncrl_runtime.trainer.update.failures import StepFailed
from asyncrl_runtime.trainer.update.ranks import PeerLost, Train
from asyncrl_runtime.trainer.update.step import StepOutcome
from support.fakes import FakeRanks, FakeStreams, FakeWeights, run_in_virtual_time
from support.jobs.attempt_parts import make_attempt_parts
from support.messages.samples import make_group, make_job

SPEC = make_job(
    "training.batchSize=4", "training.minibatches=2", "failurePolicy.trainer.maxSkippedUpdates=2"
).spec


class Scene:
    """An attempt whose ranks do as told with each step."""

    def __init__(self, folder: Path, outcomes: Sequence[StepOutcome | Exception]) -> None:
        self.ledger = folder / "ledger.jsonl"
        self._outcomes = list(outcomes)
        self.ranks = FakeRanks(self._next)
        self._books = Books(SPEC)
        parts = make_attempt_parts(
            folder, SPEC, self._books, FakeStreams(), self.ranks, FakeWeights(), None, lambda: 0.0
        )
        self.attempt = Attempt(parts, None)

    def _next(self, command: Any) -> StepOutcome:
        outcome = self._outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def train(self, skipped: tuple[int, ...] = ()) -> dict[str, float] | None:
        version = self.attempt.version
        groups = [
            assess(make_group(4 * version + n), version, SPEC.staleness, {}, "None") for n in range(1, 5)
        ]
        live = tuple(group for group in groups if isinstance(group, LiveGroup))
        batch = Batch(version, live, {}, 9, SPEC.sampling.max_new_tokens, skipped=skipped)

        async def record_and_train() -> dict[str, float] | None:
            await self.attempt.record(batch)
            return await self.attempt.train_step(batch)

        report = run_in_virtual_time(record_and_train())
        self._books.advance(batch)
        self._books.publish(self._books.version)
        return report

    def lines(self, field: str) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, self.ledger.read_text().splitlines()) if field in line]


def outcome(*skipped: int) -> StepOutcome:
    return StepOutcome({"loss": 1.0}, skipped)


def test_what_was_skipped_is_noted_with_the_tickets_of_its_minibatch(tmp_path: Path) -> None:
    scene = Scene(tmp_path, [outcome(1), outcome()])
    report = scene.train()
    assert report is not None and report["loss"] == 1.0 and report["num_samples"] == 8
    scene.train()
    assert scene.lines("skipped") == [{"attempt": 1, "version": 0, "skipped": [1], "tickets": [3, 4]}]


def test_what_was_skipped_before_is_skipped_again_and_not_noted_again(tmp_path: Path) -> None:
    scene = Scene(tmp_path, [outcome(0)])
    scene.train(skipped=(0,))
    [command] = scene.ranks.commands
    assert isinstance(command, Train) and command.plan.skipped == {0}
    assert scene.lines("skipped") == []


def test_too_many_skipped_in_a_row_end_the_job_over_steps_and_with_words(tmp_path: Path) -> None:
    scene = Scene(tmp_path, [outcome(0), outcome(1), outcome(0, 1)])
    scene.train()
    scene.train()
    with pytest.raises(NumbersUnusable) as ended:
        scene.train()
    assert str(ended.value) == (
        "the gradients of 3 updates in a row are not finite; "
        "spec.failurePolicy.trainer.maxSkippedUpdates is 2. Lower training.learningRate, or bound rewards "
        "with algorithm.rewardClip"
    )
    assert [line["version"] for line in scene.lines("skipped")] == [0, 1, 2]


def test_one_that_is_applied_ends_the_row(tmp_path: Path) -> None:
    scene = Scene(tmp_path, [outcome(1), outcome(0), outcome(1), outcome(0)])
    for _ in range(4):
        scene.train()


@pytest.mark.parametrize(
    ("is_out_of_memory", "at"), [(False, None), (True, SPEC.training.tokens_per_micro_batch)]
)
def test_a_failure_of_the_steps_own_is_in_the_ledger_before_the_attempt_ends(
    tmp_path: Path, is_out_of_memory: bool, at: int | None
) -> None:
    failed = StepFailed("IndexError: index out of range", (2,), is_out_of_memory=is_out_of_memory)
    scene = Scene(tmp_path, [failed])
    with pytest.raises(StepFailed):
        scene.train()
    [failure] = read_ledger(scene.ledger).failures
    assert failure == (0, "IndexError: index out of range", (2,), at)


def test_what_is_raised_before_the_ranks_are_asked_is_the_steps_own_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise ValueError("no advantage")

    monkeypatch.setattr("asyncrl_runtime.trainer.update.step.compute_advantages", fails)
    scene = Scene(tmp_path, [])
    with pytest.raises(StepFailed, match="ValueError: no advantage"):
        scene.train()
    assert len(read_ledger(scene.ledger).failures) == 1


@pytest.mark.parametrize(
    "error", [PeerLost("another rank is gone"), OSError("No space left"), ConnectionError()]
)
def test_what_is_not_the_steps_own_fault_is_in_no_ledger(tmp_path: Path, error: Exception) -> None:
    scene = Scene(tmp_path, [error])
    with pytest.raises(type(error)):
        scene.train()
    assert scene.lines("failed") == []
