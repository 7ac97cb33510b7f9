"""What an edit of the spec asks for, by change mark: a new attempt of the trainer, or new rollout pods. Pure.

The values with which an attempt or a rollout template began are in its own configuration object, which is
made before any pod that rests on it, never changes, and is there as long as such a pod. They are compared
with the spec field by field, under the marks of today; never rendered objects, and never a hash over all
fields, for a newer operator renders otherwise and knows other fields, and must not touch pods that run.
After an upgrade of the types:

- A field that the remembered values lack counts as unchanged while it has its default.
- A field that is gone from the types counts as unchanged.
- A field with another mark is compared under the new one, with the value of the beginning. If it was L, was
  edited meanwhile and is R now, the trainer is restarted once: it may still run with the value it began with.
- A default that has changed acts on new objects alone. The API server stores defaults as values whenever it
  writes an object, and be it the status alone; so spec and remembered values both keep the old one, and what
  a user wrote cannot be told from it. Hence an attempt that is older than a field, and still runs when a
  second upgrade changes the default of that field, is restarted once: the value that was stored for it
  meanwhile is neither what it began with nor the default. Rollout pods likewise.

A rollout template is named after a hash of its fields. When a newer operator gives it another name, pods that
are made from then on get a configuration in its words, and those that run stay.

Where a configuration object has been deleted by hand, the hash is all that is remembered: an equal one says
that nothing has changed, and any other counts as a change.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from asyncrl_api.job import Spec
from asyncrl_api.marks import FieldNode, tree
from asyncrl_api.structural import plain
from asyncrl_operator.decide.observed import Values

TRAINER_MARKS, ROLLOUT_MARKS = "RI", "UI"
"""What a trainer is restarted for, and what rollout pods are replaced for. Some fields marked I may change
while the job is suspended."""
HASH_LENGTH = 10
LONGEST_LIST = 5
"""Changed fields that a message names."""


def trainer_edit(spec: Spec, began: Values | None, began_hash: str) -> str:
    """Return for which edit the trainer has to be restarted, in words; empty: for none.

    Args:
        began: the spec with which its attempt began, as in a manifest; None: its configuration is gone.
        began_hash: what `trainer_hash` gave for it, or for the spec of shortly before.
    """
    if began is None:
        return "" if began_hash == trainer_hash(spec) else "a field marked R was changed"
    paths = [f"spec.{path}" for path in changed_fields(spec, began, TRAINER_MARKS)]
    rest = f" and {len(paths) - LONGEST_LIST} more" if len(paths) > LONGEST_LIST else ""
    return f"changed: {', '.join(paths[:LONGEST_LIST])}{rest}" if paths else ""


def current_templates(spec: Spec, began: Mapping[str, Values]) -> frozenset[str]:
    """Return the names of the templates whose pods need not be replaced, with that of the newest.

    Args:
        began: the spec with which each template began, by the template's name.
    """
    newest = rollout_hash(spec)
    others = (name for name in began if name != newest)
    return frozenset(
        {newest, *(name for name in others if not changed_fields(spec, began[name], ROLLOUT_MARKS))}
    )


def trainer_hash(spec: Spec) -> str:
    """Return a hash over the fields that a trainer is restarted for."""
    return _hash(spec, TRAINER_MARKS)


def rollout_hash(spec: Spec) -> str:
    """Return the name of the newest template: a hash over the fields that rollout pods are replaced for."""
    return _hash(spec, ROLLOUT_MARKS)


def changed_fields(spec: Spec, began: Values, marks: str) -> list[str]:
    """Return the paths of the fields with one of `marks` that are not what they were in `began`."""
    now = spec.model_dump(by_alias=True, exclude_none=True)
    return [node.path for node in _changed(tree(type(spec)), began, now) if node.mark in marks]


def _changed(nodes: Iterable[FieldNode], began: Values, now: Values) -> Iterator[FieldNode]:
    for node in nodes:
        if node.is_size:
            continue
        name = node.name
        before = began[name] if name in began else plain(node.info.default)
        after = now.get(name)
        if not node.children:
            if not _is_equal(before, after):
                yield node
        elif isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _changed(node.children, before, after)
        elif before is not after:  # an optional block came or went, with all its fields
            yield from _settings(node.children)


def _hash(spec: Spec, marks: str) -> str:
    """Return a hash that differs wherever a field with one of `marks` does, or such fields are others.

    With an absent field as null, so that an equal hash means equal fields, under whatever marks it was made.
    """
    now = spec.model_dump(by_alias=True, exclude_none=True)
    values = {path: _at(now, path) for path in _paths(type(spec), marks)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:HASH_LENGTH]


@functools.cache
def _paths(model: type[Spec], marks: str) -> tuple[str, ...]:
    return tuple(node.path for node in _settings(tree(model)) if node.mark in marks)


def _settings(nodes: Iterable[FieldNode]) -> Iterator[FieldNode]:
    """Yield the fields that have a value of their own, without sizes."""
    for node in nodes:
        if node.is_size:
            continue
        if node.children:
            yield from _settings(node.children)
        else:
            yield node


def _at(values: Values, path: str) -> Any:
    below: Any = values
    for name in path.split("."):
        if below is None:
            return None
        below = below.get(name)
    return below


def _is_equal(one: Any, other: Any) -> bool:
    """Whether two values are the same in JSON: true is not 1, as it is in Python; 1.0 is 1, as in the API."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_is_equal(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_equal, one, other))
    return bool(one == other)
