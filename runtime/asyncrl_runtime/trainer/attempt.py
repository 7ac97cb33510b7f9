"""What the lines of the training loop do: one attempt at the job, as rank 0 holds it."""

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asyncrl_api.job import Spec
from asyncrl_api.report import CheckpointReport
from asyncrl_runtime.contract.messages import (
    PolicyVersion,
    Sample,
    floats_from_bytes,
    ids_from_bytes,
)
from asyncrl_runtime.history.ledger_writer import Ledger
from asyncrl_runtime.trainer.books.books import Batch, Books, RecordedBatchLost, recorded_values
from asyncrl_runtime.trainer.books.checkpoints import CheckpointFailed, Checkpoints, Position
from asyncrl_runtime.trainer.evaluation import Evaluated
from asyncrl_runtime.trainer.metrics import Metrics
from asyncrl_runtime.trainer.seams import Examiner, Streams, TrainerRanks
from asyncrl_runtime.trainer.update import diagnostics
from asyncrl_runtime.trainer.update.packing import TrainingSample
from asyncrl_runtime.trainer.update.ranks import Export, Logprobs, Save, Stop, Train
from asyncrl_runtime.trainer.update.step import learning_rate, plan_step
from asyncrl_runtime.weights.engines import Publisher
from asyncrl_runtime.weights.fleet import Fleet

log = logging.getLogger(__name__)

FIRST_HEARTBEAT_SECONDS = 1.5
"""Every worker that lives has spoken by then."""
BOUNDARY_SECONDS = 0.25
"""While the trainer waits, how often it looks for engines that lack the weights, and for lost streams."""
FULL_SECONDS = 3.0
"""How long a batch is waited for while the stream has hardly room for it, before more is purged."""
MAX_FAILED_CHECKPOINTS = 3
"""In a row; then the job ends, since it could not be resumed where it stands."""
MISMATCH_SAMPLES = 32
"""Of an evaluation, on which engine and trainer are compared."""


class _StopRequested(Exception):
    """The job was told to stop while it waited for something."""


@dataclass(frozen=True)
class AttemptParts:
    """What an Attempt is made of."""

    attempt: int
    uid: str
    spec: Spec
    folder: Path
    books: Books
    streams: Streams
    ledger: Ledger
    ranks: TrainerRanks
    fleet: Fleet
    weights: Publisher
    checkpoints: Checkpoints
    evaluator: Examiner | None
    metrics: Metrics
    clock: Callable[[], float] = time.monotonic


class Attempt:
    """One attempt of a job. The loop in train.py calls these methods in order."""

    def __init__(self, parts: AttemptParts, restored: Position | None) -> None:
        self._parts = parts
        self._books = parts.books
        self._streams = parts.streams
        self._metrics = parts.metrics
        self._has_begun = False
        self._stopping = asyncio.Event()
        self._saved: list[Position] = [restored] if restored is not None else []
        self._num_failed_checkpoints = 0
        self._purged_behind = 0
        self._evaluation: asyncio.Task[None] | None = None
        self._first_evaluation = restored.first_evaluation if restored is not None else None
        self._step_began = parts.clock()
        self._waited = 0.0
        self._publish_seconds = 0.0

    @property
    def version(self) -> int:
        """Of the policy: steps behind the published weights."""
        return self._books.version

    @property
    def max_steps(self) -> int:
        """As it is now: it may grow while the job runs."""
        return self._books.spec.training.max_steps

    def request_stop(self) -> None:
        """Have `next_batch` return None at the next boundary."""
        self._stopping.set()
        self._books.news.ring()

    # -- weights

    async def publish_weights(self) -> None:
        """Bring every engine that lives and is willing to the policy's version.

        While recorded steps are repeated nothing is published: engines hold a later version already.
        """
        if self._books.is_repeating:
            return
        # A trainer that has just begun does not know yet who is there.
        await asyncio.sleep(max(0.0, FIRST_HEARTBEAT_SECONDS - self._parts.fleet.seconds_heard()))
        await self._publish(self.version)

    async def _publish(self, version: int) -> None:
        began = self._parts.clock()
        label = PolicyVersion(self._parts.attempt, version)
        interrupt = self._books.spec.rollout.interrupt
        await self._parts.weights.publish(label, interrupt)
        await self._streams.announce(label)
        self._publish_seconds = self._parts.clock() - began

    async def _boundary(self) -> None:
        """What is done wherever the trainer waits: mend lost streams, give late engines their weights.

        Raises:
            _StopRequested: an evaluation is not waited for then.
        """
        if self._stopping.is_set():
            raise _StopRequested
        if self._streams.lost:
            await self._mend_streams()
        version = PolicyVersion(self._parts.attempt, self.version)
        if not self._books.is_repeating and self._parts.weights.behind(version):
            await self.publish_weights()

    # -- batches

    async def next_batch(self) -> Batch | None:
        """Wait for the next batch; None if the job is to stop."""
        began = self._parts.clock()
        while not self._stopping.is_set():
            try:
                batch = self._books.next_batch()
            except RecordedBatchLost as error:
                log.warning("%s", error)
                self._cut()
                continue
            if not self._books.is_repeating and not self._has_begun:
                self._parts.ledger.begin(self.version)
                self._books.begin(self._parts.attempt)
                self._has_begun = True
                await self.publish_weights()
                batch = self._books.next_batch()
            if batch is not None:
                self._waited = self._parts.clock() - began
                return batch
            self._metrics.update(state="WaitingForBatch", queue_depth=len(self._books.inbox.arrived))
            with contextlib.suppress(_StopRequested):
                await self._boundary()
            if self._streams.is_nearly_full:
                await self._make_room(self._parts.clock() - began)
            if missing := await self._missing_for_good():
                log.warning(
                    "trajectories of tickets %s are lost: their step cannot be repeated", missing[:20]
                )
                self._cut()
            await self._books.news.wait(BOUNDARY_SECONDS)
        return None

    async def _missing_for_good(self) -> list[int]:
        """Return the tickets of the next recorded step that the stream does not hold."""
        missing = self._books.missing_of_recorded
        if not missing() or not await self._streams.has_read_everything():
            return []
        return missing()  # anew: they may have been read while we asked

    def _cut(self) -> None:
        """The surviving history ends here; go on with new steps from this version."""
        self._parts.ledger.cut(self.version)
        self._parts.checkpoints.drop_after(self.version)
        self._books.cut()
        self._streams.requeue()  # tickets of the steps given up are queued no more

    async def _mend_streams(self) -> None:
        """Make lost streams again, between two checkpoints: what was trained stays trained."""
        if self._has_begun:
            await self._checkpoint()
        await self._streams.mend(self._cut)
        await self._checkpoint()

    # -- steps

    def record(self, batch: Batch) -> None:
        """Write the step into the ledger, unless it is there already."""
        if not batch.is_repeat:
            live = recorded_values(self._books.spec)
            self._parts.ledger.record_step(batch.version, batch.tickets, batch.discards, live)
        self._books.close(batch)

    async def train_step(self, batch: Batch) -> dict[str, float]:
        """Update the policy on every rank."""
        spec = self._parts.spec
        self._metrics.update(state="Training", queue_depth=len(self._books.inbox.arrived))
        plan = plan_step(
            batch.groups,
            algorithm=spec.algorithm,
            max_new_tokens=self._books.spec.sampling.max_new_tokens,
            num_minibatches=min(spec.training.minibatches, len(batch.groups)),
            tokens_per_micro_batch=spec.training.tokens_per_micro_batch,
            learning_rate=learning_rate(
                spec.training.schedule, batch.version, batch.max_steps, spec.training.learning_rate
            ),
        )
        report: dict[str, float] = await self._parts.ranks.run(Train(plan))
        return report

    async def advance(self, batch: Batch) -> None:
        """Offer the new version to the engines; then the gate moves, so no new ticket meets old weights."""
        if not batch.is_repeat:
            await self._publish(batch.version + 1)
        self._books.advance(batch)

    def log_metrics(self, batch: Batch, report: dict[str, float]) -> None:
        """Write the step's line."""
        now = self._parts.clock()
        seconds, self._step_began = now - self._step_began, now
        version = PolicyVersion(self._parts.attempt, self.version)
        counters = self._books.counters
        self._metrics.update(max_steps=self.max_steps, num_engines=self._parts.weights.num_engines(version))
        self._metrics.log_step(
            {
                "step": batch.version + 1,
                "attempt": self._parts.attempt,
                **report,
                "step_seconds": seconds,
                "wait_seconds": self._waited,
                "publish_seconds": self._publish_seconds,
                "num_engines": self._metrics.report.num_engines,
                "queue_depth": len(self._books.inbox.arrived),
                "num_open_tickets": self._books.num_open,
                "discards": {reason: len(tickets) for reason, tickets in batch.discards.items()},
                "dropped_samples": counters.num_dropped_samples,
                "masked_tokens": counters.num_masked_tokens,
                "failed_samples": counters.num_failed_samples,
                "is_repeat": batch.is_repeat,
            }
        )

    # -- checkpoints

    async def checkpoint_if_due(self) -> None:
        """Make a checkpoint every so many steps, and at once when the trajectory stream fills up."""
        spec = self._books.spec.checkpoint
        if self._streams.is_nearly_full:
            log.warning("the trajectory stream is nearly full: checkpoint, to purge behind it")
            await self._checkpoint()
        elif self.version % spec.every_steps == 0:
            await self._checkpoint()
        if spec.export_every_steps and self.version % spec.export_every_steps == 0:
            await self._export(self._parts.folder / "export" / f"step-{self.version:06d}")

    async def _make_room(self, waited_seconds: float) -> None:
        """Keep a stream that fills up from ending the job: with no room for a batch there is no next step.

        What fills it may be needed by the older of the two restorable checkpoints alone. That one is given up
        then: restored nevertheless, it would find its batches lost, and the history would be cut there.
        """
        if not self._saved or self._saved[-1].version < self.version:
            log.warning("the trajectory stream is nearly full: checkpoint, to purge behind it")
            await self._checkpoint()
        elif waited_seconds > FULL_SECONDS and self._saved[-1].stream_sequence > self._purged_behind:
            log.warning(
                "the trajectory stream is full, and no batch can form: purged behind the newest checkpoint, "
                "so that it alone can be restored; raise spec.messaging.embedded.storage.size"
            )
            await self._purge_behind(self._saved[-1])

    async def _purge_behind(self, position: Position) -> None:
        self._purged_behind = position.stream_sequence
        await self._streams.purge_behind(position.stream_sequence)

    async def open_history(self) -> None:
        """At a job's very start: a checkpoint of the books alone, so that the streams' identity is known."""
        await self._checkpoint()

    async def _checkpoint(self) -> None:
        position = self._position()

        async def save_policy(folder: Path) -> None:
            await self._parts.ranks.run(Save(folder))

        try:
            checkpoint = await self._parts.checkpoints.save(
                position, save_policy if position.version > 0 else None
            )
        except CheckpointFailed as error:
            self._num_failed_checkpoints += 1
            log.error("%s (%d in a row)", error, self._num_failed_checkpoints)
            self._metrics.update(message=str(error))
            if self._num_failed_checkpoints >= MAX_FAILED_CHECKPOINTS:
                raise
            return
        self._num_failed_checkpoints = 0
        self._saved = [*[p for p in self._saved if p.version < position.version], position][-2:]
        self._parts.checkpoints.prune(self._books.spec.checkpoint.keep)
        await self._purge_behind(self._saved[0])
        self._metrics.update(
            last_checkpoint=CheckpointReport(
                step=self.version,
                path=str(checkpoint.folder),
                time=datetime.now(UTC).isoformat(timespec="seconds"),
            )
        )

    def _position(self) -> Position:
        return Position(
            uid=self._parts.uid,
            version=self.version,
            began=dict(self._books.began),
            book=self._books.book.record(),
            stream_sequence=self._books.inbox.position,
            trajectory_stream=self._streams.identity,
            origin=origin_of(self._parts.spec),
            first_evaluation=self._first_evaluation,
        )

    async def _export(self, folder: Path) -> None:
        """Write a Hugging Face folder, complete or not at all."""
        scratch = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        await self._parts.ranks.run(Export(scratch))
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)

    # -- evaluation

    async def evaluate_first(self) -> None:
        """Measure the policy before its first step, while the trainer waits; once in a job's life.

        Where recorded steps are to be repeated it is too late: engines have a later policy, or none, which
        they get after that.
        """
        is_late = self.version > 0 or self._books.is_repeating
        if self._parts.evaluator is None or self._first_evaluation is not None or is_late:
            return
        self._metrics.update(state="Evaluating")
        evaluated = None
        with contextlib.suppress(_StopRequested):
            evaluated = await self._evaluate(self._boundary, trainer_waits=True)
        if evaluated is not None:
            self._first_evaluation = evaluated.report.model_dump(by_alias=True)
            self._metrics.update(first_evaluation=evaluated.report)
            await self._checkpoint()  # of the books: the next attempt knows of it
        self._step_began = self._parts.clock()

    def evaluate_if_due(self) -> None:
        """Begin an evaluation beside the training; the last one is made by `finish`."""
        spec = self._books.spec.evaluation
        if spec is None or self._parts.evaluator is None or self.version >= self.max_steps:
            return
        is_running = self._evaluation is not None and not self._evaluation.done()
        if self.version % spec.every_steps == 0 and not self._books.is_repeating:
            if is_running:
                log.info("step %d: the evaluation before still runs, this one is left out", self.version)
                return
            self._evaluation = asyncio.create_task(self._evaluate_beside(), name="evaluation")

    async def _evaluate_beside(self) -> None:
        async def tick() -> None:
            """The training loop itself sees to its boundaries."""

        await self._evaluate(tick, trainer_waits=False)

    async def _evaluate(
        self, tick: Callable[[], Awaitable[None]], *, trainer_waits: bool
    ) -> Evaluated | None:
        evaluator = self._parts.evaluator
        assert evaluator is not None
        evaluated = await evaluator.run(self.version, self._books.spec.sampling.max_new_tokens, tick)
        if evaluated is None:
            return None
        report = evaluated.report
        log.info("step %d: held-out accuracy %.3f of %d", report.step, report.accuracy, report.num_prompts)
        mismatch = {}
        # Beside training the trainer's weights may be those of the next version already.
        if trainer_waits and report.lowest_version == report.highest_version == self.version:
            mismatch = await self._mismatch(evaluated.samples)
        self._metrics.log_evaluation({**report.model_dump(by_alias=True), **mismatch})
        self._metrics.update(last_evaluation=report)
        return evaluated

    async def _mismatch(self, samples: tuple[Sample, ...]) -> dict[str, float]:
        """Compare engine and trainer on tokens of the version that the trainer holds."""
        chosen = tuple(_as_training_sample(sample) for sample in samples[:MISMATCH_SAMPLES])
        logprobs = await self._parts.ranks.run(Logprobs(chosen))
        sums = [
            diagnostics.mismatch_sums(new, _behavior(sample, new), new.new_zeros(len(new)))
            for sample, new in zip(chosen, logprobs, strict=True)
        ]
        return diagnostics.report_mismatch(torch.stack(sums).sum(0)) if sums else {}

    async def _end_evaluation_beside(self) -> None:
        """Wait for an evaluation that began beside training: from now on its boundaries are made here.

        Raises:
            _StopRequested: it is broken off then.
        """
        if self._evaluation is None:
            return
        try:
            while not self._evaluation.done():
                await self._boundary()
                await asyncio.wait({self._evaluation}, timeout=BOUNDARY_SECONDS)
            self._evaluation.result()
        finally:
            self._evaluation.cancel()

    # -- the end

    async def stop(self) -> None:
        """Told to stop: a checkpoint, so that the next attempt goes on with the next step."""
        if self._evaluation is not None:
            self._evaluation.cancel()
        if not self._saved or self._saved[-1].version < self.version:
            await self._checkpoint()
        await self._parts.weights.leave()
        await self._parts.ranks.run(Stop())
        self._metrics.update(state="Stopped", message=f"stopped at step {self.version}")

    async def finish(self) -> None:
        """The last step is trained: measure, save, export, close the ledger."""
        if self._parts.evaluator is not None:
            self._metrics.update(state="Evaluating")
            with contextlib.suppress(_StopRequested):
                await self._end_evaluation_beside()
                await self._evaluate(self._boundary, trainer_waits=True)
        self._metrics.update(state="Exporting")
        if not self._saved or self._saved[-1].version < self.version:
            await self._checkpoint()
        export = self._parts.folder / "export" / "final"
        await self._export(export)
        self._parts.ledger.end(self._books.last_ticket, self._books.left_over())
        await self._parts.weights.leave()
        await self._parts.ranks.run(Stop())
        self._metrics.update(state="Finished", export=str(export), remaining_seconds=0.0)


def origin_of(spec: Spec) -> dict[str, Any]:
    """Return the immutable fields that policy and tickets come from; a checkpoint of others is refused."""
    model = spec.model.model_dump(by_alias=True, include={"source", "revision", "dtype"})
    dataset = spec.dataset.model_dump(
        by_alias=True, include={"source", "split", "parameters", "prompt_field", "seed"}
    )
    return {"model": model, "dataset": dataset, "training": {"seed": spec.training.seed}}


def _as_training_sample(sample: Sample) -> TrainingSample:
    mask = sample.mask()
    return TrainingSample(
        ticket=0,
        index=sample.index,
        prompt_ids=ids_from_bytes(sample.prompt_ids),
        response_ids=ids_from_bytes(sample.response_ids),
        behavior_logprobs=floats_from_bytes(sample.behavior_logprobs),
        sampled_mask=mask,
        loss_mask=mask,
        advantage=0.0,
        temperature=1.0,  # a greedy sample's log-probs are those of the plain logits
        staleness=np.zeros(sample.num_tokens, dtype=np.int32),
    )


def _behavior(sample: TrainingSample, like: torch.Tensor) -> torch.Tensor:
    return like.new_tensor(sample.behavior_logprobs[sample.sampled_mask])
