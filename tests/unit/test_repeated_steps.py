"""What a step trains is decided by its messages, the ledger and the attempt that recorded it alone.

Every field that may be edited while a job lives is edited between a step and its repetition. The first step
that is new is trained under the new values.
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
    """A group of the newest policy that the gate allows, with answers of different lengths."""
    lengths = (3 + ticket, 19 - ticket)
    version = max(0, (ticket - 1) // BATCH_SIZE - 1)
    samples = tuple(
        make_sample(index, spans=[(1, version, length)], reward=float(index))
        for index, length in enumerate(lengths)
    )
    return Group(ticket=ticket, group_size=2, samples=samples)


def plans_of(folder: Path, spec: Spec, number: int, num_steps: int = NUM_STEPS) -> list[Any]:
    """Let an attempt train the job's steps; return what its ranks were told to train, as plain values."""
    history = read_ledger(folder / "ledger.jsonl")
    books = Books(spec, recorded=history.steps, began=history.began)
    for ticket in range(1, num_steps * BATCH_SIZE + 1):
        books.take(StreamMessage(ticket, f"rl.j.traj.{ticket}", encode(group(ticket))))
    ranks = FakeRanks(lambda command: StepOutcome({}, ()))

    async def run() -> None:
        clock = asyncio.get_running_loop().time
        parts = make_attempt_parts(
            folder, spec, books, FakeStreams(), ranks, FakeWeights(), None, clock, attempt=number
        )
        attempt = Attempt(parts, None)
        for step in range(num_steps):
            batch = await attempt.next_batch()
            assert batch is not None and batch.is_repeat is (step < len(history.steps))
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


DECISIVE = {
    name: edit
    for name, edit in EDITS.items()
    if edit.node.mark == "R" and edit.node.path.startswith(("algorithm.", "training."))
    if edit.after != edit.before
}
del DECISIVE["training.batchSize edited"]  # decides which groups a step has
FREE_FORM = "trainer.deepspeed.config"
DECISIVE[FREE_FORM] = Edit(
    NODES[FREE_FORM], "edited", FULL, put(FULL, FREE_FORM, {"optimizer": {"params": {"betas": [0.5, 0.6]}}})
)
LIVE = ("training.maxSteps",)


@pytest.mark.parametrize(
    "edit", [*DECISIVE.values(), *(EDITS[f"{path} edited"] for path in LIVE)], ids=[*DECISIVE, *LIVE]
)
def test_the_first_new_step_after_an_edit_is_trained_under_the_new_value(
    tmp_path: Path, recorded: Mapping[str, tuple[Path, list[Any]]], edit: Edit
) -> None:
    """It is the same step as if the job had always had that value, and not the one without the edit."""
    ledger, _ = recorded["BARE" if edit.before == BARE else "FULL"]
    found = {}
    for name, spec, number in (
        ("edited", edit.spec, 2),
        ("not edited", Spec.model_validate(edit.before), 2),
        ("always", edit.spec, 1),
    ):
        folder = tmp_path / name
        folder.mkdir()
        if number > 1:
            shutil.copy(ledger, folder)
        found[name] = plans_of(folder, spec, number, NUM_STEPS + 1)[NUM_STEPS]
    assert found["edited"] == found["always"] != found["not edited"]
