"""What a group of pods is rolled or restarted for: hashes over fields of the spec, by change mark.

Over the spec and never over rendered objects: a newer operator may render otherwise, and must not touch
pods that run.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from asyncrl_api.job import Spec
from asyncrl_api.marks import FieldNode, tree

LENGTH = 10


def trainer_hash(spec: Spec) -> str:
    """Return a hash over the fields that a trainer is restarted for (marks R and I)."""
    return _hash(spec, "RI")


def rollout_hash(spec: Spec) -> str:
    """Return a hash over the fields that rollout pods are replaced for (marks U and I)."""
    return _hash(spec, "UI")


def _hash(spec: Spec, marks: str) -> str:
    values = spec.model_dump(by_alias=True, exclude_none=True)
    values["gpuBudget"].pop("split", None)  # a size is no setting: what differs is in status.split
    text = json.dumps(_select(tree(Spec), values, marks), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def _select(nodes: tuple[FieldNode, ...], values: Mapping[str, Any], marks: str) -> dict[str, Any]:
    selected: dict[str, Any] = {}
    for node in nodes:
        value = values.get(node.name)
        if value is None:
            continue
        if node.children:
            selected[node.name] = _select(node.children, value, marks)
        elif node.mark in marks:
            selected[node.name] = value
    return selected
