"""The operator's chart as the tests see it: rendered by helm, without a cluster."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from support.paths import CHART

RELEASE, NAMESPACE = "asyncrl", "asyncrl-system"
NAME = "asyncrl-operator"
"""The name of the release's Deployment, ServiceAccount and Roles."""

Object = dict[str, Any]


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run helm without a cluster; the caller checks how it ended."""
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    if not folder:
        pytest.skip("KUBEBUILDER_ASSETS is not set: it names the folder with helm")
    command = [str(Path(folder) / "helm"), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def render(*settings: str, chart: Path = CHART) -> list[Object]:
    """Return the objects of a release with these values (`a.b=c`)."""
    done = helm("template", RELEASE, str(chart), "--namespace", NAMESPACE, *sets(settings))
    assert done.returncode == 0, done.stderr
    return [each for each in YAML(typ="safe").load_all(done.stdout) if each is not None]


def sets(settings: tuple[str, ...]) -> list[str]:
    """Return values as options for helm."""
    return [part for setting in settings for part in ("--set", setting)]


def only(objects: list[Object], kind: str, suffix: str = "") -> Object:
    """Return the only object of a kind whose name ends with this."""
    [found] = [each for each in objects if each["kind"] == kind and each["metadata"]["name"].endswith(suffix)]
    return found


def rights(role: Object) -> dict[str, set[str]]:
    """Return the verbs of a role for each `resource.group`."""
    found: dict[str, set[str]] = {}
    for rule in role["rules"]:
        for resource in rule["resources"]:
            for group in rule["apiGroups"]:
                found.setdefault(f"{resource}.{group}".rstrip("."), set()).update(rule["verbs"])
    return found
