"""One pass over one job: look, decide, act, report.

A pass looks at what is there, never at what happened, so it may run at any time and any number of times. If
one is cut off after any of its calls, the next one makes up for it.

What one part of a pass fails by does not keep the others from being done: the error is kept, the rest goes
on, and the pass fails by it at its end. After three such passes in a row the status says so (troubles.py).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from pydantic import ValidationError

from asyncrl_api.job import AsyncRLJob, Metadata, Spec
from asyncrl_api.job_status import Status
from asyncrl_api.report import Report
from asyncrl_operator.api_server.api import ApiError
from asyncrl_operator.api_server.cluster import Cluster
from asyncrl_operator.api_server.informer import Entry
from asyncrl_operator.api_server.recorder import Recorder
from asyncrl_operator.api_server.refusals import Gone, Obstacle
from asyncrl_operator.compare import merge_patch
from asyncrl_operator.decide import reasons
from asyncrl_operator.decide.desired import Event, Outcome
from asyncrl_operator.decide.observed import Observed
from asyncrl_operator.decide.planner import plan
from asyncrl_operator.decide.status import JobObject, read_status, unreadable, with_operator_error
from asyncrl_operator.executor import Executor, Target
from asyncrl_operator.obstacles import Obstacles
from asyncrl_operator.telemetry import Telemetry
from asyncrl_operator.troubles import Troubles, is_passing
from asyncrl_operator.workqueue import Key

logger = logging.getLogger(__name__)

INVALID = (400, 422)
"""The statuses with which the API server refuses a body that the CRD does not take."""
REPORTED = (
    "progress",
    "staleness",
    "throughput",
    "reward",
    "last_checkpoint",
    "report_time",
    "report_seen_time",
)
"""The parts of a status that come from the trainer's report."""
BLOCKED_SECONDS = 10.0
"""The time after which a write that the API server refused is tried again, if nothing changes before that."""


@dataclass
class Pass:
    """What one pass knows of its job."""

    key: Key
    entry: Entry[bytes]
    """The object as it was last read or written."""
    stored: dict[str, Any]
    """The status in `entry`."""
    job: AsyncRLJob
    generation: int
    fault: Exception | None = None
    """What a part of this pass has failed by first; the other parts were done nevertheless."""

    def note(self, error: Exception) -> None:
        """Keep an error until the rest is done."""
        self.fault = self.fault or error

    @property
    def subject(self) -> JobObject:
        return JobObject(self.key.name, self.entry.uid, self.generation, self.job.spec)


class Reconciler:
    """Brings jobs to the state that their specs ask for.

    Args:
        clock: Unix time, seconds.
    """

    def __init__(
        self,
        cluster: Cluster,
        executor: Executor,
        obstacles: Obstacles,
        recorder: Recorder,
        telemetry: Telemetry,
        clock: Callable[[], float],
    ) -> None:
        self._cluster = cluster
        self._executor = executor
        self._obstacles = obstacles
        self._recorder = recorder
        self._telemetry = telemetry
        self._clock = clock
        self._troubles = Troubles()
        self._report_faults: dict[Key, str] = {}

    async def reconcile(self, key: Key) -> float | None:
        """Take one step toward what a job asks for, write its status, and return when to look again.

        Raises:
            ApiError: the API server failed, or the job changed during the pass; the next makes up for it.
            Exception: a part of the pass failed; the status says so if it is not the first time.
        """
        entry = self._cluster.jobs.get(*key)
        if entry is None:
            self._forget(key)
            return None
        if entry.is_deleting:
            return None  # the garbage collector deletes its children
        try:
            return await self._reconcile(key, entry)
        except Gone:
            return None
        except Exception as error:
            if not (isinstance(error, ApiError) and is_passing(error)):
                await self._tell(key, error)
            raise

    async def _tell(self, key: Key, error: Exception) -> None:
        """Note that a pass has failed, and write it into the job's status if it is not the first time."""
        self._troubles.add(key, error)
        entry = self._cluster.jobs.get(*key)
        if entry is None:
            return
        body = msgspec.json.decode(entry.value)
        generation, stored = body["metadata"].get("generation", 1), body.get("status") or {}
        before, _ = read_status(stored)
        message = self._troubles.message(key, before)
        if not message:
            return
        told = with_operator_error(before, before, message, generation, self._clock())
        is_new = before.condition("Degraded") != told.condition("Degraded")
        try:
            await self._write(entry, stored, told)
            if is_new:
                event = Event(reasons.OPERATOR_ERROR, message, "Warning")
                await self._recorder.record(key, entry.uid, (event,))
        except (ApiError, Gone) as refusal:
            logger.warning("%s: the status does not say that passes fail: %s", key, refusal)

    async def _reconcile(self, key: Key, entry: Entry[bytes]) -> float | None:
        body = msgspec.json.decode(entry.value)
        generation, stored = body["metadata"].get("generation", 1), body.get("status") or {}
        try:
            spec = Spec.model_validate(body["spec"])
        except ValidationError as error:
            before, _ = read_status(stored)
            await self._write(entry, stored, unreadable(before, generation, error, self._clock()))
            return None
        if spec.managed_by:
            return None
        metadata = Metadata(name=key.name, namespace=key.namespace, uid=entry.uid, generation=generation)
        one = Pass(key, entry, stored, AsyncRLJob(metadata=metadata, spec=spec), generation)
        return await self._step(one)

    async def _step(self, one: Pass) -> float | None:
        """Observe, plan, execute, write the status; fail at the end by what a part has failed by.

        Raises:
            Exception: what the first part failed by; what the others could do is done.
        """
        before, fault = read_status(one.stored)
        if fault:
            one.note(ValueError(f"the stored status is not understood: {fault}"))
        seen, wake_at = await self._observe(one, is_over=before.is_true("Finished"))
        self._log_report(one.key, seen)
        outcome = self._plan(one, before, seen)
        if outcome.write_status_first:
            await self._store_status(one, outcome)
        events = outcome.events
        try:
            if outcome.desired is not None or outcome.deletions:
                events += tuple(await self._act(one, outcome, seen))
        except Obstacle as obstacle:
            seen = with_obstacle(seen, obstacle)
            after = self._plan(one, read_status(one.stored)[0], seen)
            events = (outcome.events if outcome.write_status_first else ()) + after.events
            outcome = replace(after, wake_at=earliest(after.wake_at, self._clock() + BLOCKED_SECONDS))
        except (Gone, ApiError):
            raise
        except Exception as error:
            one.note(error)
        await self._store_status(one, outcome)
        await self._recorder.record(one.key, one.entry.uid, events)
        self._telemetry.show(one.key, one.entry.uid, outcome.status, seen)
        if one.fault is not None:
            raise one.fault
        if self._troubles.message(one.key, read_status(one.stored)[0]):
            self._troubles.over(one.key)
            await self._store_status(one, outcome, is_well=True)
        self._troubles.over(one.key)
        return earliest(outcome.wake_at, wake_at)

    def _plan(self, one: Pass, before: Status, seen: Observed) -> Outcome:
        """Decide; with as little of the report as there can be if the whole of it makes that fail.

        Without any report a trainer would seem to be silent. So there is none only where nobody asks for it:
        suspension and completion must be heeded whatever a trainer reports.
        """
        try:
            return plan(one.subject, before, seen, self._clock())
        except Exception as error:
            if seen.report is None:
                raise
            one.note(error)
            essence = seen.report.model_dump(include={"attempt", "step", "max_steps", "state", "time"})
            least = replace(seen, report=Report(**essence))
        try:
            return plan(one.subject, before, least, self._clock())
        except Exception:
            if not (one.job.spec.suspend or any(job.is_complete for job in seen.trainer_jobs)):
                raise
            return plan(one.subject, before, replace(seen, report=None), self._clock())

    def _log_report(self, key: Key, seen: Observed) -> None:
        """Say once what is wrong with a report, though each pass reads it."""
        if seen.report_fault and seen.report_fault != self._report_faults.get(key):
            logger.warning("%s: %s", key, seen.report_fault)
        self._report_faults[key] = seen.report_fault

    async def _observe(self, one: Pass, *, is_over: bool) -> tuple[Observed, float | None]:
        """Return what there is, including what stands in the way, and when to look for obstacles again."""
        seen = self._cluster.observe(one.key, one.entry.uid)
        if is_over:
            return seen, None
        found = await self._obstacles.find(one.key, one.entry.uid, one.generation, one.job.spec, seen)
        problem = found.problem
        if problem is None:
            attempt = one.stored.get("attempt") or {}
            number = attempt.get("number", 0) + 1
            problem = await self._executor.problem_with_overlays(one.key, one.entry.uid, one.job, number)
        return replace(seen, problem=problem, blocked=found.blocked), found.wake_at

    async def _act(self, one: Pass, outcome: Outcome, seen: Observed) -> list[Event]:
        split = outcome.status.split
        size = split.gpus_per_replica if split is not None else 1
        target = Target(one.key, one.job, one.entry.uid, one.generation, outcome.desired, size)
        is_verified = outcome.write_status_first
        return await self._executor.act(target, seen, outcome.deletions, is_verified=is_verified)

    async def _store_status(self, one: Pass, outcome: Outcome, *, is_well: bool = False) -> None:
        """Write the status; without what the trainer reports if the API server refuses it with that.

        Args:
            is_well: whether a trouble that the status still tells of is over.
        """
        before, _ = read_status(one.stored)
        status, message = outcome.status, "" if is_well else self._troubles.message(one.key, before)
        if message:
            status = with_operator_error(status, before, message, one.generation, self._clock())
        try:
            one.entry, one.stored = await self._write(one.entry, one.stored, status)
        except ApiError as error:
            if error.status not in INVALID:
                raise
            one.note(error)
            bare = status.model_copy(update={name: getattr(before, name) for name in REPORTED})
            one.entry, one.stored = await self._write(one.entry, one.stored, bare)

    async def _write(
        self, entry: Entry[bytes], stored: dict[str, Any], status: Status
    ) -> tuple[Entry[bytes], dict[str, Any]]:
        """Write the status if it differs, on condition that the object is still as this pass has read it."""
        patch = merge_patch(stored, status.to_json())
        if not patch:
            return entry, stored
        written = await self._cluster.write_status(entry, patch)
        return written, msgspec.json.decode(written.value)["status"]

    def _forget(self, key: Key) -> None:
        self._executor.forget(key)
        self._obstacles.forget(key)
        self._telemetry.forget(key)
        self._troubles.over(key)
        self._report_faults.pop(key, None)


def with_obstacle(seen: Observed, obstacle: Obstacle) -> Observed:
    """Return what was seen, together with the obstacle that was met while acting on it."""
    if obstacle.needs_user:
        return replace(seen, problem=obstacle.problem)
    return replace(seen, blocked=obstacle.problem)


def earliest(*times: float | None) -> float | None:
    return min((at for at in times if at is not None), default=None)
