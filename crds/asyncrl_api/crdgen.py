"""From the types to the CustomResourceDefinition, the reference page and nothing else: `make crd`.

The schema is structural (KEP-1979 rules), with all defaults written out, since a `default: {}` on an object
with rules is refused, and every string and list bounded, since the API server derives the cost of CEL rules
from the bounds.
"""

import argparse
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, create_model
from ruamel.yaml import YAML

from asyncrl_api.job import API_VERSION, KIND, AsyncRLJob, Spec
from asyncrl_api.marks import FieldNode, block_of, tree
from asyncrl_api.rules import Rule, all_rules
from asyncrl_api.status import Status

GROUP, VERSION = API_VERSION.split("/")
PLURAL = "asyncrljobs"
FILE_NAME = f"{GROUP}_{PLURAL}.yaml"
MAX_BYTES = 128 * 1024
"""Half of what an annotation may hold, where client-side `kubectl apply` keeps a copy."""
MAX_ITEMS = 64
MAX_LENGTH = 1024
"""Bounds of what the types leave unbounded: parts of a status, which no rule reads."""
REPLICAS = ".spec.gpuBudget.total"

COLUMNS = (
    ("Phase", "string", ".status.phase", 0),
    ("Step", "string", ".status.progress.summary", 0),
    ("Trainer", "string", '.status.groups[?(@.name=="trainer")].summary', 0),
    ("Rollout", "string", '.status.groups[?(@.name=="rollout")].summary', 0),
    ("GPUs", "string", ".status.gpus.summary", 0),
    ("Staleness", "integer", ".status.staleness.p95", 0),
    ("Reward", "string", ".status.reward.mean", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Attempt", "integer", ".status.attempt.number", 1),
    ("Checkpoint", "integer", ".status.lastCheckpoint.step", 1),
    ("Message", "string", ".status.message", 1),
)
"""Name, type, path, priority: 1 shows with `-o wide` alone."""
MAP_KEYS = {"conditions": "type", "groups": "name", "podSets": "name"}
"""Lists of the status in which an entry has a name."""


def build_crd() -> dict[str, Any]:
    """Return the CustomResourceDefinition."""
    columns = [
        {"name": name, "type": kind, "jsonPath": path} | ({"priority": priority} if priority else {})
        for name, kind, path, priority in COLUMNS
    ]
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": _root()},
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": REPLICAS,
                "statusReplicasPath": ".status.gpus.allocated",
                "labelSelectorPath": ".status.selector",
            },
        },
        "additionalPrinterColumns": columns,
    }
    names = {
        "kind": KIND,
        "listKind": f"{KIND}List",
        "plural": PLURAL,
        "singular": KIND.lower(),
        "shortNames": ["arl"],
        "categories": ["asyncrl"],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {"group": GROUP, "names": names, "scope": "Namespaced", "versions": [version]},
    }


def render_crd() -> str:
    """Return the CustomResourceDefinition as YAML."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 110
    text = io.StringIO()
    text.write("# Made from crds/asyncrl_api by `make crd`; change the types, not this file.\n")
    yaml.dump(build_crd(), text)
    return text.getvalue()


# -- schema


def _root() -> dict[str, Any]:
    spec: dict[str, Any] = {
        "type": "object",
        "description": Spec.__doc__,
        "properties": {node.name: _field_schema(node) for node in tree(Spec)},
        "required": [node.name for node in tree(Spec) if node.info.is_required()],
    }
    root = {
        "type": "object",
        "description": AsyncRLJob.__doc__,
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": _status_schema(),
        },
    }
    for rule in all_rules():
        _at(root, rule.path).setdefault("x-kubernetes-validations", []).append(_validation(rule))
    return root


def _field_schema(node: FieldNode) -> dict[str, Any]:
    """Return the schema of a field of the spec, with all that is below it."""
    if node.children:
        block = block_of(node.info.annotation)
        assert block is not None
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {child.name: _field_schema(child) for child in node.children},
        }
        if required := [child.name for child in node.children if child.info.is_required()]:
            schema["required"] = required
    else:
        schema = _leaf_schema(node)
    schema = {**schema, "description": node.description}
    if not node.info.is_required() and node.info.default is not None:
        schema["default"] = _plain(node.info.default)
    return schema


def _leaf_schema(node: FieldNode) -> dict[str, Any]:
    extra = node.info.json_schema_extra
    list_type = extra.get("x-asyncrl-listType") if isinstance(extra, dict) else None
    holder = create_model("Holder", value=(node.info.annotation or Any, node.info))
    schema = holder.model_json_schema(by_alias=True)
    name = next(iter(schema["properties"]))
    found = _structural(schema["properties"][name], schema.get("$defs", {}))
    if found["type"] == "array":
        found["x-kubernetes-list-type"] = list_type or "atomic"
    return found


def _status_schema() -> dict[str, Any]:
    schema = Status.model_json_schema(by_alias=True, mode="serialization")
    status = _structural(schema, schema.get("$defs", {}))
    for name, key in MAP_KEYS.items():
        status["properties"][name] |= {
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": [key],
        }
    # kstatus and Flux take an object without a status for one that is done.
    return {"description": Status.__doc__, **status, "default": {"observedGeneration": -1}}


def _structural(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """Return pydantic's JSON schema as Kubernetes takes it: no references, unions or titles."""
    description = {"description": text} if (text := schema.get("description")) else {}
    if "$ref" in schema:
        below = _structural(definitions[schema["$ref"].rpartition("/")[2]], definitions)
        return {**below, **description}
    if "anyOf" in schema:  # of X and null: absent is absent, and a null is refused
        (inner,) = (each for each in schema["anyOf"] if each.get("type") != "null")
        return {**_structural(inner, definitions), **description}
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


def _plain(value: Any) -> Any:
    """Return a default as it is written in a manifest, with all defaults below it."""
    if isinstance(value, BaseModel):
        return value.model_dump(by_alias=True, exclude_none=True, mode="json")
    return value


def _validation(rule: Rule) -> dict[str, Any]:
    fields = {"rule": rule.rule, "messageExpression": rule.message_expression, "reason": "FieldValueInvalid"}
    # A path that the schema of this place does not have (metadata.name) is refused.
    return fields if rule.path == "" or not rule.field_path else {**fields, "fieldPath": rule.field_path}


def _at(root: dict[str, Any], path: str) -> dict[str, Any]:
    for name in filter(None, path.split(".")):
        root = root["properties"][name]
    return root


# -- reference page


def render_reference() -> str:
    """Return the page that lists every field with its mark, default and bounds."""
    lines = [
        "# Every field of an AsyncRLJob",
        "",
        "Made from the types by `make crd`. Marks: **I** immutable (* may change while suspended),",
        "**L** live, **U** rollout pods are replaced in waves, **R** the trainer restarts from a checkpoint.",
        "",
        "| field | mark | type | default | meaning |",
        "|---|---|---|---|---|",
    ]
    for top in tree(Spec, "spec."):
        lines += [_reference_line(node) for node in top.walk()]
    return "\n".join(lines) + "\n"


def _reference_line(node: FieldNode) -> str:
    if node.children:
        kind, default = "block", "absent" if node.is_optional else ""
    else:
        kind = _kind_in_words(_leaf_schema(node))
        default = _default_in_words(node)
    exception = " *" if node.is_free_while_suspended else ""
    text = (node.info.description or "").replace("|", "\\|")
    return f"| `{node.path}` | {node.mark}{exception} | {kind} | {default} | {text} |"


def _kind_in_words(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return " \\| ".join(schema["enum"])
    bounds = [str(schema[name]) if name in schema else "" for name in ("minimum", "maximum")]
    if schema["type"] in ("integer", "number") and any(bounds):
        return f"{schema['type']}, {bounds[0]} .. {bounds[1]}"
    return str(schema["type"])


def _default_in_words(node: FieldNode) -> str:
    if node.info.is_required():
        return "required"
    if node.is_optional:
        return "absent"
    default = _plain(node.info.default)
    return f"`{default!r}`" if default != "" else '`""`'


# -- command


def files(root: Path) -> dict[Path, str]:
    """Return what `make crd` writes below the repository's root."""
    crd = render_crd()
    return {
        root / "crds" / FILE_NAME: crd,
        root / "charts" / "asyncrl" / "files" / FILE_NAME: crd,
        root / "docs" / "reference.md": render_reference(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the CRD and the reference page.")
    parser.add_argument("root", type=Path, nargs="?", default=Path(), help="Of the repository.")
    for path, text in files(parser.parse_args().root).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(f"{path}: {len(text.encode()) // 1024} KiB")


if __name__ == "__main__":
    main()
