"""One attempt at the job, as rank 0 sees it: what each line of the training loop does."""

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Coroutine
from dataclasses import asdict, replace
from typing import Any, TypeVar

from asyncrl_api.report import MASTERED_STATE
from asyncrl_runtime.contract.messages import Heartbeat, PolicyVersion
from asyncrl_runtime.trainer.books.books import Batch, RecordedBatchLost, recorded_values
from asyncrl_runtime.trainer.books.checkpoints import Position
from asyncrl_runtime.trainer.books.step_values import StepValues
from asyncrl_runtime.trainer.checkpointing import Checkpointing
from asyncrl_runtime.trainer.evaluation_schedule import EvaluationSchedule
from asyncrl_runtime.trainer.patience import Patience
from asyncrl_runtime.trainer.planning import Planner
from asyncrl_runtime.trainer.publishing import Publishing
from asyncrl_runtime.trainer.seams import AttemptParts
from asyncrl_runtime.trainer.step_faults import StepFaults
from asyncrl_runtime.trainer.stopping import LEAVE_SECONDS, StepTimes, fits_into_grace
from asyncrl_runtime.trainer.update.failures import StepFailed, StepStopped
from asyncrl_runtime.trainer.update.ranks import Stop, Train
from asyncrl_runtime.trainer.update.step import StepOutcome, StepPlan

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_HEARTBEAT_SECONDS = 1.5
"""How long a new trainer listens before it first publishes: every living worker has spoken by then."""
LOOK_SECONDS = 5.0
"""How long a trainer that waits goes without looking at what has changed, if nothing rings for it."""
ASSESS_TOGETHER = 32
"""How many groups are assessed in one turn of the event loop: each takes up to half a millisecond."""
TELL_SECONDS = 1.0
"""How often a trainer that waits says in its report how many groups have come."""


class _StopRequested(Exception):
    """The job was told to stop while the trainer was waiting for something."""


class Attempt:
    """One attempt of a job. The loop in train.py calls these methods in order."""

    def __init__(self, parts: AttemptParts, restored: Position | None) -> None:
        self._parts = parts
        self._books = parts.books
        parts.fleet.listener = self._heard
        self._streams = parts.streams
        self._metrics = parts.metrics
        self._values = StepValues.of(parts.spec)
        self._has_begun = False
        self._stopping = asyncio.Event()
        self._stop_at = math.inf
        self._patience = Patience(parts.metrics.tell_disk_fault, self._stopping, parts.clock)
        self._checkpointing = Checkpointing(parts, restored, self._patience)
        self._steps = StepTimes(parts.clock)
        self._before_step: Position | None = None
        parts.ranks.must_stop = self._must_stop_step
        self._evaluations = EvaluationSchedule(parts, self._checkpointing)
        self._planner = Planner(parts.in_thread)
        self._faults = StepFaults(parts, self._write_ledger)
        self._step_began = parts.clock()
        self._num_updates = 0
        self._waited = 0.0
        self._publishing = Publishing(parts, self._while_there_is_time)
        self._told_at = -math.inf

    @property
    def version(self) -> int:
        """The trainer's version: the number of steps that were trained."""
        return self._books.version

    @property
    def max_steps(self) -> int:
        """The number of steps to train, as it is now; it may grow while the job runs."""
        return self._books.live.training.max_steps

    @property
    def has_mastered(self) -> bool:
        """Whether there is nothing left to learn: every prompt is solved, and a filter keeps none of them."""
        return bool(self._books.mastered)

    def request_stop(self) -> None:
        """Have `next_batch` return None, and a step stop that does not fit into the grace period."""
        if not self._stopping.is_set():
            grace = self._parts.spec.trainer.termination_grace_period_seconds
            self._stop_at = self._parts.clock() + grace
            log.warning("told to stop within %d s", grace)
        self._stopping.set()
        self._books.news.ring()

    # -- weights

    async def publish_weights(self) -> None:
        """Bring every living and willing engine to the policy's version.

        Nothing is published while recorded steps are repeated: the engines already hold a later version.
        """
        if self._books.is_repeating:
            return
        # A trainer that has just begun does not know yet which workers there are.
        await asyncio.sleep(max(0.0, FIRST_HEARTBEAT_SECONDS - self._parts.fleet.seconds_heard()))
        await self._publishing.offer(self.version)
        await self._publishing.settle()

    async def _while_there_is_time(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Return the result of something that a checkpoint at a stop must not have to wait for.

        It is None if it was broken off, that is when the grace has just enough left for the checkpoint.
        """
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                left = self._stop_at - self._parts.clock() - self._checkpointing.seconds - LEAVE_SECONDS
                await asyncio.wait({task}, timeout=max(0.0, left))
            if not task.done():
                log.warning("broken off, because the trainer is to stop: engines keep the weights they have")
                return None
            return task.result()
        finally:
            task.cancel()
            stop.cancel()

    def _heard(self, beat: Heartbeat) -> None:
        """Wake the training loop if an engine may lack the weights; what it lacks is looked up there."""
        has_them = beat.version == PolicyVersion(self._parts.attempt, self.version)
        if beat.engine_state == "dirty" or (beat.engine_state != "down" and not has_them):
            self._books.news.ring()

    async def _boundary(self) -> None:
        """Do what is due wherever the trainer waits: mend lost streams, bring late engines their weights.

        Raises:
            _StopRequested: the job was told to stop, so nothing is waited for any longer.
        """
        if self._stopping.is_set():
            raise _StopRequested
        if self._streams.lost:
            await self._mend_streams()
        if not self._books.is_repeating:
            await self._publishing.serve_late_engines(trainer_waits=True)

    # -- batches

    async def next_batch(self) -> Batch | None:
        """Wait for the next batch and return it; None if the job is to stop, or has mastered its prompts."""
        began = self._parts.clock()
        self._books.batch_wanted()
        while not self._stopping.is_set():
            try:
                batch = await self._form_batch()
            except RecordedBatchLost as error:
                log.warning("%s", error)
                await self._cut()
                continue
            if not self._books.is_repeating and not self._has_begun:
                await self._write_ledger(self._parts.ledger.begin, self.version, self._values.to_ledger())
                self._books.begin(self._parts.attempt)
                self._has_begun = True
                await self.publish_weights()
                batch = await self._form_batch()
            if self.has_mastered:
                log.info("step %d: %s", self.version, self._books.mastered)
                return None
            if batch is not None:
                self._waited = self._parts.clock() - began
                return batch
            self._tell_that_it_waits()
            with contextlib.suppress(_StopRequested):
                await self._boundary()
            await self._checkpointing.make_room()
            if missing := await self._missing_for_good():
                log.warning(
                    "trajectories of tickets %s are lost: their step cannot be repeated", missing[:20]
                )
                await self._cut()
                self._streams.start_over()
            await self._books.news.wait(LOOK_SECONDS)
        return None

    async def _form_batch(self) -> Batch | None:
        """See `Books.next_batch`; other tasks have their turn meanwhile."""
        while self._books.assess_some(ASSESS_TOGETHER):
            await asyncio.sleep(0)
        return self._books.next_batch()

    def _tell_that_it_waits(self) -> None:
        """Say it in the report, which is a file: not at every group that comes."""
        now = self._parts.clock()
        if self._metrics.report.state != "WaitingForBatch" or now - self._told_at >= TELL_SECONDS:
            self._told_at = now
            self._metrics.update(state="WaitingForBatch", queue_depth=len(self._books.inbox.arrived))

    async def _missing_for_good(self) -> list[int]:
        """Return the tickets of the next recorded step that the stream does not hold."""
        missing = self._books.missing_of_recorded
        if not missing() or not await self._streams.has_read_everything():
            return []
        return missing()  # looked up again: they may have been read while we asked

    async def _cut(self) -> None:
        """End the surviving history here, and go on with new steps from this version."""
        await self._write_ledger(self._parts.ledger.cut, self.version)
        await self._checkpointing.drop_after(self.version)
        self._books.cut()
        self._streams.requeue()  # the tickets of the steps given up are no longer queued

    async def _mend_streams(self) -> None:
        """Make lost streams again, with a checkpoint before and after: what was trained stays trained."""
        await self._publishing.settle()  # it announces its version in the streams
        if self._has_begun:
            await self._checkpointing.save()
        await self._streams.mend(self._cut)
        await self._checkpointing.save()

    # -- steps

    async def record(self, batch: Batch) -> None:
        """Write the step into the ledger, unless it is there already; wait for a disk that is full."""
        self._before_step = self._checkpointing.position()
        if not batch.is_repeat:
            live = recorded_values(self._books.live)
            await self._write_ledger(
                self._parts.ledger.record_step, batch.version, batch.tickets, batch.discards, live
            )
        self._books.close(batch)

    async def _write_ledger(self, write: Callable[..., None], *values: Any) -> None:
        """Write a line, apart from the event loop, and again while the disk does not take it."""

        async def once() -> None:
            await self._parts.in_thread(write, *values)

        await self._patience.insist("the ledger", once)

    def _must_stop_step(self) -> bool:
        """Whether the step under way would not be done, and saved, within the grace. Called by the ranks."""
        if not self._stopping.is_set():
            return False
        left = self._stop_at - self._parts.clock()
        return not fits_into_grace(left, self._steps.left(), self._checkpointing.seconds)

    async def train_step(self, batch: Batch) -> dict[str, float] | None:
        """Update the policy on every rank; None if the step was stopped, because the trainer is to stop."""
        self._metrics.update(state="Training", queue_depth=len(self._books.inbox.arrived))
        values = self._values.as_recorded(batch.frozen)
        tokens = self._faults.tokens_per_micro_batch(batch, values.tokens_per_micro_batch)
        try:
            plan = await self._planner.plan(batch, values, tokens)
            outcome = await self._train(batch, plan)
        except StepStopped as stopped:
            self._num_updates = stopped.num_updates
            return None
        except StepFailed as failed:
            await self._faults.failed(batch, failed, tokens)
            raise
        await self._faults.skipped(batch, outcome.skipped, plan.num_minibatches)
        return outcome.report

    async def _train(self, batch: Batch, plan: StepPlan) -> StepOutcome:
        """Have all ranks train; meanwhile report on the batch, plan the next one, and serve late engines."""
        reporting = asyncio.ensure_future(self._parts.in_thread(plan.report))
        planning = asyncio.ensure_future(self._plan_next(batch))
        try:
            with self._steps.measured():
                step = asyncio.ensure_future(self._parts.ranks.run(Train(plan)))
                if not batch.is_repeat:
                    await self._publishing.while_training(step)
                outcome: StepOutcome = await step
            return replace(outcome, report={**await reporting, **outcome.report})
        finally:
            reporting.cancel()
            planning.cancel()

    async def _plan_next(self, batch: Batch) -> None:
        """Plan the step after this one, if its batch is foreseeable; what is decided is decided later."""
        foreseen = await self._parts.in_thread(self._books.foresee(batch))
        if foreseen is None:
            return
        self._books.take_foreseen(foreseen)
        tokens = self._faults.tokens_per_micro_batch(foreseen.batch, self._values.tokens_per_micro_batch)
        values = self._values.as_recorded(foreseen.batch.frozen)
        await self._planner.plan_ahead(foreseen.batch, values, tokens)

    async def advance(self, batch: Batch) -> None:
        """Copy the new version, and begin to offer it to the engines. The gate moves when that is done."""
        await self._publishing.settle_before_next()
        self._books.advance(batch)
        if batch.is_repeat:
            self._books.publish(self.version)
        elif not self._stopping.is_set():  # the next attempt publishes first of all
            await self._publishing.offer(self.version)

    def log_metrics(self, batch: Batch, report: dict[str, float]) -> None:
        """Write the step's line of metrics.jsonl."""
        now = self._parts.clock()
        seconds, self._step_began = now - self._step_began, now
        version = PolicyVersion(self._parts.attempt, self._books.published)
        counters, update = self._books.counters, self._publishing.update_seconds
        loop = self._parts.loop_watch.take()
        self._metrics.update(
            max_steps=self.max_steps,
            num_engines=self._parts.weights.num_engines(version),
            num_refused_messages=self._books.refusals.num,
            publish_copy_seconds=self._publishing.copy_seconds,
            publish_wait_seconds=self._publishing.wait_seconds,
        )
        self._metrics.log_step(
            {
                "step": batch.version + 1,
                "attempt": self._parts.attempt,
                **report,
                "step_seconds": seconds,
                "wait_seconds": self._waited,
                "published_step": self._books.published,
                "publish_seconds": self._publishing.seconds,
                "publish_wait_seconds": self._publishing.wait_seconds,
                "publish_copy_seconds": self._publishing.copy_seconds,
                **{f"update_{what}_seconds": each for what, each in asdict(update).items()},
                "loop_lag_seconds": loop.lag,
                "loop_own_lag_seconds": loop.own,
                "rollout_load": self._parts.fleet.take_load(),
                "num_engines": self._metrics.report.num_engines,
                "queue_depth": len(self._books.inbox.arrived),
                "num_open_tickets": self._books.num_open,
                "discards": {reason: len(tickets) for reason, tickets in batch.discards.items()},
                "dropped_samples": counters.num_dropped_samples,
                "masked_tokens": counters.num_masked_tokens,
                "failed_samples": counters.num_failed_samples,
                "refused_messages": self._books.refusals.num,
                "is_repeat": batch.is_repeat,
                "checkpoint_seconds": self._checkpointing.seconds,
            }
        )

    # -- checkpoints and evaluations

    async def open_history(self) -> None:
        """Save the books alone, at a job's very start, so that the identity of its streams is known."""
        await self._checkpointing.save()

    async def checkpoint_if_due(self) -> None:
        """Make a checkpoint every so many steps, and at once when the trajectory stream fills up."""
        await self._checkpointing.save_if_due()

    async def evaluate_first(self) -> None:
        """Measure the policy before its first step, while the trainer waits; once in a job's life."""
        if self._evaluations.is_first_due:
            with contextlib.suppress(_StopRequested):
                await self._evaluations.measure_first(self._boundary)
            self._step_began = self._parts.clock()

    def evaluate_if_due(self) -> None:
        """Begin an evaluation beside the training every so many steps."""
        self._evaluations.begin_if_due(self._publishing.settled)

    # -- the end

    async def stop(self) -> str:
        """Save and leave, having been told to stop: the next attempt goes on with the next step.

        Returns:
            What the next attempt begins with, for the message.
        """
        self._evaluations.cancel()
        what = "after a checkpoint"
        try:
            await self._checkpointing.save_last()
        except OSError as error:  # nothing that is recorded is lost, and the grace has an end
            log.error("no checkpoint at the stop: %s", error)
            what = "without a checkpoint: the disk failed"
        return await self._end(f"stopped at step {self.version}, {what}")

    async def stop_within_step(self) -> str:
        """Leave, having been told to stop within a step, which the next attempt repeats from the ledger.

        The half step is never saved. Before its first update the weights are still those that it began with,
        and these are saved.

        Returns:
            What the next attempt begins with, for the message.
        """
        self._evaluations.cancel()
        what = f"after {self._num_updates} updates of the next, which are lost"
        if self._num_updates == 0 and self._before_step is not None:
            what = "before the first update of the next"
            try:
                await self._checkpointing.save_at(self._before_step)
            except OSError as error:
                log.error("no checkpoint at the stop: %s", error)
        return await self._end(f"stopped at step {self.version}, {what}; it is repeated from the ledger")

    async def _end(self, message: str) -> str:
        await self._leave()
        # Of the last step: its publication may have been broken off, and nothing samples any more.
        self._metrics.update(state="Stopped", step=self.version, message=message)
        return message

    async def finish(self) -> None:
        """Measure, save, export and close the ledger: no step is left, or nothing to learn."""
        await self._publishing.settle()
        with contextlib.suppress(_StopRequested):
            await self._evaluations.measure_last(self._boundary)
        self._metrics.update(state="Exporting")
        await self._checkpointing.save_last()
        export = await self._checkpointing.export_last()
        await self._write_ledger(self._parts.ledger.end, self._books.last_ticket, self._books.left_over())
        await self._leave()
        state = MASTERED_STATE if self.has_mastered else "Finished"
        message = self._books.mastered
        self._metrics.update(state=state, message=message, export=str(export), remaining_seconds=0.0)

    async def _leave(self) -> None:
        await self._publishing.settle()
        await self._parts.weights.leave()
        await self._parts.ranks.run(Stop())
