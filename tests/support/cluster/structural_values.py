"""Checks a value against a structural schema, as an API server does that stores a custom resource."""

from collections.abc import Iterator, Mapping
from typing import Any

from asyncrl_api.times import is_time

KINDS: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}
INT64 = 2**63


def faults(schema: Mapping[str, Any], value: Any, path: str = "status") -> Iterator[str]:
    """Yield why the API server would refuse a value; nothing if it would take it."""
    kind: str = schema["type"]
    checked: Any = value
    if not isinstance(value, KINDS[kind]) or (isinstance(value, bool) and kind != "boolean"):
        yield f"{path}: {value!r:.80} is no {kind}"
        return
    if kind == "object":
        yield from _of_object(schema, checked, path)
    elif kind == "array":
        for number, each in enumerate(checked):
            yield from faults(schema["items"], each, f"{path}[{number}]")
        if len(checked) > schema.get("maxItems", len(checked)):
            yield f"{path}: {len(checked)} items"
    elif kind == "string":
        yield from _of_string(schema, checked, path)
    elif kind in ("integer", "number"):
        lowest, highest = schema.get("minimum", -INT64), schema.get("maximum", INT64 - 1)
        if not lowest <= value <= highest:
            yield f"{path}: {value} is not from {lowest} to {highest}"


def _of_object(schema: Mapping[str, Any], value: Mapping[str, Any], path: str) -> Iterator[str]:
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{path}.{name} is missing"
    for name, each in value.items():
        below = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
        if below is not None:
            yield from faults(below, each, f"{path}.{name}")


def _of_string(schema: Mapping[str, Any], value: str, path: str) -> Iterator[str]:
    if len(value) > schema.get("maxLength", len(value)):
        yield f"{path}: {len(value)} characters"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: {value!r:.80} is none of {schema['enum']}"
    if schema.get("format") == "date-time" and not is_time(value):
        yield f"{path}: {value!r} is no date-time"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        yield f"{path}: {error}"
