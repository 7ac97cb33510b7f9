"""What a step trains is decided by its messages, the ledger and the attempt that recorded it alone.

Every field that may be edited while a job lives is edited between a step and its repetition.
"""

import asyncio
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncrl_api.job import Spec
from asyncrl_api.ledger import read_ledger
from asyncrl_runtime.contract.broker import StreamMessage
from asyncrl_runtime.contract.messages import Group, encode
from asyncrl_runtime.trainer.attempt import Attempt
from asyncrl_runtime.trainer.books.books import Books
from asyncrl_runtime.trainer.update.ranks import Train
from asyncrl_runtime.trainer.update.step import StepOutcome
from support.cluster.model_cluster import make_spec
from support.fakes import FakeRanks, FakeStreams, FakeWeights, run_in_virtual_time
from support.jobs.attempt_parts import make_attempt_parts
from support.manifests.field_edits import NODES, Edit, edits_of, put, wire, with_all_blocks
from support.messages.samples import make_sample

NUM_STEPS, BATCH_SIZE = 2, 4
# Each decides what is trained: the schedule, stale tokens in the second step, an answer near the limit.
BARE = wire(
    make_spec(
        training={"batchSize": BATCH_SIZE, "maxSteps": 9, "schedule": {"type": "Cosine"}},
        staleness={"maxVersions": 1},
        sampling={"maxNewTokens": 20, "groupSize": 2},
        algorithm={"overlongPenalty": {"bufferTokens": 10, "penalty": 1.0}},
    )
)
FULL = with_all_blocks(BARE)
EDITS = {
    f"{edit.node.path} {edit.kind}": edit
    for edit in edits_of(BARE, FULL)
    if set(edit.node.mark.split("/")) & {"L", "R"} and edit.node.path != "suspend"
}
STALE = Edit(NODES["staleness.maxVersions"], "lowered", BARE, put(BARE, "staleness.maxVersions", 0))
"""With this value the second step's groups could not be trained."""


def group(ticket: int) -> Group:
    lengths = (3 + ticket, 19 - ticket)
    samples = tuple(
        make_sample(index, spans=[(1, 0, length)], reward=float(index))
        for index, length in enumerate(lengths)
    )
    return Group(ticket=ticket, group_size=2, samples=samples)


def plans_of(folder: Path, spec: Spec, number: int) -> list[Any]:
    """Let an attempt train the job's steps; return what its ranks were told to train, as plain values."""
    history = read_ledger(folder / "ledger.jsonl")
    books = Books(spec, recorded=history.steps, began=history.began)
    for ticket in range(1, NUM_STEPS * BATCH_SIZE + 1):
        books.take(StreamMessage(ticket, f"rl.j.traj.{ticket}", encode(group(ticket))))
    ranks = FakeRanks(lambda command: StepOutcome({}, ()))

    async def run() -> None:
        clock = asyncio.get_running_loop().time
        parts = make_attempt_parts(
            folder, spec, books, FakeStreams(), ranks, FakeWeights(), None, clock, attempt=number
        )
        attempt = Attempt(parts, None)
        for _ in range(NUM_STEPS):
            batch = await attempt.next_batch()
            assert batch is not None and batch.is_repeat is (number > 1)
            await attempt.record(batch)
            await attempt.train_step(batch)
            await attempt.advance(batch)

    run_in_virtual_time(run())
    return [plain(command.plan) for command in ranks.commands if isinstance(command, Train)]


def plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [plain(each) for each in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Any]]]:
    """The ledger of a first attempt under each spec that is edited, and what it trained."""
    found = {}
    for name, values in (("BARE", BARE), ("FULL", FULL)):
        folder = tmp_path_factory.mktemp(name)
        plans = plans_of(folder, Spec.model_validate(values), 1)
        found[name] = (folder / "ledger.jsonl", plans)
    return found


@pytest.mark.parametrize("edit", [*EDITS.values(), STALE], ids=[*EDITS, "staleness.maxVersions lowered"])
def test_a_step_that_is_repeated_after_an_edit_trains_what_was_recorded(
    tmp_path: Path, recorded: Mapping[str, tuple[Path, list[Any]]], edit: Edit
) -> None:
    ledger, trained = recorded["BARE" if edit.before == BARE else "FULL"]
    shutil.copy(ledger, tmp_path)
    assert len(trained) == NUM_STEPS
    assert plans_of(tmp_path, edit.spec, 2) == trained


def test_a_step_of_a_ledger_that_does_not_know_these_values_has_those_of_the_attempt(tmp_path: Path) -> None:
    before, after = (
        Spec.model_validate({**BARE, "training": {**BARE["training"], "learningRate": rate}})
        for rate in (0.1, 0.2)
    )
    plans_of(tmp_path, before, 1)
    ledger = tmp_path / "ledger.jsonl"
    lines = ledger.read_text().splitlines()
    [began] = [number for number, line in enumerate(lines) if '"began"' in line]
    lines[began] = '{"attempt":1,"began":0}'
    ledger.write_text("".join(line + "\n" for line in lines))
    first, _ = plans_of(tmp_path, after, 2)
    assert first["learning_rate"] == 0.2


DECISIVE = [
    *("training.minibatches", "training.tokensPerMicroBatch", "training.learningRate", "training.maxSteps"),
    *("training.schedule.type", "training.weightDecay", "training.gradientClipping"),
    *("algorithm.policyLoss", "algorithm.advantage", "algorithm.clip.low", "algorithm.clip.high"),
    *("algorithm.importanceWeight.max", "algorithm.klCoefficient", "algorithm.entropyCoefficient"),
    *("algorithm.rewardScale", "algorithm.overlongPenalty.bufferTokens"),
]


@pytest.mark.parametrize("path", DECISIVE)
def test_a_step_that_is_new_is_trained_under_the_new_value(
    tmp_path: Path, recorded: Mapping[str, tuple[Path, list[Any]]], path: str
) -> None:
    """Otherwise the test above could not fail."""
    assert plans_of(tmp_path, EDITS[f"{path} edited"].spec, 1) != recorded["FULL"][1]
