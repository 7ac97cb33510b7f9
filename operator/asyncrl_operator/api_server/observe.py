"""Turns what the caches hold of one job into what a pass decides on. Pure."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from asyncrl_api.report import ReadReport, read_report
from asyncrl_operator.api_server.informer import Entry
from asyncrl_operator.api_server.kept_fields import KeptPod, label_of, number_of
from asyncrl_operator.decide import reasons
from asyncrl_operator.decide.observed import (
    Node,
    Observed,
    Pod,
    Problem,
    StatefulSet,
    TrainerJob,
    Values,
)
from asyncrl_operator.resources import (
    ATTEMPT_LABEL,
    CONFIG_MAPS,
    JOBS,
    STATEFUL_SETS,
    TEMPLATE_LABEL,
    Resource,
)
from asyncrl_operator.workqueue import Key

logger = logging.getLogger(__name__)

REPORT_KEY, CONFIG_KEY = "report", "config.json"
_MISSING = re.compile(r'(secret|configmap|persistentvolumeclaim|serviceaccount) "([^"]+)" not found', re.I)


class Remembered(msgspec.Struct):
    """The part of a run configuration that is read."""

    spec: dict[str, Any]


@dataclass(frozen=True)
class Child:
    """An object with the label of a job that is not a pod."""

    resource: Resource
    entry: Entry[bytes]

    def decode(self) -> dict[str, Any]:
        decoded: dict[str, Any] = msgspec.json.decode(self.entry.value)
        return decoded


def observe(
    key: Key,
    uid: str,
    children: Iterable[Child],
    pods: Iterable[Entry[KeptPod]],
    nodes: Mapping[str, Node] | None,
) -> Observed:
    """Return what exists of a job: its own objects, and pods of an earlier job of its name.

    Args:
        uid: UID of the AsyncRLJob; children of another one are not ours.
        nodes: the nodes of the pods; None: the operator may not see nodes.
    """
    ours = [child for child in children if child.entry.owner == uid]
    seen_pods = tuple(_pod(entry, uid) for entry in pods)
    report = _report(key, ours)
    return Observed(
        trainer_jobs=tuple(_trainer_job(child) for child in ours if child.resource is JOBS),
        rollout=_stateful_set(ours, f"{key.name}-rollout"),
        messaging=_stateful_set(ours, f"{key.name}-nats"),
        pods=seen_pods,
        nodes=nodes,
        report=report.report,
        report_fault=report.fault,
        attempts_began={
            number_of(n): spec for n, spec in _began(ours, f"{key.name}-config-") if number_of(n)
        },
        templates_began=dict(_began(ours, f"{key.name}-rollout-")),
        has_children=bool(ours) or any(pod.is_ours for pod in seen_pods),
    )


def outlived_configs(
    key: Key, uid: str, children: Iterable[Child], seen: Observed, *, attempt: int, template: str
) -> list[Entry[bytes]]:
    """Return the run configurations that no pod will read anymore.

    Args:
        attempt: the attempt of the desired trainer; 0: no trainer is desired.
        template: the template hash of the desired rollout pods.
    """
    attempts = {
        f"{key.name}-config-{number}" for number in (attempt, *(j.attempt for j in seen.trainer_jobs))
    }
    templates = {template, *(pod.template for pod in seen.pods if pod.is_ours and pod.is_alive)}
    if seen.rollout is not None:  # it still makes such pods until it has the new template
        templates.add(seen.rollout.template)
    needed = attempts | {f"{key.name}-rollout-{each}" for each in templates}
    prefixes = (f"{key.name}-config-", f"{key.name}-rollout-")
    return [
        child.entry
        for child in children
        if child.resource is CONFIG_MAPS
        and child.entry.owner == uid
        and child.entry.name.startswith(prefixes)
        and child.entry.name not in needed
    ]


def missing_reference(pods: Iterable[Pod]) -> Problem | None:
    """Return the object that the user names, that pods wait for and that does not exist.

    Kubelet reports missing Secrets, which the operator may not read; the scheduler reports missing claims.
    """
    for pod in pods:
        if found := _MISSING.search(pod.waiting) or _MISSING.search(pod.unschedulable):
            return Problem(
                reasons.MISSING_REFERENCE, f"pod {pod.name}: {found[1]} {found[2]!r} does not exist"
            )
    return None


def _pod(entry: Entry[KeptPod], uid: str) -> Pod:
    kept = entry.value
    if kept.job_uid == uid:
        return kept.pod
    return Pod(**{**vars(kept.pod), "is_ours": False})


def _trainer_job(child: Child) -> TrainerJob:
    live = child.decode()
    conditions = [each for each in live.get("conditions", ()) if each["status"] == "True"]
    true = {str(each["type"]): str(each["message"]) for each in conditions}
    failed = next((kind for kind in ("Failed", "FailureTarget") if kind in true), None)
    attempt = label_of(live, ATTEMPT_LABEL)
    return TrainerJob(
        name=child.entry.name,
        attempt=number_of(attempt),
        is_complete="Complete" in true,
        is_failed=failed is not None,
        message=true[failed] if failed else "",
        is_deleting=child.entry.is_deleting,
    )


def _stateful_set(children: Iterable[Child], name: str) -> StatefulSet | None:
    for child in children:
        if child.resource is STATEFUL_SETS and child.entry.name == name:
            live = child.decode()
            template = label_of(live, TEMPLATE_LABEL)
            replicas = live["spec"].get("replicas", 1)
            return StatefulSet(name, replicas, template, child.entry.is_deleting)
    return None


def _report(key: Key, children: Iterable[Child]) -> ReadReport:
    name = report_name(key)
    for child in children:
        if child.resource is CONFIG_MAPS and child.entry.name == name:
            text = (child.decode().get("data") or {}).get(REPORT_KEY)
            if not text:
                break
            found = read_report(text)
            return found._replace(fault=f"ConfigMap {name}: {found.fault}" if found.fault else "")
    return ReadReport(None)


def _began(children: Iterable[Child], prefix: str) -> Iterator[tuple[str, Values]]:
    """Yield each run configuration's name without the prefix, and the spec in it.

    The spec is returned as it was written, perhaps by another version, some of whose fields no longer exist.
    """
    for child in children:
        if child.resource is not CONFIG_MAPS or not child.entry.name.startswith(prefix):
            continue
        text = (child.decode().get("data") or {}).get(CONFIG_KEY, "")
        try:
            yield child.entry.name.removeprefix(prefix), msgspec.json.decode(text, type=Remembered).spec
        except (
            msgspec.DecodeError,
            RecursionError,
        ) as error:  # somebody else has changed it; the job goes on without it
            logger.warning("ConfigMap %s is not understood: %s", child.entry.name, error)


def report_name(key: Key) -> str:
    """Return the name of the ConfigMap into which the trainer writes its report."""
    return f"{key.name}-report"
