"""The calls of the API in memory: what each is about, its answer, and the events of a watch. Pure."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from asyncrl_operator.resources import Json, Resource
from support.cluster.field_managers import LackingError

T = TypeVar("T")
Place = tuple[str, str, str]
"""The plural, namespace and name of an object."""


class RefusalError(Exception):
    """An answer with a status of 400 or more."""

    def __init__(self, status: int, reason: str, message: str, *causes: str) -> None:
        super().__init__(message)
        details = {"causes": [{"reason": each} for each in causes]} if causes else {}
        self.status = status
        self.body: Json = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status}
        self.body |= {"reason": reason, "message": message, "details": details}


@dataclass(frozen=True)
class Change:
    """What has happened to one object."""

    version: int
    resource: Resource
    before: Json | None
    after: Json | None
    """None: it is gone."""


@dataclass
class Request:
    """A call, as a client makes it."""

    verb: str
    path: str
    query: dict[str, str] = field(default_factory=dict)
    body: Json | None = None
    content_type: str = "application/json"

    @property
    def is_watch(self) -> bool:
        return self.query.get("watch") == "true"


@dataclass(frozen=True)
class Target:
    """The collection or object that a path stands for."""

    resource: Resource
    namespace: str
    name: str
    subresource: str

    @property
    def place(self) -> Place:
        return (self.resource.plural, self.namespace, self.name)

    @property
    def quoted(self) -> str:
        """The name that errors use for it."""
        return f'{".".join(filter(None, (self.resource.plural, self.group)))} "{self.name}"'

    @property
    def group(self) -> str:
        """The API group; empty for the core kinds of Kubernetes."""
        return self.resource.api_version.rpartition("/")[0]


def invalid(target: Target, message: str) -> RefusalError:
    """Return the refusal of an invalid object."""
    kind = ".".join(filter(None, (target.resource.kind, target.group)))
    return RefusalError(422, "Invalid", f'{kind} "{target.name}" is invalid: {message}')


def conflict(target: Target, why: str) -> RefusalError:
    """Return the refusal of a write that was made for another state of the object."""
    message = f"Operation cannot be fulfilled on {target.quoted}: {why}"
    return RefusalError(409, "Conflict", message)


def is_within(body: Json, target: Target) -> bool:
    """Whether an object is in the namespace of a collection."""
    return not target.namespace or body["metadata"].get("namespace") == target.namespace


def event_of(change: Change, target: Target, matches: Callable[[Json], bool]) -> Json | None:
    """Return the event that a watch gets for a change; what its selector no longer matches is gone."""
    if change.resource is not target.resource or not is_within(change.after or change.before or {}, target):
        return None
    was_in = change.before is not None and matches(change.before)
    is_in = change.after is not None and matches(change.after)
    if not (was_in or is_in):
        return None
    kind = "MODIFIED" if was_in and is_in else "ADDED" if is_in else "DELETED"
    return {"type": kind, "object": copied(change.after or change.before)}


def selection(query: dict[str, str]) -> Callable[[Json], bool]:
    """Return whether an object matches the label and field selectors."""
    labels = [each.partition("=") for each in query.get("labelSelector", "").split(",") if each]
    fields = [each.partition("=") for each in query.get("fieldSelector", "").split(",") if each]
    is_simple = not any(set(name) & set("!() ") for name, _, _ in (*labels, *fields))
    if not is_simple or not all(eq for _, eq, _ in fields):
        raise LackingError(f"selectors {query}")

    def matches(body: Json) -> bool:
        has = body["metadata"].get("labels", {})
        return all(name in has and (not eq or has[name] == value) for name, eq, value in labels) and all(
            _field(body, name) == value for name, _, value in fields
        )

    return matches


def _field(body: Any, path: str) -> str:
    for name in path.split("."):
        body = body.get(name, {})
    return str(body or "")


def stored_by(schema: Json, value: Any) -> Any:
    """Return a value as it is stored under a structural schema: with defaults, without unknown fields."""
    if isinstance(value, list):
        return [stored_by(schema.get("items", {}), each) for each in value]
    if not isinstance(value, dict):
        return value
    if below := schema.get("additionalProperties"):
        return {name: stored_by(below, each) for name, each in value.items()}
    properties = schema.get("properties")
    if properties is None:
        return value
    result: Json = {}
    for name, inner in properties.items():
        given = value.get(name)
        if given is None and "default" in inner:
            given = copied(inner["default"])
        if given is not None:
            result[name] = stored_by(inner, given)
    return result


def copied(body: T) -> T:
    """Return an independent copy of an object, as if it had been sent and read."""
    copy: T = msgspec.json.decode(encoded(body))
    return copy


def encoded(body: Any) -> bytes:
    """Return an answer, or an event, as it is sent."""
    return msgspec.json.encode(body)
