"""Puts the whole runtime together in one process and one virtual event loop.

What decides is the product's own: the training loop, books, side tasks, publisher, checkpoints, workers,
their monitors and updates. Emulated are engines, the policy's arithmetic, the collective, and the broker.
"""

import asyncio
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from asyncrl_api.base import parse_quantity
from asyncrl_api.job import Spec
from asyncrl_api.names import JobNames
from asyncrl_api.report import Report
from asyncrl_api.run_config import RunningSpec, live_values
from asyncrl_runtime.emulation.decode_batch import Totals
from asyncrl_runtime.emulation.device import DeviceModel
from asyncrl_runtime.emulation.emulated_group import EmulatedGroups
from asyncrl_runtime.emulation.emulated_server import EmulatedServer, Pace
from asyncrl_runtime.history.ledger_writer import Ledger
from asyncrl_runtime.rollout.prompts import PromptRenderer
from asyncrl_runtime.rollout.rewards.scorer import Scorer
from asyncrl_runtime.rollout.weight_updates import WeightUpdates
from asyncrl_runtime.rollout.worker import Worker
from asyncrl_runtime.rollout.workflows import make_workflow
from asyncrl_runtime.simulation.engine import EmulatedEngine
from asyncrl_runtime.simulation.memory_broker import MemoryBroker
from asyncrl_runtime.simulation.simulated_ranks import EmulatedRanks, Trained
from asyncrl_runtime.simulation.stand_ins import (
    NUM_SPECIAL_IDS,
    VOCABULARY_SIZE,
    EmulatedReward,
    EmulatedTokenizer,
    make_rows,
)
from asyncrl_runtime.trainer.attempt import Attempt
from asyncrl_runtime.trainer.books.books import Books
from asyncrl_runtime.trainer.books.checkpoints import Checkpoints
from asyncrl_runtime.trainer.job_streams import JobStreams
from asyncrl_runtime.trainer.metrics import Metrics
from asyncrl_runtime.trainer.seams import AttemptParts
from asyncrl_runtime.trainer.side_tasks import SideTasks
from asyncrl_runtime.trainer.train import train
from asyncrl_runtime.weights.bucket import PublishedWeights
from asyncrl_runtime.weights.fleet import Fleet
from asyncrl_runtime.weights.publisher import WeightPublisher

UID = "simulated"
NAMES = JobNames.on_own_server("simulated", "job")
RESPONSE_TOKENS = 192
"""How many tokens the longest response has on the wire: each stands for several of the model's."""


@dataclass(frozen=True)
class Setting:
    """What is simulated."""

    spec: Spec
    """The job's. Its data set and reward are stood in for, and its evaluation is left out."""
    num_engines: int
    trainer_gpus: int
    warmup_steps: int
    """The steps before those that are measured, at least 1; queues fill meanwhile."""
    steps: int
    """The steps that are measured."""


@dataclass(frozen=True)
class Snapshot:
    """Everything that adds up, at the end of a step. Seconds are the model's."""

    at: float
    trained: Trained
    engines: Totals
    """Summed over the engines."""


@dataclass(frozen=True)
class SimulatedRun:
    """What a simulation has seen."""

    setting: Setting
    token_scale: int
    began: Snapshot
    ended: Snapshot
    rows: Sequence[Mapping[str, Any]]
    """The measured steps' lines of metrics.jsonl."""


def choose_token_scale(spec: Spec, model: DeviceModel) -> int:
    """Return how many of the model's tokens one token stands for: time per step is then bounded here."""
    longest = min(spec.sampling.max_new_tokens, model.responses.longest_tokens)
    return max(1, longest // RESPONSE_TOKENS)


def scaled(setting: Setting, model: DeviceModel, scale: int) -> Spec:
    """Return the spec with all numbers of tokens divided by `scale`, and without what is not simulated."""
    spec, prompt = setting.spec, math.ceil(model.responses.prompt_tokens / scale)
    response = math.ceil(min(spec.sampling.max_new_tokens, model.responses.longest_tokens) / scale)
    turns = spec.workflow.max_turns if spec.workflow.type == "MultiTurn" else 1
    context = max(math.ceil(spec.model.context_length / scale), prompt * turns + response)
    max_steps = setting.warmup_steps + setting.steps + spec.staleness.max_versions + 2
    training = {
        "max_steps": max_steps,
        "tokens_per_micro_batch": max(math.ceil(spec.training.tokens_per_micro_batch / scale), context),
    }
    return spec.model_copy(
        update={
            "model": spec.model.model_copy(update={"context_length": context}),
            "sampling": spec.sampling.model_copy(update={"max_new_tokens": response}),
            "training": spec.training.model_copy(update=training),
            "evaluation": None,
        }
    )


async def simulate(setting: Setting, model: DeviceModel, folder: Path) -> SimulatedRun:
    """Run a job in virtual time until its steps are measured; call it in a virtual event loop.

    Args:
        folder: an empty folder for ledger, metrics and checkpoints.
    """
    job = _SimulatedJob(setting, model, folder)
    await job.run()
    return job.result()


async def _here(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function at once: a thread would take real time, and virtual time would pass over it."""
    return function(*arguments)


class _StepMetrics(Metrics):
    """Metrics that tell of each step."""

    on_step: Callable[[Mapping[str, Any]], None]

    def log_step(self, values: Mapping[str, Any]) -> None:
        super().log_step(values)
        self.on_step(values)


class _SimulatedJob:
    """One job."""

    def __init__(self, setting: Setting, model: DeviceModel, folder: Path) -> None:
        self._setting = setting
        self._model = model
        self._folder = folder
        self._scale = choose_token_scale(setting.spec, model)
        self._spec = scaled(setting, model, self._scale)
        self._clock = asyncio.get_running_loop().time
        self._pace = Pace(self._clock, token_scale=self._scale)
        storage = parse_quantity(self._spec.messaging.embedded.storage.size) // self._scale
        self._broker = MemoryBroker(NAMES, storage)
        bucket_bytes = self._spec.weight_sync.bucket_megabytes * 2**20
        self._ranks = EmulatedRanks(model, setting.trainer_gpus, self._scale, bucket_bytes, self._clock)
        self._engines = [self._engine(number) for number in range(setting.num_engines)]
        self._snapshots: dict[int, Snapshot] = {}
        self._rows: list[Mapping[str, Any]] = []
        self._measured = asyncio.Event()

    def _engine(self, number: int) -> EmulatedEngine:
        server = EmulatedServer(self._model, self._pace, VOCABULARY_SIZE, NUM_SPECIAL_IDS)
        return EmulatedEngine(f"engine {number}", server, self._model, self._pace)

    def result(self) -> SimulatedRun:
        setting = self._setting
        first, last = setting.warmup_steps, setting.warmup_steps + setting.steps
        return SimulatedRun(
            setting, self._scale, self._snapshots[first], self._snapshots[last], self._rows[first:last]
        )

    async def run(self) -> None:
        """Run everything until the last step that is measured; whatever ends before ends the simulation."""
        attempt, side_tasks, end, metrics = await self._open_trainer()
        loops = {
            **side_tasks.loops(),
            **{f"worker {number}": worker.run() for number, worker in enumerate(self._workers())},
            "lease": end.keep_lease(),
            "report": metrics.keep_renewed(),
            "train": train(attempt),
            "measured": self._measured.wait(),
        }
        tasks = [asyncio.create_task(loop, name=name) for name, loop in loops.items()]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if not self._measured.is_set():
                raise RuntimeError(
                    f"{', '.join(task.get_name() for task in done)}: ended before the last step"
                )
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _open_trainer(self) -> tuple[Attempt, SideTasks, Any, Metrics]:
        """Make what rank 0 of the trainer is made of, as trainer/assemble.py does."""
        spec, folder, clock = self._spec, self._folder, self._clock
        live_file = folder / "live.json"
        live_file.write_text(json.dumps(live_values(spec)))
        ledger = Ledger(folder / "ledger.jsonl", attempt=1)
        ledger.claim(UID)
        end = self._broker.trainer_end()
        await end.take_lease(1, "trainer")
        fleet = Fleet(clock)
        await end.hear_heartbeats(fleet.heard, fleet.was_deaf)
        books = Books(spec, attempt=1, vocabulary_size=VOCABULARY_SIZE)
        running = RunningSpec(spec)
        streams = JobStreams(end, books, running.live_values())
        rows = make_rows(spec.dataset.prompt_field, spec.dataset.answer_field)
        side_tasks = SideTasks(end, streams, books, fleet, rows, running, live_file, clock)
        side_tasks.read_live_values()
        await streams.open(None)
        report = Report(attempt=1, step=0, max_steps=spec.training.max_steps, state="Starting")
        metrics = _StepMetrics(folder, folder / "report.json", report)
        metrics.on_step = self._on_step
        parts = AttemptParts(
            attempt=1,
            uid=UID,
            spec=spec,
            folder=folder,
            books=books,
            streams=streams,
            ledger=ledger,
            ranks=self._ranks,
            fleet=fleet,
            weights=self._publisher(end, fleet),
            checkpoints=Checkpoints(folder, UID, _here),
            examiner=None,
            metrics=metrics,
            clock=clock,
            in_thread=_here,
        )
        attempt = Attempt(parts, None)
        await attempt.open_history()
        return attempt, side_tasks, end, metrics

    def _publisher(self, end: Any, fleet: Fleet) -> WeightPublisher:
        return WeightPublisher(
            end,
            NAMES,
            fleet,
            PublishedWeights(self._ranks.copy.layout, self._ranks.gather),
            EmulatedGroups(self._model, self._pace),
            attempt=1,
            host="127.0.0.1",
            backend="gloo",
            model_bytes=self._ranks.policy.num_bytes,
            timeout_seconds=self._spec.weight_sync.timeout_seconds,
        )

    def _workers(self) -> list[Worker]:
        spec = self._spec
        prompt_tokens = math.ceil(self._model.responses.prompt_tokens / self._scale)
        tokenizer = EmulatedTokenizer(prompt_tokens)
        renderer = PromptRenderer(tokenizer, spec.dataset.prompt_field, spec.workflow.system_prompt)
        reward = EmulatedReward(self._model.reward.seconds, spec.training.seed)
        scorer = Scorer(reward, max_attempts=spec.reward.max_attempts)
        workflow, workers = make_workflow(spec.workflow), []
        for number, engine in enumerate(self._engines):
            name = f"rollout-{number:04d}"
            end = self._broker.worker_end(name)
            workers.append(
                Worker(name, spec, end, engine, WeightUpdates, renderer, workflow, scorer, self._clock)
            )
        return workers

    def _on_step(self, values: Mapping[str, Any]) -> None:
        self._rows.append(values)
        self._snapshots[values["step"]] = self._snapshot()
        if len(self._rows) == self._setting.warmup_steps + self._setting.steps:
            self._measured.set()

    def _snapshot(self) -> Snapshot:
        totals = [engine.server.totals for engine in self._engines]
        names = [each.name for each in fields(Totals)]
        summed = Totals(**{name: sum(getattr(each, name) for each in totals) for name in names})
        trained = self._ranks.trained
        copy = Trained(**{**vars(trained), "staleness": dict(trained.staleness)})
        return Snapshot(self._clock(), copy, summed)
