"""The CRD is what the types say, and the files in the tree are what the generator writes."""

from pathlib import Path
from typing import Any

import pytest

from asyncrl_api.crdgen import MAX_BYTES, build_crd, files, render_crd
from asyncrl_api.rules import all_rules

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", files(ROOT), ids=lambda path: path.name)
def test_files_are_the_generators_output(path: Path) -> None:
    assert path.read_text() == files(ROOT)[path], f"{path.relative_to(ROOT)} is out of date: make crd"


def test_it_fits_an_annotation() -> None:
    assert len(render_crd().encode()) < MAX_BYTES


def schemas(schema: dict[str, Any], path: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Return all schemas below one, with their paths."""
    found = [(path, schema)]
    for name, below in schema.get("properties", {}).items():
        found += schemas(below, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            found += schemas(schema[key], f"{path}[]")
    return found


ALL = schemas(build_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"])


OURS = [(path, schema) for path, schema in ALL if path.startswith((".spec", ".status"))]


def test_every_string_and_list_is_bounded() -> None:
    """From the bounds the API server derives what a rule may cost."""
    bounds = {"string": {"maxLength", "enum"}, "array": {"maxItems"}}
    assert [
        path
        for path, schema in OURS
        if not bounds.get(schema.get("type", "string"), schema.keys()) & schema.keys()
    ] == []


def test_every_list_says_how_two_writers_share_it() -> None:
    lists = {path: schema for path, schema in OURS if schema.get("type") == "array"}
    assert [path for path, schema in lists.items() if "x-kubernetes-list-type" not in schema] == []
    keys = {path: schema.get("x-kubernetes-list-map-keys") for path, schema in lists.items()}
    assert {path: each for path, each in keys.items() if each} == {
        ".status.conditions": ["type"],
        ".status.groups": ["name"],
        ".status.podSets": ["name"],
    }


def test_defaults_are_written_out_in_full() -> None:
    """The default of a block is not filled in from those of its fields before rules read it."""
    for path, schema in OURS:
        if "properties" in schema and path.startswith(".spec") and "default" in schema:
            inner = {name for name, below in schema["properties"].items() if "default" in below}
            assert schema["default"].keys() == inner, path


def test_every_field_of_the_spec_tells_its_mark() -> None:
    for path, schema in ALL:
        if path.startswith(".spec.") and "[]" not in path:
            assert schema["description"].startswith("["), path


def test_every_rule_is_there_once_with_its_message() -> None:
    rules = [rule for _, schema in ALL for rule in schema.get("x-kubernetes-validations", ())]
    assert sorted((rule["rule"], rule["messageExpression"]) for rule in rules) == sorted(
        (rule.rule, rule.message_expression) for rule in all_rules()
    )
