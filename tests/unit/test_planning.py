"""The next step is planned while one is trained; what is trained is what would have been without that."""

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncrl_api.job import Spec
from asyncrl_runtime.contract.broker import StreamMessage
from asyncrl_runtime.contract.messages import Group, encode
from asyncrl_runtime.simulation.virtual_time import run_virtually
from asyncrl_runtime.trainer.attempt import Attempt
from asyncrl_runtime.trainer.books import verdicts
from asyncrl_runtime.trainer.books.books import Books
from asyncrl_runtime.trainer.books.staleness import LiveGroup, assess
from asyncrl_runtime.trainer.books.tickets import Discard
from asyncrl_runtime.trainer.update.ranks import Command, Train
from asyncrl_runtime.trainer.update.step import StepOutcome
from support.fakes import FakeRanks, FakeStreams, FakeWeights
from support.jobs.attempt_parts import make_attempt_parts
from support.messages.samples import make_group, make_job

SPEC = make_job("training.batchSize=2", "training.minibatches=1", "training.maxSteps=9").spec


def plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [plain(each) for each in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


class SlowRanks(FakeRanks):
    """Takes a second for a step, in which something happens."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        super().__init__(lambda command: StepOutcome({}, ()))
        self._meanwhile = meanwhile

    async def run(self, command: Command) -> Any:
        if isinstance(command, Train):
            await asyncio.sleep(1.0)
            self._meanwhile()
        return await super().run(command)


class Scene:
    """Two steps of an attempt, with something that happens while the first is trained."""

    def __init__(self, folder: Path, meanwhile: Callable[["Scene"], None], *, ahead: bool = True) -> None:
        self.books = Books(SPEC)
        self._folder, self._ahead, self._num_steps = folder, ahead, 0
        self._meanwhile = meanwhile
        for ticket in (1, 2, 4, 5, 6):
            self.arrive(ticket)
        self.ranks = SlowRanks(self._once)
        run_virtually(self._run())

    def arrive(self, ticket: int) -> None:
        self.books.take(StreamMessage(ticket, f"rl.j.traj.{ticket}", encode(make_group(ticket))))

    def _once(self) -> None:
        self._num_steps += 1
        if self._num_steps == 1:
            self._meanwhile(self)

    async def _run(self) -> None:
        clock = asyncio.get_running_loop().time
        self._folder.mkdir()
        parts = make_attempt_parts(
            self._folder, SPEC, self.books, FakeStreams(), self.ranks, FakeWeights(), None, clock
        )
        attempt = Attempt(parts, None)
        if not self._ahead:
            self.books.foresee = lambda batch: lambda: None  # type: ignore[method-assign]
        for _ in range(2):
            batch = await attempt.next_batch()
            assert batch is not None
            await attempt.record(batch)
            await attempt.train_step(batch)
            await attempt.advance(batch)
        self.num_foreseen = attempt._planner.num_foreseen

    @property
    def plans(self) -> list[Any]:
        return [plain(command.plan) for command in self.ranks.commands if isinstance(command, Train)]

    @property
    def ledger(self) -> str:
        return (self._folder / "ledger.jsonl").read_text()


def edit(**sampling: Any) -> Callable[[Scene], None]:
    spec: Spec = SPEC.model_copy(update={"sampling": SPEC.sampling.model_copy(update=sampling)})
    return lambda scene: scene.books.use(spec)


def keep_nothing_old(scene: Scene) -> None:
    staleness = SPEC.staleness.model_copy(update={"on_exceed": "Drop"})
    scene.books.use(SPEC.model_copy(update={"staleness": staleness}))


@pytest.mark.parametrize(
    ("meanwhile", "tickets", "num_foreseen"),
    [
        (lambda scene: None, [4, 5], 1),
        (lambda scene: scene.arrive(7), [4, 5], 1),
        (lambda scene: scene.arrive(3), [3, 4], 0),
        (edit(max_new_tokens=999), [4, 5], 0),
        (keep_nothing_old, [4, 5], 1),
    ],
    ids=["nothing", "a newer ticket", "an older ticket", "another limit", "another rule of the same effect"],
)
def test_what_is_trained_is_what_would_have_been_without_planning_ahead(
    tmp_path: Path, meanwhile: Callable[[Scene], None], tickets: list[int], num_foreseen: int
) -> None:
    ahead = Scene(tmp_path / "ahead", meanwhile)
    without = Scene(tmp_path / "without", meanwhile, ahead=False)
    assert (ahead.num_foreseen, without.num_foreseen) == (num_foreseen, 0)
    assert ahead.plans == without.plans and len(ahead.plans) == 2
    assert ahead.ledger == without.ledger
    assert sorted({sample["ticket"] for sample in ahead.plans[1]["samples"]}) == tickets


def test_groups_that_are_foreseen_are_not_assessed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assessed: Counter[tuple[int, int]] = Counter()

    def counted(group: Group, version: int, *rule: Any) -> LiveGroup | Discard:
        assessed[group.ticket, version] += 1
        return assess(group, version, *rule)

    monkeypatch.setattr(verdicts, "assess", counted)
    Scene(tmp_path / "job", lambda scene: None)
    at_second_step = {ticket: count for (ticket, version), count in assessed.items() if version == 1}
    assert set(at_second_step.values()) == {1} and {4, 5} <= set(at_second_step)
