"""What an edit of the spec calls for, by change mark: a new trainer attempt, or new rollout pods. Pure.

The values with which an attempt or a rollout template began are in its own configuration object, which is
created before any pod that depends on it, never changes, and exists as long as such a pod does. They are
compared with the spec field by field, under today's marks. Rendered objects are never compared, nor is a hash
over all fields, because a newer operator renders differently and knows other fields, and must not touch
running pods. After an upgrade of the types:

- A field that the remembered values lack counts as unchanged while it has its default.
- A field that is gone from the types counts as unchanged.
- A field with another mark is compared under the new mark, with the value it had at the beginning. If it was
  L, has been edited since and is R now, the trainer is restarted once: it may still run with the value it
  began with.
- A default that has changed affects new objects alone. The API server stores defaults as values whenever it
  writes an object, even if only its status; so spec and remembered values both keep the old default, and it
  cannot be told from what a user wrote. Hence an attempt that is older than a field, and still runs when a
  second upgrade changes that field's default, is restarted once: the value that has been stored for it since
  is neither what it began with nor the default. The same holds for rollout pods.

A rollout template is named after a hash of its fields. When a newer operator gives it another name, pods that
are created from then on get a configuration of the new form, and running pods stay.

If a configuration object has been deleted by hand, the hash is all that is remembered: an equal hash means
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
"""The marks that restart the trainer, and those that replace rollout pods. I is among them because some
fields marked so may change while the job is suspended."""
HASH_LENGTH = 10
LONGEST_LIST = 5
"""The maximum number of changed fields that a message names."""


def trainer_edit(spec: Spec, began: Values | None, began_hash: str) -> str:
    """Return in words which edit calls for a restart of the trainer; empty if none does.

    Args:
        began: the spec with which its attempt began, as in a manifest; None if its configuration is gone.
        began_hash: what `trainer_hash` returned for that spec, or for the spec shortly before.
    """
    if began is None:
        return "" if began_hash == trainer_hash(spec) else "a field marked R was changed"
    paths = [f"spec.{path}" for path in changed_fields(spec, began, TRAINER_MARKS)]
    rest = f" and {len(paths) - LONGEST_LIST} more" if len(paths) > LONGEST_LIST else ""
    return f"changed: {', '.join(paths[:LONGEST_LIST])}{rest}" if paths else ""


def current_templates(spec: Spec, began: Mapping[str, Values]) -> frozenset[str]:
    """Return the names of the templates whose pods need not be replaced, the newest included.

    Args:
        began: the spec with which each template began, by the template's name.
    """
    newest = rollout_hash(spec)
    others = (name for name in began if name != newest)
    return frozenset(
        {newest, *(name for name in others if not changed_fields(spec, began[name], ROLLOUT_MARKS))}
    )


def trainer_hash(spec: Spec) -> str:
    """Return a hash over the fields whose change restarts the trainer."""
    return _hash(spec, TRAINER_MARKS)


def rollout_hash(spec: Spec) -> str:
    """Return the name of the newest template: a hash over the fields whose change replaces rollout pods."""
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
    """Return a hash that changes with the value of any field with one of `marks`, and with the set of them.

    An absent field counts as null, so that equal hashes mean equal fields, whatever marks they were made for.
    """
    now = spec.model_dump(by_alias=True, exclude_none=True)
    values = {path: _at(now, path) for path in _paths(type(spec), marks)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:HASH_LENGTH]


@functools.cache
def _paths(model: type[Spec], marks: str) -> tuple[str, ...]:
    return tuple(node.path for node in _settings(tree(model)) if node.mark in marks)


def _settings(nodes: Iterable[FieldNode]) -> Iterator[FieldNode]:
    """Yield the fields that have values of their own, except sizes."""
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
