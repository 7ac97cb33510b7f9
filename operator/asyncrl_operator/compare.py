"""Checks whether a live object contains what was rendered; the API server and others add to it. Pure."""

from collections.abc import Mapping
from typing import Any


def first_difference(wanted: Any, live: Any, path: str = "") -> str:
    """Return the path of a field that is not as wanted; empty if there is none.

    Whatever else `live` has is ignored: defaults, and fields of other managers. Lists must be as long as
    wanted, except owner references, to which anybody may add.
    """
    if isinstance(wanted, Mapping):
        if not isinstance(live, Mapping):
            return path or "."
        for name, value in wanted.items():
            below = f"{path}.{name}"
            if name not in live:
                if _is_empty(value):
                    continue  # the API server drops empty maps and lists
                return below
            if found := first_difference(value, live[name], below):
                return found
        return ""
    if isinstance(wanted, list):
        if not isinstance(live, list):
            return path
        if path.endswith(".ownerReferences"):
            return "" if all(any(not first_difference(w, have) for have in live) for w in wanted) else path
        if len(wanted) != len(live):
            return path
        differences = (first_difference(w, have, f"{path}[]") for w, have in zip(wanted, live, strict=True))
        return next(filter(None, differences), "")
    return "" if wanted == live else path or "."


def merge_patch(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON merge patch (RFC 7386) that turns `old` into `new`; empty if they are equal."""
    patch: dict[str, Any] = {name: None for name in old if name not in new}
    for name, value in new.items():
        before = old.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            if below := merge_patch(before, value):
                patch[name] = below
        elif name not in old or value != before:
            patch[name] = value
    return patch


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping | list) and not value)
