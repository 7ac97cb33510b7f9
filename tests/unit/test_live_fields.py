"""Every field marked L is edited on a running job, and the new value is in force without a restart.

A field is in one of the tables: those that the operator acts on, and those that trainer or worker act on.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest

from asyncrl_api.job import Spec
from asyncrl_api.marks import merge, split_live, tree
from asyncrl_api.parsing import parse_spec
from asyncrl_api.run_config import RunningSpec
from asyncrl_runtime.contract.broker import StreamMessage
from asyncrl_runtime.contract.messages import Group, Message, PolicyVersion, Ticket, Tombstone, decode, encode
from asyncrl_runtime.rollout.engine_api import EngineLoad
from asyncrl_runtime.rollout.weight_updates import WeightUpdates
from asyncrl_runtime.rollout.worker import Worker
from asyncrl_runtime.trainer.attempt import Attempt
from asyncrl_runtime.trainer.books.books import Books
from asyncrl_runtime.trainer.books.tickets import EndlessDiscards
from asyncrl_runtime.trainer.checkpointing import Checkpointing
from asyncrl_runtime.trainer.evaluation_schedule import EvaluationSchedule
from asyncrl_runtime.trainer.patience import Patience
from asyncrl_runtime.trainer.side_tasks import SideTasks
from asyncrl_runtime.trainer.step_faults import NumbersUnusable
from asyncrl_runtime.trainer.update.ranks import Export, Save
from asyncrl_runtime.weights.engines import Published
from support.cluster.model_cluster import SMALL, ModelCluster
from support.fakes import (
    FakeEvaluator,
    FakeRanks,
    FakeStreams,
    FakeWeights,
    UpdatableEngine,
    run_in_virtual_time,
)
from support.jobs.attempt_parts import make_attempt_parts
from support.messages.samples import make_sample

LIVE = {node.path for top in tree(Spec) for node in top.walk() if not node.children and node.mark == "L"}


class Case(NamedTuple):
    """A field, its value at first, the one that it is given, and what is looked at."""

    before: Any
    after: Any
    look: Callable[..., Any]


# -- the operator


def shows(cluster: ModelCluster) -> Any:
    """What a job comes to when nothing happens."""
    cluster.run_until_still()
    split = cluster.status.split
    return cluster.phase, split and (split.trainer, split.rollout, split.reason)


def first_split(cluster: ModelCluster) -> Any:
    """How the GPUs are divided when they have to be divided anew."""
    cluster.status = cluster.status.model_copy(update={"split": None})
    return shows(cluster)[1]


def starved(cluster: ModelCluster) -> Any:
    """How the GPUs are divided after a while in which the trainer waited."""
    for _ in range(8):
        cluster.now += 10
        cluster.reports(wait_share=0.6, rollout_load=1.0)
        cluster.run_until_still()
    return shows(cluster)


def after(
    seconds: float, happens: Callable[[ModelCluster], None] | None = None
) -> Callable[[ModelCluster], Any]:
    """What a job is so many seconds after something has happened."""

    def look(cluster: ModelCluster) -> Any:
        if happens is not None:
            happens(cluster)
            cluster.pass_once()
            cluster.settle()
        cluster.now += seconds
        cluster.pass_once()
        cluster.settle()
        attempt = cluster.status.attempt
        return (
            *(cluster.phase, cluster.condition("Failed"), cluster.condition("Degraded")),
            attempt and (attempt.number, attempt.next_retry_time),
            *(cluster.has_children, sorted(cluster.pods), sorted(cluster.jobs.values(), key=str)),
        )

    return look


def exits(code: int) -> Callable[[ModelCluster], None]:
    return lambda cluster: cluster.trainer_exits(code)


def finishes(cluster: ModelCluster) -> None:
    cluster.trainer_exits(0, "Completed")
    cluster.run_until_still()


def loses_engines(count: int) -> Callable[[ModelCluster], None]:
    def happens(cluster: ModelCluster) -> None:
        for name in sorted(name for name in cluster.pods if "rollout" in name)[:count]:
            cluster.pods[name] = replace(cluster.pods[name], is_ready=False)

    return happens


def loses_a_node(cluster: ModelCluster) -> None:
    cluster.node_dies(cluster.pods["gsm8k-trainer-1-0"].node)


def loses_all_pods(cluster: ModelCluster) -> None:
    cluster.nodes = {}
    for name in list(cluster.pods):
        del cluster.pods[name]


def stands_still(cluster: ModelCluster) -> None:
    cluster.reports(seconds_without_progress=100.0)


def rolls(cluster: ModelCluster) -> Any:
    """How many engines go in each pass."""
    cluster.edit(rollout={"engine": {"args": ["--x"]}})
    waves = []
    for _ in range(3):
        waves.append(len(cluster.pass_once().deletions))
        cluster.settle()
    return waves


def retries(cluster: ModelCluster) -> Any:
    """When the attempts after the first failures are to begin."""
    times = set()
    for _ in range(3):
        cluster.trainer_exits(1)
        for _ in range(5):
            cluster.pass_once()
            cluster.settle()
            assert cluster.status.attempt is not None
            times.add(cluster.status.attempt.next_retry_time)
        cluster.run_until_still()
    return times


MANUAL = {"gpuBudget": {"mode": "Manual", "split": {"trainer": 2, "rollout": 6}}}
OPERATOR: dict[str, Case] = {
    "gpuBudget.total": Case(8, 12, shows),
    "gpuBudget.mode": Case("Auto", "Manual", shows),
    "gpuBudget.split.rollout": Case(6, 4, shows),
    "gpuBudget.auto.initialRolloutPercent": Case(75, 50, first_split),
    "gpuBudget.auto.cooldownSeconds": Case(100_000, 10, starved),
    "gpuBudget.auto.trainerResize": Case("AtCheckpoint", "Never", starved),
    "rollout.minReplicas": Case(1, 7, shows),
    "rollout.maxReplicas": Case(64, 2, shows),
    "rollout.update.maxUnavailablePercent": Case(20, 60, rolls),
    "suspend": Case(False, True, shows),
    "activeDeadlineSeconds": Case(0, 10, after(11)),
    "pendingDeadlineSeconds": Case(0, 10, after(11, loses_all_pods)),
    "ttlSecondsAfterFinished": Case(100, 10, after(11, finishes)),
    "failurePolicy.trainer.maxRestarts": Case(3, 0, after(0, exits(1))),
    "failurePolicy.trainer.maxDisruptions": Case(50, 0, after(0, loses_a_node)),
    "failurePolicy.trainer.backoffSeconds": Case(10, 77, retries),
    "failurePolicy.trainer.maxBackoffSeconds": Case(600, 1, retries),
    "failurePolicy.trainer.hangSeconds": Case(0, 60, after(0, stands_still)),
    "failurePolicy.trainer.fatalExitCodes": Case([65], [1], after(0, exits(1))),
    "failurePolicy.rollout.minAvailablePercent": Case(25, 90, after(0, loses_engines(2))),
    "failurePolicy.rollout.belowMinimumSeconds": Case(900, 10, after(11, loses_engines(6))),
    "failurePolicy.rollout.onBelowMinimum": Case("Fail", "Continue", after(901, loses_engines(6))),
    "failurePolicy.deadNodeForceDeleteSeconds": Case(300, 10, after(11, loses_a_node)),
    "failurePolicy.retainPodsOnFailure": Case(True, False, after(0, exits(65))),
}


@pytest.mark.parametrize("path", OPERATOR)
def test_the_operator_goes_by_the_new_value(path: str) -> None:
    case = OPERATOR[path]
    values = put_all(merge(SMALL, MANUAL if "split" in path or "mode" in path else {}), path, case.before)
    if path == "gpuBudget.auto.trainerResize":
        values = merge(values, {"gpuBudget": {"auto": {"cooldownSeconds": 10}}})
    seen = []
    for value in (case.before, case.after):
        cluster = ModelCluster(parse_spec(values))
        cluster.run_until_still()
        assert cluster.phase == "Running"
        cluster.replace(parse_spec(put_all(values, path, value)))
        seen.append(case.look(cluster))
    assert seen[0] != seen[1]


def put_all(values: Any, path: str, value: Any) -> dict[str, Any]:
    """Return a copy with a value at a path, whose blocks need not be there."""
    *blocks, name = path.split(".")
    nested: Any = {name: value}
    for block in reversed(blocks):
        nested = {block: nested}
    return merge(values, nested)


# -- trainer and worker

BASE: dict[str, Any] = merge(
    SMALL,
    {
        "training": {"batchSize": 1, "minibatches": 1, "maxSteps": 1},
        "sampling": {"groupSize": 2},
        "staleness": {"maxVersions": 1},
        "evaluation": {"source": "file:///e"},
    },
)


class Trainer:
    """A trainer that runs, and takes its live fields from their file."""

    def __init__(self, folder: Path, began: Spec) -> None:
        self.folder = folder
        self.now = 9.0
        self.books = Books(began)
        self.live_file = folder / "live.json"
        none = cast(Any, None)
        self.side_tasks = SideTasks(
            none, none, self.books, none, [{"question": "q"}], RunningSpec(began), self.live_file, lambda: 0.0
        )
        self.ranks = FakeRanks(write)
        self.weights = Publications()
        self.evaluator = FakeEvaluator(None)
        self.parts = make_attempt_parts(
            folder,
            began,
            self.books,
            FakeStreams(),
            self.ranks,
            self.weights,
            self.evaluator,
            lambda: self.now,
        )

    def takes_over(self, spec: Spec) -> None:
        self.live_file.write_text(json.dumps(split_live(spec)[0]))
        assert self.side_tasks.read_live_values()

    def reaches(self, version: int) -> None:
        self.books._version = self.books._published = version

    def take(self, *messages: Message) -> None:
        for message in messages:
            ticket = cast(Any, message).ticket
            self.books.take(StreamMessage(ticket, f"rl.j.traj.{ticket}", encode(message)))


class Publications(FakeWeights):
    def __init__(self) -> None:
        super().__init__()
        self.interrupts: list[str] = []

    async def publish(self, version: PolicyVersion, interrupt: str) -> Published:
        self.interrupts.append(interrupt)
        return await super().publish(version, interrupt)


def write(command: object) -> None:
    if isinstance(command, Save | Export):
        command.folder.mkdir(parents=True)


def group(ticket: int, rewards: Sequence[float] = (0.0, 1.0)) -> Group:
    samples = tuple(make_sample(index, reward=reward) for index, reward in enumerate(rewards))
    return Group(ticket=ticket, group_size=2, samples=samples)


def ticket_of(trainer: Trainer) -> Any:
    ticket = decode(trainer.side_tasks._ticket(1), Ticket)
    return ticket.max_new_tokens, ticket.temperature


def uniform(trainer: Trainer) -> Any:
    trainer.take(group(1, (1.0, 1.0)))
    return trainer.books.is_closed(1)


def discards(trainer: Trainer) -> Any:
    trainer.take(Tombstone(ticket=1, reason="generation_error"))
    try:
        return trainer.books.next_batch()
    except EndlessDiscards as error:
        return str(error)


def limit(trainer: Trainer) -> Any:
    return trainer.books.limit


def third_batch(trainer: Trainer) -> Any:
    """The tickets of a batch at version 3, whose groups were sampled at version 0."""
    trainer.reaches(3)
    trainer.take(group(1), group(2))
    batch = trainer.books.next_batch()
    return batch and batch.tickets


def batch(trainer: Trainer) -> Any:
    trainer.take(group(1), group(2))
    found = trainer.books.next_batch()
    assert found is not None
    return found.tickets


def checkpointing_of(trainer: Trainer) -> Checkpointing:
    return Checkpointing(trainer.parts, None, Patience(lambda message: None, asyncio.Event()))


async def at_once() -> None:
    pass


def evaluations(trainer: Trainer) -> Any:
    async def look() -> int:
        trainer.reaches(2)
        trainer.evaluator.may_end = lambda: False
        schedule = EvaluationSchedule(trainer.parts, checkpointing_of(trainer))
        schedule.begin_if_due(at_once)
        await asyncio.sleep(0)
        running = trainer.evaluator.num_running
        schedule.cancel()
        return running

    return run_in_virtual_time(look())


def interrupts(trainer: Trainer) -> Any:
    run_in_virtual_time(Attempt(trainer.parts, None).publish_weights())
    return trainer.weights.interrupts


def files(trainer: Trainer) -> Any:
    """The checkpoints and exports of the first versions."""
    checkpointing = checkpointing_of(trainer)

    async def run() -> None:
        for version in range(1, 7):
            trainer.reaches(version)
            trainer.now += 100
            await checkpointing.save_if_due()

    run_in_virtual_time(run())
    return sorted(
        path.name for kind in ("checkpoints", "export") for path in (trainer.folder / kind).glob("*")
    )


def skips(trainer: Trainer) -> Any:
    trainer.take(group(1))
    found = trainer.books.next_batch()
    assert found is not None
    try:
        return run_in_virtual_time(Attempt(trainer.parts, None)._faults.skipped(found, (0,), 1))
    except NumbersUnusable as error:
        return str(error)


TRAINER: dict[str, Case] = {
    "sampling.maxNewTokens": Case(100, 50, ticket_of),
    "sampling.temperature": Case(1.0, 0.5, ticket_of),
    "sampling.filter": Case("None", "DropUniformGroups", uniform),
    "sampling.maxDiscardsInARow": Case(1000, 1, discards),
    "training.maxSteps": Case(1, 9, limit),
    "staleness.maxVersions": Case(1, 3, third_batch),
    "staleness.target": Case("Auto", 0, limit),
    "staleness.onExceed": Case("Mask", "Keep", third_batch),
    "staleness.order": Case("OldestFirst", "FreshestFirst", batch),
    "evaluation.everySteps": Case(20, 2, evaluations),
    "rollout.interrupt": Case("Retract", "Drain", interrupts),
    "checkpoint.everySteps": Case(50, 2, files),
    "checkpoint.everySeconds": Case(1000, 250, files),
    "checkpoint.keep": Case(2, 4, files),
    "checkpoint.exportEverySteps": Case(0, 3, files),
    "failurePolicy.trainer.maxSkippedUpdates": Case(10, 0, skips),
}
WITH: dict[str, dict[str, Any]] = {
    "staleness.maxVersions": {"training": {"maxSteps": 9}},
    "staleness.target": {"training": {"maxSteps": 9}},
    "staleness.onExceed": {"training": {"maxSteps": 9}},
    "evaluation.everySteps": {"training": {"maxSteps": 9}},
    "checkpoint.keep": {"checkpoint": {"everySteps": 1}},
}
"""The other values that a case needs."""


@pytest.mark.parametrize("path", TRAINER)
def test_the_trainer_goes_by_the_new_value(tmp_path: Path, path: str) -> None:
    case = TRAINER[path]
    values = put_all(merge(BASE, WITH.get(path, {})), path, case.before)
    seen = []
    for value in (case.before, case.after):
        folder = tmp_path / str(value)
        folder.mkdir()
        trainer = Trainer(folder, parse_spec(values))
        trainer.takes_over(parse_spec(put_all(values, path, value)))
        seen.append(case.look(trainer))
    assert seen[0] != seen[1]


def test_a_worker_goes_by_the_new_value() -> None:
    """Of rollout.maxConcurrency, the one field that concerns it alone."""
    none = cast(Any, None)
    engine = cast(Any, UpdatableEngine())
    worker = Worker("w", parse_spec(BASE), none, engine, WeightUpdates, none, none, none, lambda: 0.0)
    now = put_all(BASE, "rollout.maxConcurrency", 6)
    worker._apply("live", json.dumps(split_live(parse_spec(now))[0]).encode())
    for _ in range(2):
        worker._limit.observe(EngineLoad(0.0, 0, 0, 0), 0)
    assert worker._limit.limit == 6


def test_every_live_field_is_tried() -> None:
    assert OPERATOR.keys() | TRAINER.keys() | {"rollout.maxConcurrency"} == LIVE
