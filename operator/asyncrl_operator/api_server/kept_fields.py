"""Selects what is kept of an object from a watch: ten thousand whole pods would take 600 MB. Pure."""

from dataclasses import dataclass
from typing import Any

import msgspec

from asyncrl_api.times import is_time, to_seconds
from asyncrl_operator.decide.disruption import LONGEST_NOTICE, taint_that_announces
from asyncrl_operator.decide.observed import ContainerEnd, Node, Pod
from asyncrl_operator.resources import (
    ATTEMPT_LABEL,
    DISRUPTION_ANNOTATION,
    GPUS_ANNOTATION,
    GROUP_LABEL,
    JOB_UID_LABEL,
    TEMPLATE_LABEL,
    Json,
)

LONGEST_MESSAGE = 500


@dataclass(frozen=True, slots=True)
class KeptPod:
    """A pod, and the UID of the AsyncRLJob that it was made for."""

    job_uid: str
    pod: Pod


def compact(raw: Json) -> bytes:
    """Return, as JSON, what objects are compared by: all but versions, managed fields and status.

    The conditions of a Job are kept: they tell how the attempt ended.
    """
    kept = {name: value for name, value in raw.items() if name not in ("status", "apiVersion", "kind")}
    unwanted = ("managedFields", "resourceVersion", "generation", "selfLink")
    kept["metadata"] = {name: value for name, value in raw["metadata"].items() if name not in unwanted}
    if conditions := _maps(_map(raw.get("status")).get("conditions")):
        wanted = ("type", "status", "reason", "message")
        kept["conditions"] = [{name: each.get(name, "") for name in wanted} for each in conditions]
    return msgspec.json.encode(kept)


def trim_job(raw: Json) -> bytes:
    """Return an AsyncRLJob as JSON, without what nobody here reads: labels, annotations and versions."""
    unwanted = ("managedFields", "annotations", "labels", "resourceVersion")
    metadata = {name: value for name, value in raw["metadata"].items() if name not in unwanted}
    return msgspec.json.encode(
        {"metadata": metadata, "spec": raw.get("spec", {}), "status": raw.get("status", {})}
    )


def trim_node(raw: Json) -> Node:
    """Return whether a node is ready, and since when, and what announces its end."""
    ready = _condition(raw, "Ready") or {}
    since = ready.get("lastTransitionTime") or _map(raw["metadata"]).get("creationTimestamp")
    taint = taint_that_announces(_map(raw.get("spec")).get("taints") or ())
    notice = str(_map(_map(raw["metadata"]).get("annotations")).get(DISRUPTION_ANNOTATION) or "")
    return Node(
        is_ready=ready.get("status") == "True",
        since=_time(since),
        notice=f"taint {taint}" if taint else notice[:LONGEST_NOTICE],
    )


def trim_pod(raw: Json) -> KeptPod:
    """Return what a pass needs to know about a pod, whatever is missing of it or odd."""
    metadata, spec, status = raw["metadata"], _map(raw.get("spec")), _map(raw.get("status"))
    labels, annotations = _map(metadata.get("labels")), _map(metadata.get("annotations"))
    deletion = metadata.get("deletionTimestamp")
    containers = _maps(status.get("containerStatuses"))
    statuses = [*_maps(status.get("initContainerStatuses")), *containers]
    scheduled = _condition(raw, "PodScheduled") or {}
    disrupted = _condition(raw, "DisruptionTarget") or {}
    ready = _condition(raw, "Ready") or {}
    pod = Pod(
        name=metadata["name"],
        uid=metadata["uid"],
        group=labels.get(GROUP_LABEL) or "rollout",
        attempt=number_of(labels.get(ATTEMPT_LABEL)),
        template=labels.get(TEMPLATE_LABEL, ""),
        gpus=number_of(annotations.get(GPUS_ANNOTATION)),
        phase=status.get("phase") or "Pending",
        is_ready=ready.get("status") == "True",
        ready_changed_at=_time(ready.get("lastTransitionTime") or metadata.get("creationTimestamp")),
        node=str(spec.get("nodeName") or ""),
        created_at=_time(metadata.get("creationTimestamp")),
        deleted_at=_time(deletion) if deletion else None,
        disruption=str(disrupted.get("reason") or "?") if disrupted.get("status") == "True" else "",
        notice=str(annotations.get(DISRUPTION_ANNOTATION) or "")[:LONGEST_NOTICE],
        unschedulable=_message(scheduled) if scheduled.get("status") == "False" else "",
        waiting=next(filter(None, map(_waiting, statuses)), ""),
        ends=tuple(filter(None, map(_end, containers))),
    )
    return KeptPod(labels.get(JOB_UID_LABEL, ""), pod)


def _map(value: Any) -> Json:
    """Return an object of JSON; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def _maps(values: Any) -> list[Json]:
    return [each for each in values if isinstance(each, dict)] if isinstance(values, list) else []


def _time(text: Any) -> float:
    """Return a time in Unix seconds; 0 for one that is none, so that whatever it began is long ago."""
    return to_seconds(text) if isinstance(text, str) and is_time(text) else 0.0


def _condition(raw: Json, kind: str) -> Json | None:
    conditions = _maps(_map(raw.get("status")).get("conditions"))
    return next((each for each in conditions if each.get("type") == kind), None)


def _message(condition: Json) -> str:
    return str(condition.get("message") or condition.get("reason", ""))[:LONGEST_MESSAGE]


def _waiting(container: Json) -> str:
    waiting = _map(_map(container.get("state")).get("waiting"))
    parts = [str(waiting[name]) for name in ("reason", "message") if waiting.get(name)]
    return ": ".join(parts)[:LONGEST_MESSAGE]


def _end(container: Json) -> ContainerEnd | None:
    """Return how a container ended last, even if it runs again."""
    states = [_map(container.get("state")), _map(container.get("lastState"))]
    ended = next((_map(state["terminated"]) for state in states if state.get("terminated")), None)
    if ended is None:
        return None
    code = ended.get("exitCode", 0)
    return ContainerEnd(
        str(container.get("name", "")), code if isinstance(code, int) else 1, str(ended.get("reason") or "")
    )


def label_of(raw: Json, name: str) -> str:
    """Return a label; empty if there is none."""
    return str(_map(_map(raw.get("metadata")).get("labels")).get(name, ""))


def number_of(text: Any) -> int:
    """Return a number that we wrote, or 0: labels and annotations can be edited by hand."""
    is_ours = isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 10
    return int(text) if is_ours else 0
