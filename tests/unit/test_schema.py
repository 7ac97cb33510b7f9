"""Whether the served CRD has what this version relies on."""

from typing import Any

from asyncrl_api.job import Spec
from asyncrl_api.job_status import Status
from asyncrl_api.marks import FieldNode, tree
from asyncrl_operator.api_server.schema import SCHEMA, schema_problem


def properties(nodes: tuple[FieldNode, ...]) -> dict[str, Any]:
    return {node.name: {"properties": properties(node.children)} if node.children else {} for node in nodes}


def document() -> dict[str, Any]:
    status: dict[str, Any] = {str(info.alias): {} for info in Status.model_fields.values()}
    spec = {"properties": properties(tree(Spec))}
    schema = {"properties": {"spec": spec, "status": {"properties": status}}}
    return {"components": {"schemas": {SCHEMA: schema}}}


def test_a_crd_of_this_version_will_do_and_one_with_more_fields_too() -> None:
    served = document()
    assert schema_problem(served) is None
    served["components"]["schemas"][SCHEMA]["properties"]["spec"]["properties"]["later"] = {}
    assert schema_problem(served) is None


def test_an_older_crd_is_refused_and_the_missing_fields_are_named() -> None:
    served = document()
    spec = served["components"]["schemas"][SCHEMA]["properties"]["spec"]["properties"]
    del spec["training"]["properties"]["maxSteps"]
    del spec["rollout"]["properties"]["update"]
    problem = schema_problem(served)
    assert problem is not None and problem.reason == "CRDTooOld"
    assert "spec.training.maxSteps" in problem.message and "spec.rollout.update" in problem.message
    assert "spec.rollout.update.maxUnavailablePercent" not in problem.message


def test_a_cluster_without_the_crd_is_refused() -> None:
    assert schema_problem({"components": {"schemas": {}}}) is not None
