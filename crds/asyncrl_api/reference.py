"""Renders the page that lists every field of an AsyncRLJob, from the types, like the CRD."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from asyncrl_api.base import MAX_INT, PATTERN_WORDS
from asyncrl_api.job import Spec
from asyncrl_api.marks import FieldNode, tree
from asyncrl_api.structural import leaf_schema, plain, status_schema

INTRODUCTION = """\
# Every field of an AsyncRLJob

Generated from the types by `make crd`. The mark of a field says what an edit of a running job does. **I**:
the field is immutable, and the edit is refused. **L**: the edit is applied live. **U**: the rollout pods are
replaced in waves. **R**: the trainer restarts from a checkpoint. **I\\***: the field may change while the job
is suspended, and in the update that sets or clears `suspend`. Rules across fields are reported by
`asyncrl validate` and by `kubectl apply`, in the same words.
"""
STATUS = """\
## status

Only the operator writes it.

| field | type | meaning |
|---|---|---|
"""


def render_reference() -> str:
    """Return the page: the spec's fields with mark, type, bounds and default, then the status's fields."""
    blocks = [_block(top) for top in tree(Spec, "spec.") if top.children]
    others = _table([top for top in tree(Spec, "spec.") if not top.children])
    status = STATUS + "\n".join(_status_lines(status_schema(), "status")) + "\n"
    return "\n".join([INTRODUCTION, *blocks, f"## Other fields of spec\n\n{others}", status])


def _block(block: FieldNode) -> str:
    about = f"{block.info.description}{' Required.' if block.info.is_required() else ''}"
    return f"## {block.path}\n\n{about}\n\n{_table(block.walk())}"


def _table(nodes: Iterator[FieldNode] | list[FieldNode]) -> str:
    head = "| field | mark | type | default | meaning |\n|---|---|---|---|---|\n"
    return head + "\n".join(_line(node) for node in nodes if not _is_plain_block(node)) + "\n"


def _is_plain_block(node: FieldNode) -> bool:
    """Whether a block needs no line of its own: it is always present, and its fields say everything."""
    return bool(node.children) and not node.is_optional


def _line(node: FieldNode) -> str:
    mark = f"{node.mark}\\*" if node.is_free_while_suspended else node.mark
    kind = "block" if node.children else _kind(leaf_schema(node))
    return _row(f"`{node.path}`", mark, kind, _default(node), node.info.description or "")


def _status_lines(schema: Mapping[str, Any], path: str) -> Iterator[str]:
    for name, below in schema["properties"].items():
        here = f"{path}.{name}"
        entries = below.get("items", below)
        if below.get("type") == "array":
            here += "[]"
        if "properties" in entries:
            yield from _status_lines(entries, here)
        else:
            yield _row(f"`{here}`", _kind(below), below.get("description", ""))


def _row(*cells: str) -> str:
    escaped = [re.sub(r"([|<])", r"\\\1", cell) for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _kind(schema: Mapping[str, Any]) -> str:
    """Return the type and its bounds in words."""
    if "x-kubernetes-int-or-string" in schema:
        return "integer or Auto"
    kind: str = schema["type"]
    if "enum" in schema:
        return " | ".join(each or '""' for each in schema["enum"])
    if kind in ("integer", "number"):
        return " ".join(filter(None, [kind, _range(schema)]))
    if kind == "array":
        return f"list of {_items(schema['items'])}, at most {schema['maxItems']}"
    if "pattern" in schema:
        return PATTERN_WORDS[schema["pattern"]].removeprefix("must be ")
    if kind == "string" and "format" not in schema:
        least = "1 to " if schema.get("minLength") else "at most "
        return f"string of {least}{schema['maxLength']} characters"
    return str(schema.get("format", kind))


def _range(schema: Mapping[str, Any]) -> str:
    lowest, highest = schema.get("minimum"), schema.get("maximum")
    if lowest is None:
        return ""
    if highest in (None, MAX_INT):
        return f"above {lowest:g}" if schema.get("exclusiveMinimum") else f"from {lowest:g}"
    return f"{'above ' if schema.get('exclusiveMinimum') else ''}{lowest:g} to {highest}"


def _items(schema: Mapping[str, Any]) -> str:
    if "properties" in schema:
        return f"{{{', '.join(schema['properties'])}}}"
    return f"{schema['type']}s"


def _default(node: FieldNode) -> str:
    if node.info.is_required():
        return "required"
    return "absent" if node.is_optional else f"`{json.dumps(plain(node.info.default))}`"
