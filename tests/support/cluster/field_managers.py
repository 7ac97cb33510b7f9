"""Server-side apply: who set which field, and what an object becomes when a manager applies. Pure.

It suffices for the objects that the operator renders; a list that no table says how to merge is an error.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Json = dict[str, Any]
Path = tuple[object, ...]
"""The names of fields; an entry of a list that is merged by keys appears as the tuple of their values."""
Manager = tuple[str, str]
"""A name and an operation, Apply or Update; a client that does both is two managers."""
Owners = dict[Manager, frozenset[Path]]

KEYS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("metadata", "ownerReferences"): ("uid",),
    ("spec", "containers"): ("name",),
    ("spec", "initContainers"): ("name",),
    ("spec", "volumes"): ("name",),
    ("spec", "imagePullSecrets"): ("name",),
    ("spec", "ports"): ("port", "protocol"),
    ("containers", "env"): ("name",),
    ("containers", "ports"): ("containerPort", "protocol"),
    ("containers", "volumeMounts"): ("mountPath",),
}
"""The lists that are merged, by the field that they are in, with the fields that identify their entries."""
KEY_DEFAULTS = {"protocol": "TCP"}
ATOMIC = {
    *("accessModes", "envFrom", "from", "ingress", "items", "onPodConditions", "rules", "subjects"),
    *("preferredDuringSchedulingIgnoredDuringExecution", "tolerations", "volumeClaimTemplates"),
}
"""The lists of maps that are replaced as a whole, as all lists of numbers and strings are."""
NOT_OWNED = {
    *(("apiVersion",), ("kind",), ("status",)),
    *(("metadata", name) for name in ("name", "namespace", "uid", "resourceVersion", "generation")),
    *(("metadata", name) for name in ("creationTimestamp", "deletionTimestamp", "managedFields")),
}
"""The fields that belong to the server, and the status, which nobody applies here."""


class LackingError(NotImplementedError):
    """The API server in memory does not know how Kubernetes does this: teach it, or do without."""


def applied(live: Json, owners: Owners, wanted: Json, name: str) -> tuple[Json, Owners]:
    """Return an object after a manager has applied `wanted` by force, and who then owns what.

    What the manager applied before and now leaves out is removed, unless somebody else owns it too.
    """
    manager = (name, "Apply")
    fields = frozenset(leaves_of(wanted))
    others = {each: held for each, held in owners.items() if each != manager}
    kept = frozenset().union(*others.values())
    result = live
    for path in sorted(owners.get(manager, frozenset()) - fields, key=len):  # entries before what is in them
        if not any(other[: len(path)] == path for other in kept):
            result = _without(result, path)
    result = _merged(result, wanted)
    taken = fields & _differences(leaves_of(live), leaves_of(result))
    after = {each: held - taken for each, held in others.items()}
    return result, {each: held for each, held in (after | {manager: fields}).items() if held}


def updated(live: Json, owners: Owners, result: Json, name: str) -> Owners:
    """Return who owns what after a manager changed an object without applying: it owns what it changed."""
    before, after = leaves_of(live), leaves_of(result)
    changed = (after.keys() - before.keys()) | _differences(before, after)
    found = {each: held - changed - (before.keys() - after.keys()) for each, held in owners.items()}
    manager = (name, "Update")
    found[manager] = found.get(manager, frozenset()) | changed
    return {each: held for each, held in found.items() if held}


def _differences(before: Mapping[Path, Any], after: Mapping[Path, Any]) -> set[Path]:
    """Return the leaves whose values differ; several managers may own a list's entry, whatever is in it."""
    return {path for path, value in after.items() if path not in before or value != before[path]} - {
        path for path in after if isinstance(path[-1], tuple)
    }


def merge_patched(target: Any, patch: Any) -> Any:
    """Return a document with a JSON merge patch applied (RFC 7386)."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merge_patched(result.get(name), value)
    return result


def leaves_of(value: Any) -> dict[Path, Any]:
    """Return the value of every leaf that somebody may own, and None for every entry of a merged list."""
    return dict(_leaves(value, ()))


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if path in NOT_OWNED:
        return
    if isinstance(value, dict) and value:
        for name, below in value.items():
            yield from _leaves(below, (*path, name))
    elif isinstance(value, list) and (keys := _keys(path, value)):
        for entry in value:
            place = (*path, _key(entry, keys))
            yield place, None
            yield from _leaves(entry, place)
    elif path:
        yield path, value


def _keys(path: Path, value: Iterable[Any]) -> tuple[str, ...]:
    """Return the fields that identify the entries of a list; empty for a list that is one value.

    Raises:
        LackingError: the list is in neither table.
    """
    names = [each for each in path if isinstance(each, str)]
    name, parent = names[-1], names[-2] if len(names) > 1 else ""
    if keys := KEYS.get((parent, name)):
        return keys
    is_plain = not any(isinstance(each, dict) for each in value)
    if is_plain or name in ATOMIC or (parent, name) == ("ingress", "ports"):
        return ()
    raise LackingError(
        f"list {'.'.join(names)}: whether it is merged, and by which keys, is not in KEYS or ATOMIC"
    )


def _key(entry: Json, keys: tuple[str, ...]) -> tuple[object, ...]:
    return tuple(entry.get(each, KEY_DEFAULTS.get(each)) for each in keys)


def _merged(under: Any, over: Any, path: Path = ()) -> Any:
    if isinstance(under, dict) and isinstance(over, dict):
        result = dict(under)
        for name, value in over.items():
            place = (*path, name)
            result[name] = _merged(result[name], value, place) if name in result else value
        return result
    if isinstance(under, list) and isinstance(over, list) and (keys := _keys(path, over)):
        entries = {_key(each, keys): each for each in under}
        for each in over:
            key = _key(each, keys)
            entries[key] = _merged(entries.get(key, {}), each, path)
        return list(entries.values())
    return over


def _without(value: Any, path: Path, done: Path = ()) -> Any:
    """Return a document without the value at a path, and without the maps and lists that this empties."""
    step, rest = path[0], path[1:]
    if isinstance(value, list) and isinstance(step, tuple):
        keys = _keys(done, value)
        entries = []
        for each in value:
            if _key(each, keys) != step:
                entries.append(each)
            elif rest:
                entries.append(_without(each, rest, (*done, step)))
        return entries
    if not isinstance(value, dict) or step not in value:
        return value
    result = dict(value)
    if rest:
        result[step] = _without(result[step], rest, (*done, step))
    if not rest or result[step] in ({}, []):
        del result[step]
    return result
