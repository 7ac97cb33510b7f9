"""Turns our types into the structural schemas that a CustomResourceDefinition takes.

Structural means: a type for every value, no references, no unions
(https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/). Defaults
are written out in full, since a `default: {}` on an object with rules is refused, and every string and list
is bounded, since the API server derives the cost of CEL rules from the bounds.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, create_model

from asyncrl_api.job_status import Status
from asyncrl_api.marks import FieldNode, block_of

MAX_ITEMS = 64
MAX_LENGTH = 1024
"""Bounds for what the types leave unbounded: parts of the status, which no rule reads."""
MAP_KEYS = {"conditions": "type", "groups": "name", "podSets": "name"}
"""Lists of the status whose entries have names, each with the field that holds the name."""


def field_schema(node: FieldNode) -> dict[str, Any]:
    """Return the schema of a field of the spec, including all fields below it."""
    if node.children:
        block = block_of(node.info.annotation)
        assert block is not None
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {child.name: field_schema(child) for child in node.children},
        }
        if required := [child.name for child in node.children if child.info.is_required()]:
            schema["required"] = required
    else:
        schema = leaf_schema(node)
    schema = {**schema, "description": node.description}
    if not node.info.is_required() and node.info.default is not None:
        schema["default"] = plain(node.info.default)
    return schema


def leaf_schema(node: FieldNode) -> dict[str, Any]:
    """Return the schema of a field that is not a block."""
    extra = node.info.json_schema_extra
    list_type = extra.get("x-asyncrl-listType") if isinstance(extra, dict) else None
    holder = create_model("Holder", value=(node.info.annotation or Any, node.info))
    schema = holder.model_json_schema(by_alias=True)
    name = next(iter(schema["properties"]))
    found = _structural(schema["properties"][name], schema.get("$defs", {}))
    if found.get("type") == "array":
        found["x-kubernetes-list-type"] = list_type or "atomic"
    return found


def status_schema() -> dict[str, Any]:
    """Return the schema of the status."""
    schema = Status.model_json_schema(by_alias=True, mode="serialization")
    status = _structural(schema, schema.get("$defs", {}))
    for name, key in MAP_KEYS.items():
        status["properties"][name] |= {
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": [key],
        }
    # kstatus and Flux take an object without a status to be done.
    return {"description": Status.__doc__, **status, "default": {"observedGeneration": -1}}


def _structural(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """Return pydantic's JSON schema as Kubernetes takes it: without references, unions and titles."""
    description = {"description": text} if (text := schema.get("description")) else {}
    if "$ref" in schema:
        below = _structural(definitions[schema["$ref"].rpartition("/")[2]], definitions)
        return {**below, **description}
    if "anyOf" in schema:  # X or null: an absent value is absent, and a null is refused
        inner = [each for each in schema["anyOf"] if each.get("type") != "null"]
        if {each.get("type") for each in inner} == {"integer", "string"}:  # a rule says which strings
            return {**description, "x-kubernetes-int-or-string": True, "maxLength": MAX_LENGTH}
        (only,) = inner
        return {**_structural(only, definitions), **description}
    kind = schema["type"]
    return {**description, "type": kind, **_of_kind(kind, schema, definitions)}


def _of_kind(kind: str, schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    if kind == "object":
        return _object_schema(schema, definitions)
    if kind == "array":
        items = _structural(schema["items"], definitions)
        return {"items": items, "maxItems": schema.get("maxItems", MAX_ITEMS)}
    if kind == "string":
        enum = schema.get("enum") or ([schema["const"]] if "const" in schema else None)
        if enum is not None:
            return {"enum": enum}
        known = {name: schema[name] for name in ("minLength", "pattern", "format") if name in schema}
        return {"maxLength": schema.get("maxLength", MAX_LENGTH), **known}
    if kind == "boolean":
        return {}
    bounds = {name: schema[name] for name in ("minimum", "maximum") if name in schema}
    if "exclusiveMinimum" in schema:
        bounds |= {"minimum": schema["exclusiveMinimum"], "exclusiveMinimum": True}
    return ({"format": "int64"} if kind == "integer" else {}) | bounds


def _object_schema(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    if "properties" in schema:
        properties = {name: _structural(each, definitions) for name, each in schema["properties"].items()}
        required = {"required": names} if (names := schema.get("required")) else {}
        return {"properties": properties, **required}
    values = schema.get("additionalProperties")
    most = {"maxProperties": schema.get("maxProperties", MAX_ITEMS)}
    if isinstance(values, Mapping):
        return {"additionalProperties": _structural(values, definitions), **most}
    return {"x-kubernetes-preserve-unknown-fields": True}


def plain(value: Any) -> Any:
    """Return a default as a manifest would write it, with all defaults below it."""
    if isinstance(value, BaseModel):
        return value.model_dump(by_alias=True, exclude_none=True, mode="json")
    return value
