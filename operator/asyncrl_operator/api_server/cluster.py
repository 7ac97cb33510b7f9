"""What the operator knows about a cluster, and what it does to it."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from asyncrl_operator.api_server.api import Api, ApiError, Propagation
from asyncrl_operator.api_server.informer import RESYNC_SECONDS, Entry, Informer, Store, fill
from asyncrl_operator.api_server.kept_fields import KeptPod, compact, trim_job, trim_node, trim_pod
from asyncrl_operator.api_server.observe import Child, observe
from asyncrl_operator.api_server.refusals import Gone, check_ownership
from asyncrl_operator.api_server.schema import OPENAPI_PATH, schema_problem
from asyncrl_operator.decide.observed import Node, Observed, Problem
from asyncrl_operator.resources import (
    ASYNCRL_JOBS,
    CHILDREN,
    EVENTS,
    NODES,
    PODS,
    SECRETS,
    SELECTOR,
    STATEFUL_SETS,
    Json,
    Resource,
    is_made_once,
    resource_of,
)
from asyncrl_operator.workqueue import Key

logger = logging.getLogger(__name__)

NO_OBJECT = "1"
"""A resource version that no object has: an apply with it creates an object and never takes one over."""


class Wake(Protocol):
    """Schedules a pass over a job."""

    def __call__(self, key: Key, *, at_once: bool = False) -> None: ...


@dataclass(frozen=True)
class Sign:
    """The time, in monotonic seconds, at which a watch last gave a sign of life."""

    watch: str
    at: float


class Cluster:
    """The caches of all objects that belong to AsyncRLJobs, and all writes.

    Args:
        namespaces: the namespaces to watch; none: all of them, and the nodes too.
        wake: called with the job for which something has changed.
        clock: monotonic seconds.
    """

    def __init__(self, api: Api, namespaces: Sequence[str], wake: Wake, clock: Callable[[], float]) -> None:
        self._api = api
        self._namespaces = namespaces
        self._wake = wake
        self._clock = clock
        self.jobs: Store[bytes] = Store(trim_job)
        self._children: dict[tuple[Resource, str], Informer[bytes]] = {}
        self._pods: dict[str, Informer[KeptPod]] = {}
        for namespace in namespaces or ("",):
            for resource in CHILDREN:
                informer = Informer(
                    api, resource, namespace or None, SELECTOR, compact, self._child_changed, clock
                )
                self._children[resource, namespace] = informer
            self._pods[namespace] = Informer(
                api, PODS, namespace or None, SELECTOR, trim_pod, self._child_changed, clock
            )
        self._nodes: Informer[Node] | None = None
        if not namespaces:
            self._nodes = Informer(api, NODES, None, "", trim_node, self._node_changed, clock)

    # -- caches

    async def run(self) -> None:
        """Keep the caches up to date until cancelled."""
        async with asyncio.TaskGroup() as group:
            for informer in self._informers():
                group.create_task(informer.run(), name=f"watch {informer.resource.plural}")
            group.create_task(self._resync_jobs(), name="resync asyncrljobs")

    async def wait_until_synced(self) -> None:
        """Return once each cache has been filled."""
        for informer in self._informers():
            await informer.synced.wait()

    def signs(self) -> list[Sign]:
        """Return when each watch last gave a sign of life."""
        return [Sign(informer.resource.plural, informer.last_sign) for informer in self._informers()]

    def take_job(self, kind: str | None, raw: Json) -> None:
        """Take in an event of the watch on AsyncRLJobs."""
        entry = self.jobs.remove(raw) if kind == "DELETED" else self.jobs.put(raw)
        if entry is not None:
            self._wake(Key(entry.namespace, entry.name), at_once=True)

    def observe(self, key: Key, uid: str) -> Observed:
        """Return what exists of a job, from the caches alone."""
        pods = self._pods[self._scope(key.namespace)].store.of(key)
        nodes = None
        if self._nodes is not None:
            found = {name: self._nodes.store.get("", name) for name in {e.value.pod.node for e in pods}}
            nodes = {name: entry.value for name, entry in found.items() if entry is not None}
        return observe(key, uid, self.children(key), pods, nodes)

    def children(self, key: Key) -> list[Child]:
        """Return all objects with the label of a job except pods, in the order in which they are made."""
        scope = self._scope(key.namespace)
        return [
            Child(resource, entry)
            for resource in CHILDREN
            for entry in self._children[resource, scope].store.of(key)
        ]

    def child(self, resource: Resource, namespace: str, name: str) -> Entry[bytes] | None:
        return self._children[resource, self._scope(namespace)].store.get(namespace, name)

    def _scope(self, namespace: str) -> str:
        return namespace if self._namespaces else ""

    def _informers(self) -> list[Informer[Any]]:
        nodes = [self._nodes] if self._nodes is not None else []
        return [*self._children.values(), *self._pods.values(), *nodes]

    def _child_changed(self, entry: Entry[Any]) -> None:
        if entry.key is not None:
            self._wake(entry.key)

    def _node_changed(self, node: Entry[Node]) -> None:
        for informer in self._pods.values():
            for pod in informer.store:
                if pod.value.pod.node == node.name and pod.key is not None:
                    self._wake(pod.key)

    async def _resync_jobs(self) -> None:
        """List the AsyncRLJobs now and then: kopf does not report what was deleted while it did not watch."""
        while True:
            await asyncio.sleep(RESYNC_SECONDS)
            for namespace in self._namespaces or (None,):
                try:
                    path = ASYNCRL_JOBS.path(namespace)
                    await fill(self._api, path, {}, self.jobs, lambda e: self._wake(Key(e.namespace, e.name)))
                except ApiError as error:
                    logger.warning("asyncrljobs: not listed, next try in %.0f s: %s", RESYNC_SECONDS, error)

    # -- writes

    async def verify(self, key: Key, uid: str) -> None:
        """Read the AsyncRLJob itself, before anything is created for it because a cache says it exists.

        Raises:
            Gone: it no longer exists, or is being deleted; what is created now would outlive it.
        """
        try:
            live = await self._api.get(ASYNCRL_JOBS.path(key.namespace, key.name))
        except ApiError as error:
            if error.status != 404:
                raise
            self._drop_job(key)
            raise Gone from error
        self.jobs.put(live)
        if live["metadata"]["uid"] != uid or "deletionTimestamp" in live["metadata"]:
            raise Gone

    async def make(self, manifest: Json, uid: str) -> bool:
        """Create an object that the cache does not have; return whether it was created.

        If one of ours exists already, it has lost the label by which it is watched, or the cache is behind:
        its manifest is applied again, or only its labels if it must stay as it was made.

        Raises:
            Obstacle: an object of that name exists and is not ours: NameConflict.
            ApiError: the API server refused or failed.
        """
        resource, metadata = resource_of(manifest), manifest["metadata"]
        namespace, name = metadata["namespace"], metadata["name"]
        try:
            if resource is SECRETS:
                await self._api.create(resource.path(namespace), manifest)
                return True
            body = {**manifest, "metadata": {**metadata, "resourceVersion": NO_OBJECT}}
            made = await self._api.apply(resource.path(namespace, name), body)
        except ApiError as error:
            if error.status != 409:
                raise
            if resource is SECRETS:  # its name contains the UID, so it is ours; we may not read it
                return False
            live = await self._api.get(resource.path(namespace, name))
            check_ownership(resource, live["metadata"], uid)
            if is_made_once(manifest):
                labels = {"metadata": {"uid": live["metadata"]["uid"], "labels": metadata["labels"]}}
                live = await self._api.merge(resource.path(namespace, name), labels)
                self._keep(self._store(resource, namespace), live)
            else:
                await self.correct(manifest, live["metadata"]["uid"])
            return False
        self._keep(self._store(resource, namespace), made)
        return True

    async def correct(self, manifest: Json, uid: str) -> None:
        """Apply a manifest over the object that has this UID.

        Raises:
            ApiError: also if another object has replaced it since (422), or it is gone (409).
        """
        resource, metadata = resource_of(manifest), manifest["metadata"]
        body = {**manifest, "metadata": {**metadata, "uid": uid}}
        live = await self._api.apply(resource.path(metadata["namespace"], metadata["name"]), body)
        self._keep(self._store(resource, metadata["namespace"]), live)

    async def scale(self, namespace: str, name: str, replicas: int) -> None:
        """Set the replicas of a StatefulSet that the cache has, and change nothing else."""
        entry = self.child(STATEFUL_SETS, namespace, name)
        assert entry is not None, "it was seen in this pass"
        body = {"metadata": {"uid": entry.uid}, "spec": {"replicas": replicas}}
        live = await self._api.merge(STATEFUL_SETS.path(namespace, name), body)
        self._keep(self._store(STATEFUL_SETS, namespace), live)

    async def try_out(self, manifest: Json) -> None:
        """Let the API server check a manifest without keeping it.

        Raises:
            ApiError: the API server refused or failed.
        """
        metadata = manifest["metadata"]
        path = resource_of(manifest).path(metadata["namespace"], metadata["name"])
        await self._api.apply(path, manifest, is_dry_run=True)

    async def delete(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        uid: str,
        *,
        propagation: Propagation = "Background",
        is_forced: bool = False,
    ) -> None:
        """Delete one object; nothing happens if it is gone or has been replaced."""
        try:
            answer = await self._api.delete(
                resource.path(namespace, name),
                uid=uid,
                propagation=propagation,
                grace_seconds=0 if is_forced else None,
            )
        except ApiError as error:
            if error.status not in (404, 409):
                raise
            return
        if "deletionTimestamp" not in answer.get("metadata", {}):
            return  # gone at once; the watch will report it
        if resource is PODS:
            self._keep(self._pods[self._scope(namespace)].store, answer)
        else:
            self._keep(self._store(resource, namespace), answer)

    async def write_status(self, entry: Entry[bytes], patch: Json) -> Entry[bytes]:
        """Change the status of the AsyncRLJob that this pass has read; return the job with the new status.

        Raises:
            Gone: the job has been deleted.
            ApiError: 409 if the job has changed since; it is then read anew for the next pass.
        """
        key = Key(entry.namespace, entry.name)
        path = ASYNCRL_JOBS.path(entry.namespace, entry.name, "status")
        body = {"metadata": {"resourceVersion": str(entry.version), "uid": entry.uid}, "status": patch}
        try:
            live = await self._api.merge(path, body)
        except ApiError as error:
            if error.status == 404:
                self._drop_job(key)
                raise Gone from error
            if error.status == 409:
                await self.verify(key, entry.uid)
            raise
        if self.jobs.get(*key) is None:  # its deletion was reported while the answer was on its way
            raise Gone
        self.jobs.put(live)
        written = self.jobs.get(*key)
        assert written is not None
        return written

    async def served_problem(self) -> Problem | None:
        """Return what is wrong with the CRD that the API server serves."""
        return schema_problem(await self._api.get(OPENAPI_PATH))

    async def exists(self, resource: Resource, namespace: str, name: str) -> bool:
        """Return whether an object that a user names exists."""
        try:
            await self._api.get(resource.path(namespace, name))
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        return True

    async def uid_of(self, resource: Resource, namespace: str, name: str, *, owner: str) -> str:
        """Return the UID of a child, from the API server if no cache has it; empty: there is no such child.

        Args:
            owner: UID of the AsyncRLJob; an object of another owner is not its child.
        """
        if (entry := self.child(resource, namespace, name)) is not None:
            return entry.uid if entry.owner == owner else ""
        try:
            live = await self._api.get(resource.path(namespace, name))
        except ApiError as error:
            if error.status != 404:
                raise
            return ""
        owners = live["metadata"].get("ownerReferences") or ()
        return str(live["metadata"]["uid"]) if any(each["uid"] == owner for each in owners) else ""

    async def last_events(self, namespace: str, reason: str) -> dict[tuple[str, str], str]:
        """Return the newest message of the Events with a reason, by kind and name of the object concerned.

        This covers the whole namespace, since the API server reads all its Events for any such answer.
        """
        events: list[Json] = []
        query = {"fieldSelector": f"reason={reason}", "limit": "500", "continue": ""}
        while True:
            page = await self._api.list(EVENTS.path(namespace), **query)
            events += page
            if not page.token:
                break
            query["continue"] = page.token
        events.sort(key=lambda each: each.get("lastTimestamp") or "")
        about = [(each, each["involvedObject"]) for each in events]
        return {(of["kind"], of["name"]): str(each.get("message", "")) for each, of in about}

    def _store(self, resource: Resource, namespace: str) -> Store[bytes]:
        return self._children[resource, self._scope(namespace)].store

    def _keep(self, store: Store[Any], written: Json) -> None:
        """Take in what was written, and schedule the next pass, which may act on it.

        An object that has lost the label that is watched stays out: nothing would report its end.
        """
        if SELECTOR not in written["metadata"].get("labels", {}):
            return
        if (entry := store.put_written(written)) is not None:
            self._child_changed(entry)

    def _drop_job(self, key: Key) -> None:
        self.jobs.discard(*key)
        self._wake(key)
