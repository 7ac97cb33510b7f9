"""Builds the CustomResourceDefinition from the types, and writes the generated files (`make crd`)."""

import argparse
from pathlib import Path
from typing import Any

from asyncrl_api.job import API_VERSION, KIND, AsyncRLJob, Spec
from asyncrl_api.marks import tree
from asyncrl_api.parsing import render_yaml
from asyncrl_api.reference import render_reference
from asyncrl_api.rules import Rule, all_rules
from asyncrl_api.structural import field_schema, status_schema
from asyncrl_api.views import FILE_NAME as SPEC_VIEWS
from asyncrl_api.views import render_views

GROUP, VERSION = API_VERSION.split("/")
PLURAL = "asyncrljobs"
FILE_NAME = f"{GROUP}_{PLURAL}.yaml"
MAX_BYTES = 128 * 1024
"""Half of what an annotation may hold; client-side `kubectl apply` keeps a copy of the CRD in one."""
REPLICAS = ".spec.gpuBudget.total"

COLUMNS = (
    ("Phase", "string", ".status.phase", 0),
    ("Step", "string", ".status.progress.summary", 0),
    ("Trainer", "string", '.status.groups[?(@.name=="trainer")].summary', 0),
    ("Rollout", "string", '.status.groups[?(@.name=="rollout")].summary', 0),
    ("GPUs", "string", ".status.gpus.summary", 0),
    ("Staleness", "integer", ".status.staleness.p95", 0),
    ("Reward", "string", ".status.reward.mean", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Attempt", "integer", ".status.attempt.number", 1),
    ("Checkpoint", "integer", ".status.lastCheckpoint.step", 1),
    ("Message", "string", ".status.message", 1),
)
"""The columns of `kubectl get`: name, type, path and priority; those of priority 1 need `-o wide`."""


def build_crd() -> dict[str, Any]:
    """Return the CustomResourceDefinition."""
    columns = [
        {"name": name, "type": kind, "jsonPath": path} | ({"priority": priority} if priority else {})
        for name, kind, path, priority in COLUMNS
    ]
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": _root()},
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": REPLICAS,
                "statusReplicasPath": ".status.gpus.allocated",
                "labelSelectorPath": ".status.selector",
            },
        },
        "additionalPrinterColumns": columns,
    }
    names = {
        "kind": KIND,
        "listKind": f"{KIND}List",
        "plural": PLURAL,
        "singular": KIND.lower(),
        "shortNames": ["arl"],
        "categories": ["asyncrl"],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {"group": GROUP, "names": names, "scope": "Namespaced", "versions": [version]},
    }


def render_crd() -> str:
    """Return the CustomResourceDefinition as YAML."""
    head = "# Generated from crds/asyncrl_api by `make crd`; change the types, not this file.\n"
    return head + render_yaml(build_crd())


def _root() -> dict[str, Any]:
    spec: dict[str, Any] = {
        "type": "object",
        "description": Spec.__doc__,
        "properties": {node.name: field_schema(node) for node in tree(Spec)},
        "required": [node.name for node in tree(Spec) if node.info.is_required()],
    }
    root = {
        "type": "object",
        "description": AsyncRLJob.__doc__,
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status_schema(),
        },
    }
    for rule in all_rules():
        _at(root, rule.path).setdefault("x-kubernetes-validations", []).append(_validation(rule))
    return root


def _validation(rule: Rule) -> dict[str, Any]:
    fields = {"rule": rule.rule, "messageExpression": rule.message_expression, "reason": "FieldValueInvalid"}
    # The API server refuses a fieldPath that is not in the schema at this place (metadata.name).
    return fields if rule.path == "" or not rule.field_path else {**fields, "fieldPath": rule.field_path}


def _at(root: dict[str, Any], path: str) -> dict[str, Any]:
    for name in filter(None, path.split(".")):
        root = root["properties"][name]
    return root


def files(root: Path) -> dict[Path, str]:
    """Return the text of every file that `make crd` writes below the repository's root."""
    crd = render_crd()
    return {
        root / "crds" / FILE_NAME: crd,
        root / "charts" / "asyncrl" / "files" / FILE_NAME: crd,
        root / "crds" / "asyncrl_api" / SPEC_VIEWS: render_views(),
        root / "docs" / "reference.md": render_reference(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write the CRD, the views of the spec, and the reference page."
    )
    parser.add_argument("root", type=Path, nargs="?", default=Path(), help="Root folder of the repository.")
    for path, text in files(parser.parse_args().root).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(f"{path}: {len(text.encode()) // 1024} KiB")


if __name__ == "__main__":
    main()
