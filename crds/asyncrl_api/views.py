"""Makes two views of the spec from the change marks: as an attempt began, and as it is now (`make crd`).

An attempt keeps the spec that it began with, and follows the fields marked L. Code that reads the one where
it means the other works until somebody edits the field. So each view has a type of its own, which lacks the
fields of the other, and mypy tells them apart.
"""

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from asyncrl_api.job import Spec
from asyncrl_api.marks import FieldNode, block_of, tree

FILE_NAME = "spec_views.py"

HEAD = '"""The spec as an attempt began, and as it is now. Made from the types by `make crd`."""'
LINE_LENGTH = 110


def render_views() -> str:
    """Return the source of the module that has both views."""
    imports: set[tuple[str, str]] = {("typing", "Protocol")}
    classes = [*_render("Frozen", False, Spec, tree(Spec), imports)]
    classes += _render("Live", True, Spec, tree(Spec), imports)
    by_module: dict[str, list[str]] = {}
    for module, name in sorted(imports):
        by_module.setdefault(module, []).append(name)
    lines = [_import(module, sorted(names)) for module, names in by_module.items()]
    standard = [line for line in lines if not line.startswith("from asyncrl_api")]
    ours = [line for line in lines if line.startswith("from asyncrl_api")]
    head = "\n".join([HEAD, "", *standard, "", *ours])
    return "\n\n\n".join([head, *classes]) + "\n"


def _import(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= LINE_LENGTH:
        return line
    return "\n".join([f"from {module} import (", *(f"    {name}," for name in names), ")"])


def _render(
    prefix: str,
    is_live: bool,
    model: type[BaseModel],
    nodes: tuple[FieldNode, ...],
    imports: set[tuple[str, str]],
) -> Iterator[str]:
    """Yield the classes of one view, each after the classes that it names."""
    attributes = {info.alias or name: name for name, info in model.model_fields.items()}
    lines = []
    for node in nodes:
        has_live, has_frozen = "L" in node.mark, node.mark != "L"
        if not (has_live if is_live else has_frozen):
            continue
        if has_live and has_frozen:
            block = block_of(node.info.annotation)
            assert block is not None
            yield from _render(prefix, is_live, block, node.children, imports)
            kind = _class_name(prefix, block) + (" | None" if node.is_optional else "")
        else:
            kind = _source(node.info.annotation, imports)
        lines += ["    @property", f"    def {attributes[node.name]}(self) -> {kind}: ..."]
    for name, kind in computed(model, nodes, is_live):
        lines += ["    @property", f"    def {name}(self) -> {_source(kind, imports)}: ..."]
    where = nodes[0].path.rpartition(".")[0]
    rest = "marked L, as they are now." if is_live else "not marked L, as the attempt began."
    doc = f"The fields of `spec.{where}` {rest}" if where else f"The fields of the spec {rest}"
    yield "\n".join([f"class {_class_name(prefix, model)}(Protocol):", f'    """{doc}"""', "", *lines])


def _class_name(prefix: str, model: type[BaseModel]) -> str:
    return prefix + model.__name__


def computed(
    model: type[BaseModel], nodes: tuple[FieldNode, ...], is_live: bool
) -> Iterator[tuple[str, Any]]:
    """Yield name and type of each property that is computed from fields of this view alone."""
    attributes = {info.alias or name: name for name, info in model.model_fields.items()}
    marks = {attributes[node.name]: node.mark for node in nodes}
    for name, member in vars(model).items():
        if not isinstance(member, property) or member.fget is None:
            continue
        read = {marks[field] for field in member.fget.__code__.co_names if field in marks}
        if all((mark == "L") if is_live else ("L" not in mark) for mark in read):
            yield name, member.fget.__annotations__["return"]


def _source(annotation: Any, imports: set[tuple[str, str]]) -> str:
    """Return an annotation as source code, and note what must be imported for it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is None or annotation is types.NoneType:
        return "None"
    if annotation is Any:
        imports.add(("typing", "Any"))
        return "Any"
    if origin is Annotated:
        return _source(arguments[0], imports)
    if origin is Literal:
        imports.add(("typing", "Literal"))
        values = ", ".join(f'"{value}"' for value in arguments)
        return f"Literal[{values}]"
    if origin in (Union, types.UnionType):
        return " | ".join(_source(each, imports) for each in arguments)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_source(each, imports) for each in arguments)}]"
    if annotation.__module__ != "builtins":
        imports.add((annotation.__module__, annotation.__name__))
    return str(annotation.__name__)
