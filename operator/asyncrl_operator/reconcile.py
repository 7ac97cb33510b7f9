"""One pass over one job: look, decide, act, report.

A pass looks at what is there, never at what happened, so it may run at any time and any number of times. If
one is cut off after any of its calls, the next one makes up for it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from pydantic import ValidationError

from asyncrl_api.job import AsyncRLJob, Metadata, Spec
from asyncrl_api.job_status import Status
from asyncrl_operator.api_server.cluster import Cluster
from asyncrl_operator.api_server.informer import Entry
from asyncrl_operator.api_server.recorder import Recorder
from asyncrl_operator.api_server.refusals import Gone, Obstacle
from asyncrl_operator.compare import merge_patch
from asyncrl_operator.decide.desired import Event, Outcome
from asyncrl_operator.decide.observed import Observed
from asyncrl_operator.decide.planner import plan
from asyncrl_operator.decide.status import JobObject, unreadable
from asyncrl_operator.executor import Executor, Target
from asyncrl_operator.obstacles import Obstacles
from asyncrl_operator.telemetry import Telemetry
from asyncrl_operator.workqueue import Key

logger = logging.getLogger(__name__)

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

    async def reconcile(self, key: Key) -> float | None:
        """Take one step toward what a job asks for, write its status, and return when to look again.

        Raises:
            ApiError: the API server failed, or the job changed during the pass; the next makes up for it.
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

    async def _reconcile(self, key: Key, entry: Entry[bytes]) -> float | None:
        body = msgspec.json.decode(entry.value)
        generation, stored = body["metadata"].get("generation", 1), body["status"]
        try:
            spec = Spec.model_validate(body["spec"])
        except ValidationError as error:
            await self._write(
                entry, stored, unreadable(Status.model_validate(stored), generation, error, self._clock())
            )
            return None
        if spec.managed_by:
            return None
        metadata = Metadata(name=key.name, namespace=key.namespace, uid=entry.uid, generation=generation)
        one = Pass(key, entry, stored, AsyncRLJob(metadata=metadata, spec=spec), generation)
        return await self._step(one)

    async def _step(self, one: Pass) -> float | None:
        """Observe, plan, execute, write the status."""
        before = Status.model_validate(one.stored)
        seen, wake_at = await self._observe(one, is_over=before.is_true("Finished"))
        outcome = plan(one.subject, before, seen, self._clock())
        if outcome.write_status_first:
            await self._store_status(one, outcome)
        events = outcome.events
        try:
            if outcome.desired is not None or outcome.deletions:
                events += tuple(await self._act(one, outcome, seen))
        except Obstacle as obstacle:
            seen = with_obstacle(seen, obstacle)
            after = plan(one.subject, Status.model_validate(one.stored), seen, self._clock())
            events = (outcome.events if outcome.write_status_first else ()) + after.events
            outcome = replace(after, wake_at=earliest(after.wake_at, self._clock() + BLOCKED_SECONDS))
        await self._store_status(one, outcome)
        await self._recorder.record(one.key, one.entry.uid, events)
        self._telemetry.show(one.key, one.entry.uid, outcome.status, seen)
        return earliest(outcome.wake_at, wake_at)

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

    async def _store_status(self, one: Pass, outcome: Outcome) -> None:
        one.entry, one.stored = await self._write(one.entry, one.stored, outcome.status)

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


def with_obstacle(seen: Observed, obstacle: Obstacle) -> Observed:
    """Return what was seen, together with the obstacle that was met while acting on it."""
    if obstacle.needs_user:
        return replace(seen, problem=obstacle.problem)
    return replace(seen, blocked=obstacle.problem)


def earliest(*times: float | None) -> float | None:
    return min((at for at in times if at is not None), default=None)
