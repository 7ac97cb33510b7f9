"""The chart without a cluster: what it renders, what it refuses, what its README says."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from ruamel.yaml import YAML

from asyncrl_operator.main import app
from asyncrl_operator.resources import CHILDREN, SELECTOR
from asyncrl_operator.telemetry import Telemetry
from support.chart.rendered_chart import NAME, NAMESPACE, helm, only, render, rights, sets
from support.paths import CHART

pytestmark = pytest.mark.e2e

ALL_ON = (
    "serviceMonitor.enabled=true",
    "prometheusRule.enabled=true",
    "networkPolicy.enabled=true",
    "imagePullSecrets={hub,mirror}",
    "priorityClassName=system-cluster-critical",
)
VALUES = {
    "by default": (),
    "all that is optional": ALL_ON,
    "two namespaces": ("watchNamespaces={a,b}", *ALL_ON),
    "as little as possible": ("crds.install=false", "rbac.aggregate=false"),
}

EVERYTHING = {"get", "list", "watch", "create", "patch", "delete"}
CHILDREN_RIGHTS = {
    f"{resource.plural}.{resource.api_version.rpartition('/')[0]}".rstrip("."): EVERYTHING
    for resource in CHILDREN
}
OTHER_RIGHTS = {
    "asyncrljobs.asyncrl.dev": {"get", "list", "watch"},
    "asyncrljobs/status.asyncrl.dev": {"patch"},
    "asyncrljobs/finalizers.asyncrl.dev": {"update"},
    "pods": {"list", "watch", "delete"},
    "secrets": {"create"},
    "events": {"get", "list", "create", "patch"},
}
"""What the operator calls, and `finalizers` for owner references that block (a cluster may ask for it)."""
NODE_RIGHTS = {"nodes": {"list", "watch"}}


@pytest.mark.parametrize("settings", VALUES.values(), ids=VALUES)
def test_helm_finds_nothing_wrong(settings: tuple[str, ...]) -> None:
    done = helm("lint", "--strict", str(CHART), *sets(settings))
    assert done.returncode == 0, done.stdout + done.stderr
    names = [
        (each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"])
        for each in render(*settings)
    ]
    assert len(set(names)) == len(names)


def test_the_operator_may_do_what_it_does_and_no_more() -> None:
    objects = render()
    assert rights(only(objects, "ClusterRole", NAME)) == CHILDREN_RIGHTS | OTHER_RIGHTS | NODE_RIGHTS
    assert not [each for each in objects if each["kind"] == "Role"]


def test_a_watched_namespace_is_all_that_it_has_rights_in() -> None:
    objects = render("watchNamespaces={a,b}", "rbac.aggregate=false")
    roles = {each["metadata"]["namespace"]: rights(each) for each in objects if each["kind"] == "Role"}
    assert roles == dict.fromkeys(("a", "b"), CHILDREN_RIGHTS | OTHER_RIGHTS)
    assert not {"ClusterRole", "ClusterRoleBinding"} & {each["kind"] for each in objects}
    bindings = [each for each in objects if each["kind"] == "RoleBinding"]
    assert {each["metadata"]["namespace"] for each in bindings} == {"a", "b"}
    account = {"kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE}
    assert all(each["subjects"] == [account] for each in bindings)


@pytest.mark.parametrize("settings", VALUES.values(), ids=VALUES)
def test_no_role_has_a_wildcard(settings: tuple[str, ...]) -> None:
    roles = [each for each in render(*settings) if each["kind"] in ("Role", "ClusterRole")]
    assert roles or settings == VALUES["as little as possible"]
    assert "*" not in json.dumps([role["rules"] for role in roles])


def test_the_pod_is_told_all_that_the_process_asks_for() -> None:
    command = typer.main.get_command(app)
    asked = {option.envvar for option in command.params if getattr(option, "envvar", None)}
    [container] = only(render(), "Deployment")["spec"]["template"]["spec"]["containers"]
    assert {each["name"] for each in container["env"]} == asked


def test_the_operator_runs_elsewhere_half_a_minute_after_its_node_is_gone() -> None:
    for settings, more in (
        ((), []),
        (("tolerations[0].key=infra", "tolerations[0].operator=Exists"), ["infra"]),
    ):
        pod = only(render(*settings), "Deployment")["spec"]["template"]["spec"]
        seconds = {each["key"]: each.get("tolerationSeconds") for each in pod["tolerations"]}
        gone = {f"node.kubernetes.io/{taint}": 30 for taint in ("unreachable", "not-ready")}
        assert seconds == gone | dict.fromkeys(more)


def test_values_reach_the_process() -> None:
    settings = (
        "watchNamespaces={a,b}",
        "imagePullSecrets={hub,mirror}",
        "runtimeImage=mine:1",
        "ports.metrics=9090",
    )
    pod = only(render(*settings), "Deployment")["spec"]["template"]["spec"]
    [container] = pod["containers"]
    given = {each["name"]: each["value"] for each in container["env"]}
    assert (given["ASYNCRL_NAMESPACES"], given["ASYNCRL_IMAGE_PULL_SECRETS"]) == ("a,b", "hub,mirror")
    assert (given["ASYNCRL_RUNTIME_IMAGE"], given["ASYNCRL_METRICS_PORT"]) == ("mine:1", "9090")
    assert {"name": "metrics", "containerPort": 9090} in container["ports"]
    assert pod["imagePullSecrets"] == [{"name": "hub"}, {"name": "mirror"}]


def test_one_operator_runs_at_a_time_and_may_write_nowhere() -> None:
    spec = only(render(), "Deployment")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    [container] = spec["template"]["spec"]["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert {"startupProbe", "livenessProbe", "readinessProbe", "resources"} <= container.keys()


def test_the_operator_does_not_take_its_own_objects_for_a_jobs() -> None:
    for each in render(*ALL_ON):
        labels = each["metadata"].get("labels", {})
        assert SELECTOR not in labels, each["metadata"]["name"]


def test_the_crd_is_the_file_and_is_kept_if_wanted() -> None:
    generated = YAML(typ="safe").load(CHART / "files" / "asyncrl.dev_asyncrljobs.yaml")
    assert only(render("crds.keep=false"), "CustomResourceDefinition") == generated
    kept = only(render(), "CustomResourceDefinition")
    assert kept["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert kept == generated
    assert "CustomResourceDefinition" not in {each["kind"] for each in render("crds.install=false")}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("image.pullPolicy=Sometimes", "at '/image/pullPolicy': value must be one of 'Always'"),
        ("ports.metrics=80", "at '/ports/metrics': minimum: got 80, want 1,024"),
        ("watchNamespaces={Team_A}", "at '/watchNamespaces/0': 'Team_A' does not match pattern"),
        ("watchNamespace=a", "additional properties 'watchNamespace' not allowed"),
        ("crds.keep=perhaps", "at '/crds/keep': got string, want boolean"),
        ("serviceMonitor.interval=often", "at '/serviceMonitor/interval': 'often' does not match pattern"),
        ("logLevel=LOUD", "at '/logLevel': value must be one of 'DEBUG'"),
        ("natsImage=", "at '/natsImage': minLength: got 0, want 1"),
    ],
)
def test_a_wrong_value_is_refused_by_name(setting: str, message: str) -> None:
    done = helm("template", "a", str(CHART), "--set", setting)
    assert done.returncode != 0
    assert message in done.stderr


def leaves(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if (
            isinstance(value, dict)
            and value
            and path + name not in ("resources.requests", "resources.limits")
        ):
            yield from leaves(value, f"{path}{name}.")
        else:
            yield path + name, value


def test_the_readme_has_every_value_with_its_default() -> None:
    yaml = YAML(typ="safe")
    rows = re.findall(
        r"^\| `([^`]+)` \| `([^`]+)` \| \S.* \|$", (CHART / "README.md").read_text(), re.MULTILINE
    )
    documented = {name: yaml.load(default) for name, default in rows}
    assert documented == dict(leaves(yaml.load(CHART / "values.yaml")))


def test_every_value_has_a_schema() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    for path, _ in leaves(YAML(typ="safe").load(CHART / "values.yaml")):
        node = schema
        for part in path.split("."):
            assert node.get("additionalProperties") is False, f"{path}: a misspelt neighbour would be ignored"
            node = node["properties"][part]


def test_alerts_ask_for_series_that_there_are() -> None:
    rules = YAML(typ="safe").load(CHART / "files" / "alerts.yaml")["groups"][0]["rules"]
    registry = Telemetry().registry
    shown = {name for family in registry.collect() for name in (family.name, f"{family.name}_total")}
    labels = {"namespace", "job", "kind", "reason", "resource", "condition", "group", "le"}
    for rule in rules:
        series = re.findall(r"\basyncrl_\w+", rule["expr"])
        assert series and set(series) <= shown, rule["alert"]
        used = re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])
        assert set(used) <= labels, rule["alert"]


def test_alerts_reach_prometheus_as_they_are_written() -> None:
    """Their templates are Prometheus's own and must not be taken for the chart's."""
    written = YAML(typ="safe").load(CHART / "files" / "alerts.yaml")
    assert only(render(*ALL_ON), "PrometheusRule")["spec"] == written
    [endpoint] = only(render(*ALL_ON), "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["honorLabels"] is True, "else `job` is Prometheus' and no alert can name the AsyncRLJob"
