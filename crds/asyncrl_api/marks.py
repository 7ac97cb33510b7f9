"""Change marks: what happens when a field of an existing job is edited, declared once, beside the field.

`I`: immutable, the API server refuses the edit. `L`: applied live. `U`: the rollout pods are replaced in
waves. `R`: the trainer restarts from a checkpoint. A block hands its mark down to the fields below it,
unless they have their own.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

Mark = Literal["I", "L", "U", "R"]
ListType = Literal["atomic", "set", "map"]

_ORDER = "ILUR"


def field(
    description: str,
    *,
    mark: Mark | None = None,
    default: Any = PydanticUndefined,
    list_type: ListType | None = None,
    free_while_suspended: bool = False,
    is_size: bool = False,
    **constraints: Any,
) -> Any:
    """Declare a field of the API.

    Args:
        description: what `kubectl explain` shows, after the mark.
        mark: the change mark; None means that of the block above, or a block whose fields differ.
        default: a field without one is required.
        list_type: how the list is merged when two managers apply it; `x-kubernetes-list-type` of the CRD.
        free_while_suspended: an exception to mark I: the field may change while the job is suspended, and
            in the update that sets or clears `suspend`.
        is_size: whether the field is an amount that the job has, not a setting: the operator decides on it
            and keeps it in the status, so that an edit resizes what runs and never restarts it.
        constraints: constraints that pydantic's `Field` takes.
    """
    extra = {
        "mark": mark,
        "listType": list_type,
        "freeWhileSuspended": free_while_suspended,
        "isSize": is_size,
    }
    return Field(
        default,
        description=description,
        json_schema_extra={f"x-asyncrl-{key}": value for key, value in extra.items() if value},
        **constraints,
    )


@dataclass(frozen=True)
class FieldNode:
    """A field of the API at its place in the manifest, its mark resolved."""

    path: str
    """The names in the manifest, from the root of the walk: `training.batchSize`."""
    mark: str
    """The field's mark, or all marks of a block whose fields differ: `L/R`."""
    info: FieldInfo
    children: tuple["FieldNode", ...]
    """The fields of a block; empty otherwise. Fields of list items have no path and hence no node."""

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def is_optional(self) -> bool:
        """Whether the field is absent (in Python: None) unless the user writes it."""
        return self.info.default is None

    @property
    def is_scalar(self) -> bool:
        return not self.children and get_origin(self.info.annotation) in (None, Literal)

    @property
    def is_free_while_suspended(self) -> bool:
        return _extra(self.info, "freeWhileSuspended") is True

    @property
    def is_size(self) -> bool:
        return _extra(self.info, "isSize") is True

    @property
    def description(self) -> str:
        exception = " unless suspended" if self.is_free_while_suspended else ""
        return f"[{self.mark}{exception}] {self.info.description}"

    def walk(self) -> Iterator["FieldNode"]:
        """Yield this field and all fields below it."""
        yield self
        for child in self.children:
            yield from child.walk()


@functools.cache
def tree(model: type[BaseModel], prefix: str = "", inherited: str = "") -> tuple[FieldNode, ...]:
    """Return the fields of `model`, each with the fields below it, in the order of the manifest.

    Raises:
        ValueError: a field has no mark, neither its own nor from a block above it.
    """
    nodes = []
    for attribute, info in model.model_fields.items():
        path = f"{prefix}{info.alias or attribute}"
        own = str(_extra(info, "mark") or inherited)
        block = None if _is_list(info.annotation) else block_of(info.annotation)
        children = tree(block, f"{path}.", own) if block else ()
        marks_below = {mark for child in children for mark in child.mark.split("/")}
        mark = "/".join(sorted(marks_below or {own}, key=_ORDER.index))
        if not mark:
            raise ValueError(f"{model.__name__}.{attribute} has no change mark")
        nodes.append(FieldNode(path, mark, info, children))
    return tuple(nodes)


def marks(model: type[BaseModel]) -> dict[str, str]:
    """Return path -> mark for all fields of `model`; a block whose fields differ has all of theirs, `L/R`."""
    return {node.path: node.mark for top in tree(model) for node in top.walk()}


def split_live(spec: BaseModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of `spec` that are marked L, and all the others, both nested as in the manifest."""
    return _split(tree(type(spec)), spec.model_dump(by_alias=True, exclude_none=True))


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `under` with the values of `over`; maps are merged, everything else is replaced."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def block_of(annotation: Any) -> type[BaseModel] | None:
    """Return the model in an annotation such as `Block`, `Block | None` or `list[Block]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(block_of, get_args(annotation))), None)


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list


def _extra(info: FieldInfo, key: str) -> object:
    extra = info.json_schema_extra
    return extra.get(f"x-asyncrl-{key}") if isinstance(extra, dict) else None


def _split(nodes: tuple[FieldNode, ...], values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    live: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for node in nodes:
        if node.name not in values:
            continue
        value = values[node.name]
        if node.mark == "L":
            live[node.name] = value
        elif "L" not in node.mark:
            rest[node.name] = value
        else:
            live[node.name], rest[node.name] = _split(node.children, value)
    return live, rest
