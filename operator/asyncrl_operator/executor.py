"""Carries out what a pass has decided: creates what is missing, corrects what differs, deletes the rest."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from asyncrl_api.job import AsyncRLJob
from asyncrl_api.parsing import SpecError
from asyncrl_operator.api_server.api import ApiError
from asyncrl_operator.api_server.cluster import Cluster
from asyncrl_operator.api_server.observe import Child, outlived_configs, report_name
from asyncrl_operator.api_server.refusals import (
    Gone,
    Obstacle,
    check_ownership,
    is_namespace_ending,
    obstacle_from,
)
from asyncrl_operator.compare import first_difference
from asyncrl_operator.decide import reasons
from asyncrl_operator.decide.desired import (
    DeleteChildren,
    DeletePod,
    DeleteTrainerJob,
    Deletion,
    Desired,
    DesiredTrainer,
    Event,
)
from asyncrl_operator.decide.edits import rollout_hash, trainer_hash
from asyncrl_operator.decide.observed import Observed, Problem
from asyncrl_operator.layout import plan_split
from asyncrl_operator.render.manifests import (
    Defaults,
    render_credentials,
    render_messaging,
    render_rollout,
    render_shared,
    render_trainer,
)
from asyncrl_operator.resources import CONFIG_MAPS, JOBS, PODS, SECRETS, Json, is_made_once, resource_of
from asyncrl_operator.workqueue import Key

logger = logging.getLogger(__name__)


SECOND_WAVE = ("RoleBinding", "StatefulSet", "Job")
"""The kinds that are created after what they depend on: a binding without its Role is refused (404), and pods
start at once."""


@dataclass(frozen=True)
class Target:
    """The job that a pass works on, and what the pass wants it to have."""

    key: Key
    job: AsyncRLJob
    uid: str
    generation: int
    desired: Desired | None
    """None: nothing is applied."""
    gpus_per_replica: int

    @property
    def wanted(self) -> tuple[object, ...]:
        """Everything, apart from the defaults, that determines the manifests."""
        return (self.uid, self.generation, self.desired, self.gpus_per_replica)


@dataclass(frozen=True)
class Settled:
    """A state in which a job's children were as wanted; nothing is rendered until one of them changes."""

    wanted: tuple[object, ...]
    children: tuple[object, ...]


class Executor:
    """Applies and deletes the children of jobs.

    Args:
        new_secret: returns a random password.
    """

    def __init__(self, cluster: Cluster, defaults: Defaults, new_secret: Callable[[], str]) -> None:
        self._cluster = cluster
        self._defaults = defaults
        self._new_secret = new_secret
        self._settled: dict[Key, Settled] = {}
        self._tried_out: dict[Key, tuple[tuple[str, str, str], Problem | None]] = {}

    def forget(self, key: Key) -> None:
        """Drop what is remembered about a job that is gone."""
        self._settled.pop(key, None)
        self._tried_out.pop(key, None)

    async def act(
        self, target: Target, seen: Observed, deletions: tuple[Deletion, ...], *, is_verified: bool
    ) -> list[Event]:
        """Apply, then delete; return the Events about children that others had changed.

        An obstacle to the apply does not keep the deletions from being made, since they may remove it.

        Args:
            is_verified: whether the API server has just confirmed that the job exists.

        Raises:
            Obstacle: the API server refused an object; says what the user is to be told.
            Gone: nothing must be created any more.
            ApiError: a call failed; the same call may be tried again.
        """
        events: list[Event] = []
        obstacle = None
        try:
            events = await self._apply(target, seen, is_verified)
        except Obstacle as error:
            obstacle = error
        for deletion in deletions:
            await self._delete(target.key, target.uid, deletion)
        if target.desired is not None and target.desired.shared:
            await self._delete_outlived(target, target.desired, seen)
        if obstacle is not None:
            raise obstacle
        return events

    async def problem_with_overlays(self, key: Key, uid: str, job: AsyncRLJob, number: int) -> Problem | None:
        """Return the API server's objection to the pod templates of a job with overlays of its own, if any.

        It is asked once for each pair of templates, before anything is done that depends on them.

        Args:
            number: the number of the trainer's next attempt, whose Job does not exist yet.

        Raises:
            ApiError: a call failed.
        """
        spec = job.spec
        if not (spec.trainer.pod_template or spec.rollout.pod_template):
            return None
        subject = (uid, trainer_hash(spec), rollout_hash(spec))
        known = self._tried_out.get(key)
        if known is not None and known[0] == subject:
            return known[1]
        problem = await self._try_out(job, number)
        self._tried_out[key] = (subject, problem)
        return problem

    async def _try_out(self, job: AsyncRLJob, number: int) -> Problem | None:
        try:
            split = plan_split(job.spec)
            manifests = [
                *render_trainer(job, self._defaults, DesiredTrainer(number, split.trainer)),
                *render_rollout(job, self._defaults, 0, split.gpus_per_replica),
            ]
        except SpecError as error:
            return _problem_of(error)
        for manifest in manifests:
            try:
                await self._cluster.try_out(manifest)
            except ApiError as error:
                obstacle = obstacle_from(error)
                if obstacle is None:
                    raise
                if obstacle.needs_user:
                    return obstacle.problem
        return None

    # -- apply

    async def _apply(self, target: Target, seen: Observed, is_verified: bool) -> list[Event]:
        key, desired, before = target.key, target.desired, self._settled.get(target.key)
        if desired is None:
            return []
        children = self._children(key)
        if before == Settled(target.wanted, children):
            return []
        self._settled.pop(key, None)
        was_settled = before is not None and before.wanted == target.wanted
        if not desired.shared:
            await self._scale(target.key, desired, seen)
            changes = []
        else:
            try:
                changes = await self._apply_all(target, self._render(target, desired, seen), is_verified)
            except SpecError as error:
                raise Obstacle(_problem_of(error), needs_user=True) from error
        if self._children(key) == children:  # if not, a child may be gone, and the next pass looks again
            self._settled[key] = Settled(target.wanted, children)
        return changes if was_settled else []

    def _render(self, target: Target, desired: Desired, seen: Observed) -> list[Json]:
        """Return the objects that should exist, in the order in which they are created.

        Raises:
            SpecError: an overlay sets a field that the operator owns.
        """
        job, defaults = target.job, self._defaults
        manifests = list(render_shared(job, defaults, desired.disruption))
        if desired.messaging_replicas is not None:
            if seen.messaging is None:
                manifests.insert(0, render_credentials(job, self._new_secret))
            manifests += render_messaging(job, defaults, desired.messaging_replicas)
        if desired.trainer is not None:
            manifests += render_trainer(job, defaults, desired.trainer)
        if desired.rollout_replicas is not None:
            manifests += render_rollout(job, defaults, desired.rollout_replicas, target.gpus_per_replica)
        return manifests

    async def _apply_all(self, target: Target, manifests: list[Json], is_verified: bool) -> list[Event]:
        """Apply first what other objects depend on, then those others; each wave is applied all at once."""
        changes: list[Event] = []
        if not is_verified and self._lacks_any(target.key, manifests):
            await self._cluster.verify(target.key, target.uid)
        for wave in (False, True):
            tasks = [
                self._apply_or_explain(target, manifest)
                for manifest in manifests
                if (manifest["kind"] in SECOND_WAVE) is wave
            ]
            found = await asyncio.gather(*tasks, return_exceptions=True)
            for each in found:
                if isinstance(each, BaseException):
                    raise each
                if each is not None:
                    changes.append(each)
        return changes

    def _lacks_any(self, key: Key, manifests: list[Json]) -> bool:
        """Whether an apply would create an object, before which the AsyncRLJob itself must be looked up."""
        return any(
            resource_of(each) is SECRETS
            or self._cluster.child(resource_of(each), key.namespace, each["metadata"]["name"]) is None
            for each in manifests
        )

    async def _apply_or_explain(self, target: Target, manifest: Json) -> Event | None:
        """Apply one object.

        Raises:
            Gone, Obstacle, ApiError: as for `act`.
        """
        try:
            return await self._apply_one(target, manifest)
        except ApiError as error:
            if is_namespace_ending(error):
                raise Gone from error
            obstacle = obstacle_from(error)
            if obstacle is None:
                raise
            what = f"{manifest['kind']} {manifest['metadata']['name']}"
            problem = Problem(obstacle.problem.reason, f"{what}: {obstacle.problem.message}")
            raise Obstacle(problem, needs_user=obstacle.needs_user) from error

    async def _apply_one(self, target: Target, manifest: Json) -> Event | None:
        """Make one object as rendered; return an Event for the case that all children were settled before."""
        resource, metadata = resource_of(manifest), manifest["metadata"]
        is_secret = resource is SECRETS  # created, but never read
        place = (metadata["namespace"], metadata["name"])
        entry = None if is_secret else self._cluster.child(resource, *place)
        what = f"{resource.kind} {metadata['name']}"
        if entry is None:
            is_made = await self._cluster.make(manifest, target.uid)
            logger.debug("%s: %s %s", target.key, what, "made" if is_made else "was there")
            return (
                Event(reasons.CHILD_RECREATED, f"{what} was missing and has been created again")
                if is_made and not is_secret
                else None
            )
        live = Child(resource, entry).decode()
        check_ownership(resource, live["metadata"], target.uid)
        if entry.is_deleting or is_made_once(manifest):
            return None
        wanted = {name: value for name, value in manifest.items() if name not in ("apiVersion", "kind")}
        path = first_difference(wanted, live)
        if not path:
            return None
        logger.info("%s: %s differs at %s: applied", target.key, what, path)
        await self._cluster.correct(manifest, entry.uid)
        return Event(reasons.DRIFT_CORRECTED, f"{what}: the change to {path.removeprefix('.')} is undone")

    async def _scale(self, key: Key, desired: Desired, seen: Observed) -> None:
        """Bring groups to their size and leave the rest as it is: a job at rest is not rendered anew."""
        wanted = (
            (seen.rollout, desired.rollout_replicas),
            (seen.messaging, desired.messaging_replicas),
        )
        for group, replicas in wanted:
            if group is None or replicas is None or group.replicas == replicas or group.is_deleting:
                continue
            await self._cluster.scale(key.namespace, group.name, replicas)

    def _children(self, key: Key) -> tuple[object, ...]:
        """Return what tells one state of the children from another; the trainer's report is left out."""
        report = report_name(key)
        return tuple(
            (each.entry.uid, each.entry.is_deleting, b"" if each.entry.name == report else each.entry.value)
            for each in self._cluster.children(key)
        )

    # -- deletions

    async def _delete_outlived(self, target: Target, desired: Desired, seen: Observed) -> None:
        attempt = desired.trainer.number if desired.trainer is not None else 0
        template, children = rollout_hash(target.job.spec), self._cluster.children(target.key)
        for entry in outlived_configs(
            target.key, target.uid, children, seen, attempt=attempt, template=template
        ):
            await self._cluster.delete(CONFIG_MAPS, entry.namespace, entry.name, entry.uid)

    async def _delete(self, key: Key, uid: str, deletion: Deletion) -> None:
        cluster = self._cluster
        match deletion:
            case DeletePod(name, pod_uid, is_forced):
                await cluster.delete(PODS, key.namespace, name, pod_uid, is_forced=is_forced)
            case DeleteTrainerJob(name):
                job_uid = await cluster.uid_of(JOBS, key.namespace, name, owner=uid)
                if job_uid:
                    await cluster.delete(JOBS, key.namespace, name, job_uid, propagation="Foreground")
            case DeleteChildren():
                for child in cluster.children(key):
                    if child.entry.owner == uid and not child.entry.is_deleting:
                        entry = child.entry
                        await cluster.delete(child.resource, key.namespace, entry.name, entry.uid)


def _problem_of(error: SpecError) -> Problem:
    return Problem(reasons.INVALID_SPEC, str(error))
