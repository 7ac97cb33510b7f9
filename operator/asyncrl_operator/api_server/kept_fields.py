"""Selects what is kept of an object from a watch: ten thousand whole pods would take 600 MB. Pure."""

from dataclasses import dataclass

import msgspec

from asyncrl_api.times import to_seconds
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
    if conditions := raw.get("status", {}).get("conditions"):
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
    since = ready.get("lastTransitionTime") or raw["metadata"]["creationTimestamp"]
    taint = taint_that_announces(raw.get("spec", {}).get("taints") or ())
    notice = raw["metadata"].get("annotations", {}).get(DISRUPTION_ANNOTATION, "")[:LONGEST_NOTICE]
    return Node(
        is_ready=ready.get("status") == "True",
        since=to_seconds(since),
        notice=f"taint {taint}" if taint else notice,
    )


def trim_pod(raw: Json) -> KeptPod:
    """Return what a pass needs to know about a pod."""
    metadata, spec, status = raw["metadata"], raw.get("spec", {}), raw.get("status", {})
    labels, annotations = metadata.get("labels", {}), metadata.get("annotations", {})
    deletion = metadata.get("deletionTimestamp")
    statuses = [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]
    scheduled = _condition(raw, "PodScheduled") or {}
    disrupted = _condition(raw, "DisruptionTarget") or {}
    ready = _condition(raw, "Ready") or {}
    pod = Pod(
        name=metadata["name"],
        uid=metadata["uid"],
        group=labels.get(GROUP_LABEL, "rollout"),
        attempt=_number(labels.get(ATTEMPT_LABEL)),
        template=labels.get(TEMPLATE_LABEL, ""),
        gpus=_number(annotations.get(GPUS_ANNOTATION)),
        phase=status.get("phase", "Pending"),
        is_ready=ready.get("status") == "True",
        ready_changed_at=to_seconds(ready.get("lastTransitionTime") or metadata["creationTimestamp"]),
        node=spec.get("nodeName", ""),
        created_at=to_seconds(metadata["creationTimestamp"]),
        deleted_at=to_seconds(deletion) if deletion else None,
        disruption=disrupted.get("reason", "") if disrupted.get("status") == "True" else "",
        notice=annotations.get(DISRUPTION_ANNOTATION, "")[:LONGEST_NOTICE],
        unschedulable=_message(scheduled) if scheduled.get("status") == "False" else "",
        waiting=next(filter(None, map(_waiting, statuses)), ""),
        ends=tuple(filter(None, map(_end, status.get("containerStatuses", ())))),
    )
    return KeptPod(labels.get(JOB_UID_LABEL, ""), pod)


def _condition(raw: Json, kind: str) -> Json | None:
    conditions = raw.get("status", {}).get("conditions") or ()
    return next((each for each in conditions if each["type"] == kind), None)


def _message(condition: Json) -> str:
    return str(condition.get("message") or condition.get("reason", ""))[:LONGEST_MESSAGE]


def _waiting(container: Json) -> str:
    waiting = container.get("state", {}).get("waiting")
    if not waiting:
        return ""
    parts = filter(None, [waiting.get("reason", ""), waiting.get("message", "")])
    return ": ".join(parts)[:LONGEST_MESSAGE]


def _end(container: Json) -> ContainerEnd | None:
    """Return how a container ended last, even if it runs again."""
    states = [container.get("state", {}), container.get("lastState", {})]
    ended = next((state["terminated"] for state in states if "terminated" in state), None)
    if ended is None:
        return None
    return ContainerEnd(container["name"], ended.get("exitCode", 0), ended.get("reason", ""))


def _number(text: str | None) -> int:
    """Return a number that we wrote, or 0: labels and annotations can be edited by hand."""
    return int(text) if text is not None and text.isascii() and text.isdigit() else 0
