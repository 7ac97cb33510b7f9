"""An API server in memory, for tests in which the operator's own client, caches and passes are at work.

It does what the operator uses, as Kubernetes does it: server-side apply by force, merge patches, a status
apart from the rest, deletion, quotas of counts, pages, watches from a version on. `api_server_cases.py` holds
it to a real one. It refuses what it lacks with a LackingError, which no test survives. For built-in kinds it
has neither schemas nor defaults, only what must not change; it does not show `managedFields`; and everybody
may do anything (RBAC is left to tests/cluster). A quota counts as soon as it exists.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from itertools import count
from typing import Final

from asyncrl_api.parsing import SpecError, parse_spec
from asyncrl_api.times import to_text
from asyncrl_operator.api_server.schema import OPENAPI_PATH, SCHEMA
from asyncrl_operator.resources import (
    ASYNCRL_JOBS,
    CHILDREN,
    CONFIG_MAPS,
    DISRUPTION_BUDGETS,
    EVENTS,
    JOBS,
    NETWORK_POLICIES,
    NODES,
    PODS,
    SECRETS,
    STATEFUL_SETS,
    Json,
    Resource,
)
from support.cluster.api_calls import (
    Change,
    Place,
    RefusalError,
    Request,
    Target,
    conflict,
    copied,
    event_of,
    invalid,
    is_within,
    selection,
    stored_by,
)
from support.cluster.field_managers import LackingError, Owners, applied, merge_patched, updated

NAMESPACES: Final = Resource("v1", "Namespace", "namespaces")
QUOTAS: Final = Resource("v1", "ResourceQuota", "resourcequotas")
KNOWN: Final = (*CHILDREN, PODS, NODES, SECRETS, EVENTS, ASYNCRL_JOBS, NAMESPACES, QUOTAS)
CLUSTER_WIDE: Final = (NODES, NAMESPACES)
WITH_GENERATION: Final = (ASYNCRL_JOBS, STATEFUL_SETS, JOBS, NETWORK_POLICIES, DISRUPTION_BUDGETS)
WITH_STATUS: Final = (ASYNCRL_JOBS, STATEFUL_SETS, JOBS, DISRUPTION_BUDGETS, PODS, NODES, NAMESPACES, QUOTAS)
MUTABLE_IN_SETS: Final = {
    *("replicas", "template", "updateStrategy", "minReadySeconds", "ordinals", "revisionHistoryLimit"),
    "persistentVolumeClaimRetentionPolicy",
}
DEFAULT_GRACE_SECONDS = 30
FOREGROUND: Final = "foregroundDeletion"
BOOKMARK_SECONDS = 60.0
FIRST_VERSION = 100


@dataclass(frozen=True)
class Stored:
    """An object, and who owns which of its fields."""

    body: Json
    owners: Owners


class MemoryApiServer:
    """The objects, and the answers to calls.

    Args:
        crd: the CustomResourceDefinition of AsyncRLJobs; a test may cut fields out of it.
        clock: Unix time, seconds.
    """

    def __init__(self, crd: Json, clock: Callable[[], float]) -> None:
        self.crd = copied(crd)
        self.lacked: list[LackingError] = []
        """What was asked for and does not exist."""
        self.made: list[str] = []
        """The kind and name of every object that there has ever been."""
        self._clock = clock
        self._objects: dict[Place, Stored] = {}
        self._changes: list[Change] = []
        self._version = self._forgotten = FIRST_VERSION
        self._uids = count(1)
        self._pages: dict[str, tuple[str, list[Json]]] = {}
        self._watches: list[asyncio.Queue[Change | None]] = []

    def answer(self, request: Request) -> tuple[int, Json]:
        """Return the status and body of the answer to a call that is not a watch."""
        try:
            return self._answer(request)
        except RefusalError as refusal:
            return refusal.status, refusal.body
        except LackingError as error:
            self.lacked.append(error)
            raise

    @property
    def version(self) -> int:
        """The version of the last change."""
        return self._version

    def all(self, resource: Resource) -> list[Json]:
        """Return copies of all objects of a kind, in the order of their names."""
        found = sorted(place for place in self._objects if place[0] == resource.plural)
        return [copied(self._objects[place].body) for place in found]

    def store(self, resource: Resource, body: Json) -> None:
        """Replace the object of this name by one as it is, as if an earlier version had written it."""
        place = (resource.plural, body["metadata"].get("namespace", ""), body["metadata"]["name"])
        owners = self._objects[place].owners if place in self._objects else {}
        self._commit(resource, place, Stored(copied(body), owners))

    def forget(self) -> None:
        """Drop the history so far, as etcd does in time: older watches and pages are then expired."""
        self._changes.clear()
        self._pages.clear()
        self._forgotten = self._version

    def end_watches(self) -> None:
        """End all watches, as the loss of a connection would."""
        for each in self._watches:
            each.put_nowait(None)

    async def watch(self, request: Request) -> AsyncIterator[Json]:
        """Yield what happens to a collection after a version, and a bookmark each minute."""
        since = request.query.get("resourceVersion", "0")
        try:
            target, matches = self._target(request.path), selection(request.query)
            if since == "0":
                raise LackingError("a watch that begins at no version")
        except LackingError as error:
            self.lacked.append(error)
            raise
        if int(since) < self._forgotten:
            message = f"too old resource version: {since} ({self._forgotten})"
            yield {"type": "ERROR", "object": RefusalError(410, "Expired", message).body}
            return
        queue: asyncio.Queue[Change | None] = asyncio.Queue()
        for change in self._changes:
            if change.version > int(since):
                queue.put_nowait(change)
        self._watches.append(queue)
        try:
            async for told in self._told(request, queue):
                if told is None:
                    yield {"type": "BOOKMARK", "object": self._bookmark(target.resource)}
                elif event := event_of(told, target, matches):
                    yield event
        finally:
            self._watches.remove(queue)

    # -- watches

    async def _told(
        self, request: Request, queue: "asyncio.Queue[Change | None]"
    ) -> AsyncIterator[Change | None]:
        """Yield changes until the watch ends, and None when a bookmark is due."""
        now = asyncio.get_running_loop().time
        ends_at = now() + float(request.query["timeoutSeconds"])
        while True:
            try:
                async with asyncio.timeout(min(BOOKMARK_SECONDS, ends_at - now())):
                    change = await queue.get()
            except TimeoutError:
                if request.query.get("allowWatchBookmarks") == "true":
                    yield None
                if now() >= ends_at:
                    return
                continue
            if change is None:
                return
            yield change

    def _bookmark(self, resource: Resource) -> Json:
        version = {"resourceVersion": str(self._version)}
        return {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": version}

    # -- calls

    def _answer(self, request: Request) -> tuple[int, Json]:
        if request.path == OPENAPI_PATH and request.verb == "GET":
            schema = self._version_of_crd()["schema"]["openAPIV3Schema"]
            return 200, {"components": {"schemas": {SCHEMA: copied(schema)}}}
        target = self._target(request.path)
        if request.query.get("dryRun") and request.content_type != "application/apply-patch+yaml":
            raise LackingError(f"dryRun of {request.verb} {request.content_type}")
        match request.verb, request.content_type, bool(target.name):
            case "GET", _, True:
                return 200, copied(self._find(target).body)
            case "GET", _, False:
                return 200, self._page(request, target)
            case "POST", _, False:
                return 201, self._create(request, target)
            case "PATCH", "application/apply-patch+yaml", True:
                return self._apply(request, target)
            case "PATCH", "application/merge-patch+json", True:
                return 200, self._merge(request, target)
            case "DELETE", _, True:
                return 200, self._delete(request, target)
        raise LackingError(f"{request.verb} {request.path} as {request.content_type}")

    def _page(self, request: Request, target: Target) -> Json:
        query, limit = request.query, int(request.query.get("limit", "0"))
        if token := query.get("continue", ""):
            if token not in self._pages:
                message = "The provided continue parameter is too old to display a consistent list result."
                raise RefusalError(410, "Expired", message)
            version, found = self._pages[token]
        else:
            matches = selection(query)
            version = str(self._version)
            found = [each for each in self.all(target.resource) if is_within(each, target) and matches(each)]
        metadata = {"resourceVersion": version}
        if limit and len(found) > limit:
            metadata["continue"] = f"page-{len(self._pages)}-{version}"
            self._pages[metadata["continue"]] = (version, found[limit:])
            found = found[:limit]
        return {"kind": f"{target.resource.kind}List", "metadata": metadata, "items": found}

    def _create(self, request: Request, target: Target) -> Json:
        body = request.body or {}
        name = body["metadata"].get("name") or ""
        if not name:
            raise LackingError("generateName")
        target = Target(target.resource, target.namespace, name, "")
        if target.place in self._objects:
            raise RefusalError(409, "AlreadyExists", f"{target.quoted} already exists")
        owners: Owners = {}
        if target.resource in CHILDREN:
            owners = updated({}, {}, body, request.query.get("fieldManager", "unknown"))
        return self._make(target, Stored(body, owners), is_dry_run=False)

    def _apply(self, request: Request, target: Target) -> tuple[int, Json]:
        is_known = target.resource in CHILDREN and not target.subresource
        if request.query.get("force") != "true" or not is_known:
            raise LackingError("an apply without force, of a subresource, or of what is no child of a job")
        is_dry_run = request.query.get("dryRun") == "All"
        wanted, name = request.body or {}, request.query["fieldManager"]
        live = self._objects.get(target.place)
        if live is None:
            if uid := wanted["metadata"].get("uid"):
                what = f"the provided object specified uid {uid}, and no existing object was found"
                raise conflict(target, f"uid mismatch: {what}")
            body, owners = applied({}, {}, wanted, name)
            return 201, self._make(target, Stored(body, owners), is_dry_run=is_dry_run)
        body, owners = applied(live.body, live.owners, wanted, name)
        return 200, self._change(target, live, Stored(body, owners), wanted, is_dry_run=is_dry_run)

    def _merge(self, request: Request, target: Target) -> Json:
        live, patch = self._find(target), request.body or {}
        body = merge_patched(live.body, patch)
        owners = live.owners
        if target.resource in CHILDREN and not target.subresource:
            owners = updated(live.body, owners, body, request.query.get("fieldManager", "unknown"))
        return self._change(target, live, Stored(body, owners), patch, is_dry_run=False)

    def _delete(self, request: Request, target: Target) -> Json:
        live, options = self._find(target), request.body or {}
        metadata = live.body["metadata"]
        if (uid := options.get("preconditions", {}).get("uid", metadata["uid"])) != metadata["uid"]:
            what = f"Precondition failed: UID in precondition: {uid}, UID in object meta: {metadata['uid']}"
            raise conflict(target, what)
        finalizers = list(metadata.get("finalizers", ()))
        if options.get("propagationPolicy") == "Foreground" and FOREGROUND not in finalizers:
            finalizers.append(FOREGROUND)
        grace = self._grace(target.resource, live.body, options)
        if target.resource is NAMESPACES or finalizers or grace:
            body = copied(live.body)
            if finalizers:
                body["metadata"]["finalizers"] = finalizers
            body["metadata"].setdefault("deletionTimestamp", to_text(self._clock() + grace))
            if target.resource is NAMESPACES:
                body["status"] = {"phase": "Terminating"}
            return self._commit(target.resource, target.place, Stored(body, live.owners))
        gone = self._commit(target.resource, target.place, None)
        gone["metadata"]["deletionTimestamp"] = to_text(self._clock())
        done: Json = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
        return gone if target.resource is PODS else done

    def _grace(self, resource: Resource, body: Json, options: Json) -> float:
        """Return how long a deleted pod goes on; one that has no node, or has ended, goes at once."""
        spec, phase = body.get("spec", {}), body.get("status", {}).get("phase")
        if resource is not PODS or not spec.get("nodeName") or phase in ("Succeeded", "Failed"):
            return 0.0
        own = spec.get("terminationGracePeriodSeconds", DEFAULT_GRACE_SECONDS)
        return float(options.get("gracePeriodSeconds", own))

    # -- writes

    def _make(self, target: Target, made: Stored, *, is_dry_run: bool) -> Json:
        self._check_namespace(target)
        self._check_quota(target)
        body = copied(made.body)
        if target.resource in WITH_STATUS and target.resource not in (NODES, QUOTAS):
            body.pop("status", None)
        metadata = body["metadata"]
        metadata.pop("resourceVersion", None)
        metadata |= {
            "uid": str(uuid.UUID(int=next(self._uids), version=4)),
            "creationTimestamp": to_text(self._clock()),
        }
        metadata["name"] = target.name
        if target.namespace:
            metadata["namespace"] = target.namespace
        if target.resource in WITH_GENERATION:
            metadata["generation"] = 1
        body = {"apiVersion": target.resource.api_version, "kind": target.resource.kind} | body
        body = self._checked(target, body, None)
        if is_dry_run:
            return body
        self.made.append(f"{target.resource.kind} {target.name}")
        return self._commit(target.resource, target.place, Stored(body, made.owners))

    def _change(self, target: Target, live: Stored, changed: Stored, sent: Json, *, is_dry_run: bool) -> Json:
        """Store what a write may change of an object; a write that changes nothing keeps the version."""
        old, given = live.body["metadata"], sent.get("metadata", {})
        if given.get("resourceVersion", old["resourceVersion"]) != old["resourceVersion"]:
            what = (
                "the object has been modified; please apply your changes to the latest version and try again"
            )
            raise conflict(target, what)
        if target.subresource != "status" and (uid := given.get("uid", old["uid"])) != old["uid"]:
            raise invalid(target, f'metadata.uid: Invalid value: "{uid}": field is immutable')
        body = copied(changed.body if target.subresource != "status" else live.body)
        status = (live if target.subresource != "status" else changed).body.get("status")
        if target.resource in WITH_STATUS:
            body.pop("status", None)
            body |= {"status": copied(status)} if status is not None else {}
        fixed = ("uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp")
        body["metadata"] = {k: v for k, v in body["metadata"].items() if k not in fixed}
        body["metadata"] |= {k: old[k] for k in (*fixed, "name", "namespace") if k in old}
        body = self._checked(target, body, live.body)
        if "generation" in old and body.get("spec") != live.body.get("spec"):
            body["metadata"]["generation"] = old["generation"] + 1
        if is_dry_run or (body, changed.owners) == (live.body, live.owners):
            return copied(body)
        if "deletionTimestamp" in old and not body["metadata"].get("finalizers"):
            return self._commit(target.resource, target.place, None)
        return self._commit(target.resource, target.place, Stored(body, changed.owners))

    def _commit(self, resource: Resource, place: Place, stored: Stored | None) -> Json:
        """Make a change, tell the watches, and return the object as it is then or was last."""
        self._version += 1
        before = self._objects[place].body if place in self._objects else None
        if stored is None:
            assert before is not None
            del self._objects[place]
            last = copied(before)
        else:
            last = stored.body
            self._objects[place] = stored
        last["metadata"]["resourceVersion"] = str(self._version)
        old, new = (before, last) if stored is not None else (last, None)
        change = Change(self._version, resource, old, new)
        self._changes.append(change)
        for queue in self._watches:
            queue.put_nowait(change)
        return copied(last)

    # -- rules

    def _checked(self, target: Target, body: Json, live: Json | None) -> Json:
        """Return an object after the rules of its kind.

        Raises:
            RefusalError: it is invalid, or a field has changed that must not.
        """
        resource = target.resource
        if resource is ASYNCRL_JOBS:
            properties = self._version_of_crd()["schema"]["openAPIV3Schema"]["properties"]
            parts = {"properties": {name: properties[name] for name in ("spec", "status")}}
            body = body | stored_by(parts, body)
            if target.subresource:
                return body
            try:
                parse_spec(body["spec"])
            except SpecError as error:
                raise invalid(target, str(error)) from error
        old, new = (live or {}).get("spec", {}), body.get("spec", {})
        if live is None:
            return body
        if resource is STATEFUL_SETS and any(
            old.get(name) != new.get(name) for name in (old.keys() | new.keys()) - MUTABLE_IN_SETS
        ):
            raise invalid(target, "spec: Forbidden: updates to statefulset spec for fields other than "
                           f"{sorted(MUTABLE_IN_SETS)} are forbidden")  # fmt: skip
        if resource is JOBS and old.get("template") != new.get("template"):
            raise invalid(target, "spec.template: Invalid value: field is immutable")
        if resource is CONFIG_MAPS and live.get("immutable") and live.get("data") != body.get("data"):
            raise invalid(target, "data: Forbidden: field is immutable when `immutable` is set")
        return body

    def _check_namespace(self, target: Target) -> None:
        if target.resource in CLUSTER_WIDE:
            return
        found = self._objects.get((NAMESPACES.plural, "", target.namespace))
        if found is None:
            raise RefusalError(404, "NotFound", f'namespaces "{target.namespace}" not found')
        if "deletionTimestamp" in found.body["metadata"]:
            what = (
                f"unable to create new content in namespace {target.namespace} because it is being terminated"
            )
            message = f"{target.quoted} is forbidden: {what}"
            raise RefusalError(403, "Forbidden", message, "NamespaceTerminating")

    def _check_quota(self, target: Target) -> None:
        group = target.resource.api_version.rpartition("/")[0]
        counted = "count/" + ".".join(filter(None, (target.resource.plural, group)))
        have = sum(place[:2] == target.place[:2] for place in self._objects)
        for quota in self.all(QUOTAS):
            most = quota["spec"]["hard"].get(counted)
            if quota["metadata"]["namespace"] == target.namespace and most is not None and have >= int(most):
                what = f"requested: {counted}=1, used: {counted}={have}, limited: {counted}={most}"
                message = f"{target.quoted} is forbidden: exceeded quota: {quota['metadata']['name']}, {what}"
                raise RefusalError(403, "Forbidden", message)

    # -- look-ups

    def _find(self, target: Target) -> Stored:
        found = self._objects.get(target.place)
        if found is None:
            raise RefusalError(404, "NotFound", f"{target.quoted} not found")
        return found

    def _target(self, path: str) -> Target:
        parts = path.strip("/").split("/")
        version, rest = ("v1", parts[2:]) if parts[0] == "api" else ("/".join(parts[1:3]), parts[3:])
        namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        plural, name, subresource = [*rest, "", ""][:3]
        for resource in KNOWN:
            if (resource.api_version, resource.plural) == (version, plural) and subresource in ("", "status"):
                return Target(resource, namespace, name, subresource)
        raise LackingError(f"the resource of {path}")

    def _version_of_crd(self) -> Json:
        [version] = self.crd["spec"]["versions"]
        return dict(version)
