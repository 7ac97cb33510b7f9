"""Edits of each field of the API: of its value, and where it is optional its coming and going."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from asyncrl_api.job import Spec
from asyncrl_api.marks import FieldNode, tree
from asyncrl_api.structural import leaf_schema
from asyncrl_operator.decide.observed import Values
from support.cluster.model_cluster import make_spec

NODES = {node.path: node for top in tree(Spec) for node in top.walk()}
EXAMPLES = (
    *(True, False, 3, 4, 1, 0.5, 0.25, 2.5, "other", "7Gi", {"other": "x"}),
    *(["other"], [3], [{"key": "x"}], [{"name": "x"}]),
)
"""Values of which each field takes some; validation is strict, so it takes only those of its type."""


def wire(spec: Spec) -> dict[str, Any]:
    """Return a spec as the API server holds it: with all defaults."""
    return spec.model_dump(by_alias=True, exclude_none=True)


def at(values: Values, path: str) -> Any:
    """Return what is at a path; None: nothing."""
    below: Any = values
    for name in path.split("."):
        below = below.get(name) if isinstance(below, Mapping) else None
    return below


def put(values: Values, path: str, value: Any) -> dict[str, Any]:
    """Return a copy with another value at a path; None: with nothing there."""
    changed: dict[str, Any] = copy.deepcopy(dict(values))
    *blocks, name = path.split(".")
    below = changed
    for block in blocks:
        below = below[block]
    below.pop(name, None)
    if value is not None:
        below[name] = value
    return changed


def values_of(node: FieldNode) -> Iterator[Any]:
    """Yield values that a field takes, of which a block has one."""
    if node.children:
        yield {child.name: next(values_of(child)) for child in node.children if child.info.is_required()}
        return
    annotation: Any = node.info.annotation
    if node.info.metadata:
        annotation = Annotated[(annotation, *node.info.metadata)]
    adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(strict=True))
    for example in (*leaf_schema(node).get("enum", ()), *EXAMPLES):
        try:
            adapter.validate_python(example)
        except ValidationError:
            continue
        yield example


def with_all_blocks(values: Values) -> dict[str, Any]:
    """Return a spec in which each optional block and field is there."""
    for node in NODES.values():
        if node.is_optional and at(values, node.path) is None:
            values = put(values, node.path, next(values_of(node)))
    return wire(Spec.model_validate(values))


BARE = wire(make_spec())
FULL = with_all_blocks(BARE)


@dataclass(frozen=True)
class Edit:
    """One field of a spec is edited, added or removed."""

    node: FieldNode
    kind: str
    before: dict[str, Any]
    after: dict[str, Any]

    @property
    def spec(self) -> Spec:
        return Spec.model_validate(self.after)


def edits_of(bare: dict[str, Any], full: dict[str, Any]) -> Iterator[Edit]:
    """Yield edits of a spec without optional blocks and of one with all of them, some for each field."""
    for path, node in NODES.items():
        if not node.children:
            for value in values_of(node):
                edited = put(full, path, value)
                if edited != full and wire(Spec.model_validate(edited)) != full:
                    yield Edit(node, "edited", full, edited)
                    break
        if node.is_optional:
            yield Edit(node, "added", bare, put(bare, path, at(full, path)))
            yield Edit(node, "removed", full, put(full, path, None))
