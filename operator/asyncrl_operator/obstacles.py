"""Finds obstacles that a job's own objects do not show: an old CRD, missing objects, refused pods.

The API server is asked about them seldom, and only while something is amiss.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from asyncrl_api.free_forms import free_form_violations
from asyncrl_api.job import Spec
from asyncrl_operator.api_server.cluster import Cluster
from asyncrl_operator.api_server.observe import missing_reference
from asyncrl_operator.decide import reasons
from asyncrl_operator.decide.observed import Observed, Problem
from asyncrl_operator.resources import CONFIG_MAPS, JOBS, SERVICE_ACCOUNTS, STATEFUL_SETS, Resource
from asyncrl_operator.workqueue import Key

logger = logging.getLogger(__name__)

SCHEMA_SECONDS = 30.0
"""The time between two looks at the served CRD while it is too old."""
REFERENCE_SECONDS = 10.0
"""The time between two looks for a missing object."""
PODS_SECONDS = 10.0
"""The time between two questions about why pods are not created."""
EVENTS_SHARE = 0.05
"""The share of its time that the API server may spend on listing a namespace's Events for the operator."""


@dataclass(frozen=True)
class Found:
    """What stands in the way, and when to look again."""

    problem: Problem | None = None
    blocked: Problem | None = None
    wake_at: float | None = None


@dataclass
class Asked:
    """The last answers about a job."""

    references: tuple[str, int] | None = None
    """The UID and generation of the spec whose references all existed."""
    pods_at: float | None = None
    """When pods were first seen to be missing, or when the reason was last asked for; None if none are."""
    refusal: Problem | None = None
    """Why the missing pods were refused, as far as it is known."""


@dataclass(frozen=True)
class Told:
    """What a namespace's Events say about refused pods, by kind and name of the object that owns them."""

    messages: dict[tuple[str, str], str]
    good_until: float


@dataclass
class Obstacles:
    """Looks for what stands in the way of a job.

    Args:
        clock: Unix time, seconds.
    """

    cluster: Cluster
    clock: Callable[[], float]
    _asked: dict[Key, Asked] = field(default_factory=dict)
    _schema: Problem | None = None
    _schema_at: float | None = None
    """When the served CRD was last looked at; None: not yet."""
    _refusals: dict[str, Told] = field(default_factory=dict)
    _asking: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def find(self, key: Key, uid: str, generation: int, spec: Spec, seen: Observed) -> Found:
        """Return the most serious obstacle.

        Raises:
            ApiError: the API server did not answer a question.
        """
        now = self.clock()
        if problem := await self._with_schema(now):
            return Found(problem, wake_at=now + SCHEMA_SECONDS)
        if broken := next(free_form_violations(spec), None):
            return Found(Problem(reasons.INVALID_SPEC, broken.message))
        asked = self._asked.setdefault(key, Asked())
        if problem := await self._with_references(asked, key.namespace, (uid, generation), spec):
            return Found(problem, wake_at=now + REFERENCE_SECONDS)
        ours = [pod for pod in seen.pods if pod.is_ours and pod.is_alive]
        runs = any(pod.group == "trainer" and pod.phase == "Running" for pod in ours)
        if not runs and (problem := missing_reference(ours)):
            return Found(problem)
        short = pods_missing(seen)
        if not short:
            asked.pods_at = asked.refusal = None
            return Found()
        if asked.pods_at is None:  # they have only just been asked for
            asked.pods_at = now
        elif now >= asked.pods_at + PODS_SECONDS:
            asked.pods_at, asked.refusal = now, await self._refusal(key.namespace, short)
        return Found(blocked=asked.refusal, wake_at=asked.pods_at + PODS_SECONDS)

    def forget(self, key: Key) -> None:
        self._asked.pop(key, None)

    async def _with_schema(self, now: float) -> Problem | None:
        """Return what is wrong with the served CRD; once it is right it is not looked at again."""
        if self._schema_at is None or (self._schema is not None and now >= self._schema_at + SCHEMA_SECONDS):
            self._schema, self._schema_at = await self.cluster.served_problem(), now
            if self._schema is not None:
                logger.error("%s: %s", self._schema.reason, self._schema.message)
        return self._schema

    async def _with_references(
        self, asked: Asked, namespace: str, subject: tuple[str, int], spec: Spec
    ) -> Problem | None:
        """Return the first object that the spec names and that does not exist.

        Once all of them exist, they are not looked for again until the spec changes.
        """
        if asked.references == subject:
            return None
        for resource, path, name in references(spec):
            if not await self.cluster.exists(resource, namespace, name):
                return Problem(reasons.MISSING_REFERENCE, f"{path}: {resource.kind} {name!r} does not exist")
        asked.references = subject
        return None

    async def _refusal(self, namespace: str, owners: list[tuple[Resource, str]]) -> Problem | None:
        """Return what the controller of Jobs or StatefulSets was told when it tried to create pods."""
        told = await self._told(namespace)
        for resource, name in owners:
            if message := told.get((resource.kind, name)):
                reason = reasons.QUOTA_EXCEEDED if "exceeded quota" in message else reasons.PODS_REFUSED
                return Problem(reason, f"{resource.kind} {name}: {message}")
        return None

    async def _told(self, namespace: str) -> dict[tuple[str, str], str]:
        """Return why pods of a namespace were refused, by kind and name of the object that owns them.

        The question is asked seldom, and for all jobs of the namespace at once, because an answer with many
        Events takes seconds.
        """
        async with self._asking:
            known = self._refusals.get(namespace)
            if known is None or self.clock() >= known.good_until:
                began = self.clock()
                messages = await self.cluster.last_events(namespace, "FailedCreate")
                now = self.clock()
                rest = max(PODS_SECONDS, (now - began) / EVENTS_SHARE)
                current = {name: each for name, each in self._refusals.items() if each.good_until > now}
                known = Told(messages, now + rest)
                self._refusals = {**current, namespace: known}
            return known.messages


def references(spec: Spec) -> list[tuple[Resource, str, str]]:
    """Return the objects that a spec names and that the operator may look up: resource, field and name.

    Secrets and claims are not among them; kubelet and scheduler report those that are missing.
    """
    found = []
    if spec.workflow.config_map_ref is not None:
        found.append((CONFIG_MAPS, "spec.workflow.configMapRef", spec.workflow.config_map_ref.name))
    if spec.reward.config_map_ref is not None:
        found.append((CONFIG_MAPS, "spec.reward.configMapRef", spec.reward.config_map_ref.name))
    if spec.scheduling.service_account_name:
        name = spec.scheduling.service_account_name
        found.append((SERVICE_ACCOUNTS, "spec.scheduling.serviceAccountName", name))
    return found


def pods_missing(seen: Observed) -> list[tuple[Resource, str]]:
    """Return the Jobs without pods, and the StatefulSets with fewer pods than their size."""
    ours = [pod for pod in seen.pods if pod.is_ours]
    found: list[tuple[Resource, str]] = []
    for job in seen.trainer_jobs:
        has_pods = any(pod.group == "trainer" and pod.attempt == job.attempt for pod in ours)
        if not (has_pods or job.is_complete or job.is_failed or job.is_deleting):
            found.append((JOBS, job.name))
    for group, kind in ((seen.messaging, "messaging"), (seen.rollout, "rollout")):
        if group is not None and sum(pod.group == kind for pod in ours) < group.replicas:
            found.append((STATEFUL_SETS, group.name))
    return found
