"""Checks whether the CRD that the API server serves has every field that this version relies on. Pure.

An older CRD drops fields that it does not know, and a dropped field reads as its default: an operator that
acted on that would undo what the user wrote (kuberay#2084).
"""

from collections.abc import Iterator
from typing import Any

from asyncrl_api.job import API_VERSION, Spec
from asyncrl_api.job_status import Status
from asyncrl_api.marks import FieldNode, tree
from asyncrl_operator.decide import reasons
from asyncrl_operator.decide.observed import Problem

OPENAPI_PATH = f"/openapi/v3/apis/{API_VERSION}"
SCHEMA = "dev.asyncrl.v1alpha1.AsyncRLJob"
SHOWN = 5
"""The number of fields that a message names."""


def schema_problem(document: dict[str, Any]) -> Problem | None:
    """Return why the operator cannot act on any job, from the published OpenAPI document of our API group."""
    schema = document.get("components", {}).get("schemas", {}).get(SCHEMA, {})
    missing = list(missing_fields(schema))
    if not missing:
        return None
    more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    return Problem(
        reasons.CRD_TOO_OLD,
        f"the served CRD lacks {', '.join(missing[:SHOWN])}{more}: apply the CRD of this operator's version",
    )


def missing_fields(schema: dict[str, Any]) -> Iterator[str]:
    """Yield the fields of spec and status that a schema lacks, without those below a missing field."""
    properties = schema.get("properties", {})
    yield from _missing(tree(Spec, "spec."), properties.get("spec", {}))
    status = properties.get("status", {}).get("properties", {})
    yield from (f"status.{info.alias}" for info in Status.model_fields.values() if info.alias not in status)


def _missing(nodes: tuple[FieldNode, ...], schema: dict[str, Any]) -> Iterator[str]:
    properties = _resolved(schema).get("properties", {})
    for node in nodes:
        if node.name not in properties:
            yield node.path
        elif node.children:
            yield from _missing(node.children, properties[node.name])


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema without the `allOf` that wraps one with a default or a description."""
    wrapped = schema.get("allOf")
    return wrapped[0] if wrapped and "properties" not in schema else schema
