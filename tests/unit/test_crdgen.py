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


def test_everything_that_rules_may_read_is_bounded() -> None:
    """From the bounds the API server derives what a rule may cost."""
    for path, schema in ALL:
        if schema["type"] == "string" and "enum" not in schema and path.startswith((".spec", ".status")):
            assert "maxLength" in schema, path
        if schema["type"] == "array":
            assert "maxItems" in schema and ("x-kubernetes-list-type" in schema or path.startswith(".status"))


def test_every_field_of_the_spec_tells_its_mark() -> None:
    for path, schema in ALL:
        if path.startswith(".spec.") and "[]" not in path:
            assert schema["description"].startswith("["), path


def test_every_rule_is_there_once_with_its_message() -> None:
    rules = [rule for _, schema in ALL for rule in schema.get("x-kubernetes-validations", ())]
    assert len(rules) == len(all_rules())
    assert all(rule["messageExpression"] for rule in rules)
