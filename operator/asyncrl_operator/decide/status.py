"""Turns what a pass found into the status that users and tools read: conditions, phase, columns. Pure.

docs/gitops.md has the table of conditions and how kstatus, Argo CD and Flux read them. `Reconciling` and
`Stalled` are listed only while they are true, and never both; all others are always listed.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from asyncrl_api.base import MAX_INT
from asyncrl_api.job import Spec
from asyncrl_api.job_status import (
    AttemptStatus,
    CheckpointStatus,
    ClocksStatus,
    Condition,
    GPUsStatus,
    GroupStatus,
    Phase,
    PodSetStatus,
    ProgressStatus,
    RewardStatus,
    SplitStatus,
    StalenessStatus,
    Status,
    ThroughputStatus,
    WeightUpdateStatus,
)
from asyncrl_api.report import Report
from asyncrl_api.times import to_seconds, to_text
from asyncrl_operator.decide import reasons
from asyncrl_operator.decide.attempts import pods_of
from asyncrl_operator.decide.edits import current_templates
from asyncrl_operator.decide.observed import Observed, Pod, Problem
from asyncrl_operator.layout import num_trainer_pods
from asyncrl_operator.resources import JOB_LABEL

LONGEST_MESSAGE = 1000
MAX_FAULTS = 64
"""The most fields of a stored status that are left out because they are not understood."""
REPORT_SECONDS = 30.0
"""The shortest time between two updates of what the trainer reports."""
UNCHANGED_SECONDS = 240.0
"""How long `reportTime` stays as it is if nothing else changes. It then moves nevertheless, because it shows
whether a status is stale."""

LARGEST_PLAIN = 1e15
"""The smallest number that is shown with an exponent."""

Truth = Literal["True", "False", "Unknown"]
Fact = tuple[Truth, str, str]
"""The status, reason and message of a condition."""


@dataclass(frozen=True)
class Standing:
    """How the job stands after a pass: the phase, with its reason and message, and what is wrong."""

    phase: Phase
    reason: str
    message: str
    stalled: Problem | None = None
    """Why nothing is done about the job until the user acts."""
    degraded: Problem | None = None
    """Why the job, although it runs, does not run as it should."""


@dataclass(frozen=True)
class Memory:
    """What has to be remembered until the next pass."""

    attempt: AttemptStatus | None
    split: SplitStatus | None
    clocks: ClocksStatus
    start_time: str | None
    completion_time: str | None = None


@dataclass(frozen=True)
class JobObject:
    """The part of an AsyncRLJob that its status depends on."""

    name: str
    uid: str
    generation: int
    spec: Spec


def describe(
    job: JobObject,
    before: Status,
    seen: Observed,
    report: Report | None,
    standing: Standing,
    memory: Memory,
    now: float,
) -> Status:
    """Return the status after a pass; equal to `before` if nothing that is shown has changed.

    Args:
        report: the present attempt's.
    """
    groups = _groups(job, seen, memory)
    allocated = sum(pod.gpus for pod in seen.pods if pod.is_alive)
    budget = job.spec.gpu_budget.total
    status = Status(
        observed_generation=job.generation,
        phase=standing.phase,
        message=standing.message[:LONGEST_MESSAGE],
        conditions=_conditions(job, before, groups, standing, now),
        start_time=memory.start_time,
        completion_time=memory.completion_time,
        attempt=memory.attempt,
        split=memory.split,
        clocks=memory.clocks if memory.clocks != ClocksStatus() else None,
        groups=groups,
        gpus=_gpus(budget, allocated),
        pod_sets=_pod_sets(job.spec, before, standing, memory.split),
        selector=f"{JOB_LABEL}={job.name}",
        progress=before.progress,
        staleness=before.staleness,
        throughput=before.throughput,
        weight_update=before.weight_update,
        reward=before.reward,
        last_checkpoint=before.last_checkpoint,
        report_time=before.report_time,
        report_seen_time=before.report_seen_time,
    )
    if report is None or now < next_show(before, report):
        return status
    return _with_report(status, report, now)


def next_show(before: Status, report: Report) -> float:
    """Return when a report may be shown: at once if its state is new, else only as often as a reader follows.

    Every change of a status is a message to everyone who watches (Argo CD compares the whole application).
    """
    is_news = before.progress is None or before.progress.state != report.state
    if is_news or before.report_seen_time is None:
        return 0.0
    return to_seconds(before.report_seen_time) + REPORT_SECONDS


def heard_at(status: Status, report: Report, now: float) -> float:
    """Return when a report was written, by the operator's clock.

    The trainer's clock is another machine's, so the difference between the two is remembered: `reportTime` is
    the time that the trainer gave, and `reportSeenTime` is when the operator saw it. Only times by the same
    clock are subtracted.

    Args:
        report: the present attempt's.
    """
    if not report.time or status.report_time is None or status.report_seen_time is None:
        return now  # it has just come
    since = to_seconds(report.time) - to_seconds(status.report_time)
    if since < 0:  # its clock was set back, or it is another machine's
        return now
    return min(now, to_seconds(status.report_seen_time) + since)


def after_the_end(job: JobObject, before: Status, seen: Observed) -> Status:
    """Return the status of a finished job. Its verdict stands; only the remaining pods change."""
    memory = Memory(before.attempt, before.split, ClocksStatus(), before.start_time)
    allocated = sum(pod.gpus for pod in seen.pods if pod.is_alive)
    budget = before.gpus.budget if before.gpus else job.spec.gpu_budget.total
    return before.model_copy(
        update={
            "observed_generation": job.generation,
            "gpus": _gpus(budget, allocated),
            "groups": _groups(job, seen, memory),
        }
    )


def _gpus(budget: int, allocated: int) -> GPUsStatus:
    shown = min(allocated, MAX_INT)  # pods' annotations may be edited by hand
    return GPUsStatus(budget=budget, allocated=shown, summary=f"{shown}/{budget}")


# -- groups


def _groups(job: JobObject, seen: Observed, memory: Memory) -> tuple[GroupStatus, ...]:
    ours = [pod for pod in seen.pods if pod.is_ours and pod.is_alive]
    groups = []
    if job.spec.messaging.mode == "Embedded" and seen.messaging is not None:
        pods = [pod for pod in ours if pod.group == "messaging"]
        groups.append(_group("messaging", "StatefulSet", seen.messaging.name, seen.messaging.replicas, pods))
    if (attempt := memory.attempt) is not None:
        pods = [pod for pod in pods_of(attempt, seen) if pod.is_alive]
        desired = num_trainer_pods(job.spec, attempt.gpus)
        groups.append(_group("trainer", "Job", attempt.job_name, desired, pods))
    if (rollout := seen.rollout) is not None:
        pods = [pod for pod in ours if pod.group == "rollout"]
        group = _group("rollout", "StatefulSet", rollout.name, rollout.replicas, pods)
        current = current_templates(job.spec, seen.templates_began)
        updated = sum(pod.template in current for pod in pods)
        groups.append(group.model_copy(update={"updated": updated}))
    return tuple(groups)


def _group(name: str, kind: str, resource: str, desired: int, pods: list[Pod]) -> GroupStatus:
    ready = sum(pod.is_ready for pod in pods)
    return GroupStatus(
        name=name,
        kind=kind,
        resource=resource,
        desired=desired,
        ready=ready,
        updated=len(pods),
        gpus=min(sum(pod.gpus for pod in pods), MAX_INT),
        summary=f"{ready}/{desired}",
    )


def _pod_sets(
    spec: Spec, before: Status, standing: Standing, split: SplitStatus | None
) -> tuple[PodSetStatus, ...]:
    """Return what a queue must find room for. It does not change while the job is suspended, for Kueue."""
    if split is None or (standing.phase == "Suspended" and before.phase == "Suspended" and before.pod_sets):
        return before.pod_sets
    resource = spec.gpu_budget.resource_name if spec.gpu_budget.allocation == "ExtendedResource" else ""
    pods = num_trainer_pods(spec, split.trainer)
    sets = [("trainer", pods, split.trainer // pods)]
    sets.append(("rollout", split.rollout // split.gpus_per_replica, split.gpus_per_replica))
    if spec.messaging.mode == "Embedded":
        sets.append(("messaging", 1, 0))
    return tuple(
        PodSetStatus(name=name, count=count, requests={resource: str(gpus)} if resource and gpus else {})
        for name, count, gpus in sets
    )


# -- conditions


def _conditions(
    job: JobObject, before: Status, groups: tuple[GroupStatus, ...], standing: Standing, now: float
) -> tuple[Condition, ...]:
    facts = _facts(job.spec, groups, standing)
    return tuple(renew(before, kind, fact, job.generation, now) for kind, fact in facts.items())


def renew(before: Status, kind: str, fact: Fact, generation: int, now: float) -> Condition:
    """Return a condition as it is now; its transition time changes only when its status does.

    Args:
        generation: the generation of the spec that it is about.
        now: Unix time, seconds.
    """
    truth, reason, message = fact
    old = before.condition(kind)
    return Condition(
        type=kind,
        status=truth,
        reason=reason,
        message=message[:LONGEST_MESSAGE],
        last_transition_time=to_text(now) if old is None or old.status != truth else old.last_transition_time,
        observed_generation=generation,
    )


def _facts(spec: Spec, groups: tuple[GroupStatus, ...], standing: Standing) -> dict[str, Fact]:
    phase, reason, message = standing.phase, standing.reason, standing.message
    ends = phase in ("Succeeded", "Failed")
    facts: dict[str, Fact] = {"Ready": _ready(standing)}
    if standing.stalled is not None:
        facts["Stalled"] = ("True", standing.stalled.reason, standing.stalled.message)
    elif phase == "Failed":
        facts["Stalled"] = ("True", reasons.FAILED, message)
    elif not ends and phase not in ("Running", "Suspended", "Queued"):
        facts["Reconciling"] = ("True", reason, message)
    is_suspended = phase in ("Suspended", "Suspending")
    facts["Admitted"] = (
        ("False", reasons.SUSPENDED, "spec.suspend is set")
        if is_suspended
        else ("True", reasons.NO_QUEUE, "")
    )
    facts["Running"] = (
        "True" if phase == "Running" else "False",
        reason if phase != "Running" else reasons.RUNNING,
        "",
    )
    for group, kind in (
        ("messaging", "MessagingReady"),
        ("trainer", "TrainerReady"),
        ("rollout", "RolloutReady"),
    ):
        facts[kind] = _group_fact(
            next((each for each in groups if each.name == group), None), spec, group, ends
        )
    degraded = standing.degraded
    facts["Degraded"] = (
        ("True", degraded.reason, degraded.message) if degraded else ("False", reasons.AS_EXPECTED, "")
    )
    facts["Suspended"] = (
        "True" if phase == "Suspended" else "False",
        phase if is_suspended else reasons.NOT_SUSPENDED,
        "",
    )
    facts["Complete"] = (
        ("True", reason, message) if phase == "Succeeded" else ("False", reasons.NOT_COMPLETE, "")
    )
    facts["Failed"] = ("True", reason, message) if phase == "Failed" else ("False", reasons.NOT_FAILED, "")
    how = reasons.SUCCEEDED if phase == "Succeeded" else reasons.FAILED
    facts["Finished"] = ("True", how, message) if ends else ("False", reasons.NOT_FINISHED, "")
    return facts


def _ready(standing: Standing) -> Fact:
    """Return the summary that kstatus reads: True if there is nothing to wait for."""
    if standing.stalled is not None:
        return "False", standing.stalled.reason, standing.stalled.message
    if standing.phase == "Running":
        if standing.degraded is not None:
            return "True", reasons.DEGRADED, standing.degraded.message
        return "True", reasons.RUNNING, standing.message
    if standing.phase == "Suspended":
        return "True", reasons.SUSPENDED, standing.message
    if standing.phase == "Succeeded":
        return "True", standing.reason, standing.message
    if standing.phase == "Queued":
        return "Unknown", reasons.QUEUED, standing.message
    return "False", reasons.FAILED if standing.phase == "Failed" else standing.reason, standing.message


def _group_fact(group: GroupStatus | None, spec: Spec, name: str, ends: bool) -> Fact:
    if group is None:
        if name == "messaging" and spec.messaging.mode == "Shared":
            return "True", reasons.SHARED, f"a shared server is used: {spec.messaging.shared.url}"
        return "False", reasons.NOT_MADE, ""
    if group.desired and group.ready >= group.desired:
        return "True", reasons.READY, group.summary
    return "False", reasons.ENDED if ends else reasons.NOT_READY, group.summary


# -- report


def _with_report(status: Status, report: Report, now: float) -> Status:
    shown = status.model_copy(update=_reported(report))
    if shown == status and status.report_time and status.report_seen_time and report.time:
        age = to_seconds(report.time) - to_seconds(status.report_time)
        if 0 <= age < UNCHANGED_SECONDS:
            return status
    if not report.time or (report.time == status.report_time and status.report_seen_time):
        return shown
    return shown.model_copy(update={"report_time": report.time, "report_seen_time": to_text(now)})


def _reported(report: Report) -> dict[str, object]:
    step, most = report.step, report.max_steps
    checkpoint, evaluation = report.last_checkpoint, report.last_evaluation or report.first_evaluation
    shown: dict[str, object] = {
        "progress": ProgressStatus(
            step=step,
            max_steps=most,
            summary=f"{step}/{most}",
            percent=min(100 * step // most, 100) if most else 0,
            state=report.state,
            estimated_remaining_seconds=_whole(report.remaining_seconds),
        ),
        "staleness": StalenessStatus(
            p50=report.staleness_p50,
            p95=report.staleness_p95,
            max=report.staleness_max,
            masked_percent=_percent(report.masked_share),
        ),
        "throughput": ThroughputStatus(
            tokens_per_second=_whole(report.tokens_per_second),
            queue_depth=report.queue_depth,
            trainer_wait_percent=_percent(report.wait_share),
        ),
        "weight_update": WeightUpdateStatus(
            gather_milliseconds=_milliseconds(report.update_gather_seconds),
            transfer_milliseconds=_milliseconds(report.update_transfer_seconds),
            load_milliseconds=_milliseconds(report.update_load_seconds),
            pause_milliseconds=_milliseconds(report.update_pause_seconds),
            copy_milliseconds=_milliseconds(report.publish_copy_seconds),
            wait_milliseconds=_milliseconds(report.publish_wait_seconds),
        ),
        "reward": RewardStatus(
            mean=None if report.reward is None else _decimal(report.reward),
            held_out=None if evaluation is None else _decimal(evaluation.accuracy),
        ),
    }
    if checkpoint is not None:
        shown["last_checkpoint"] = CheckpointStatus(
            step=checkpoint.step, path=checkpoint.path, time=checkpoint.time
        )
    return shown


def _decimal(value: float) -> str:
    """Return a finite number as text, no longer than a status may hold."""
    return f"{value:.3f}" if abs(value) < LARGEST_PLAIN else f"{value:.3e}"


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else min(round(1000 * seconds), MAX_INT)


def _percent(share: float | None) -> int | None:
    return None if share is None else round(100 * share)


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def with_operator_error(status: Status, before: Status, message: str, generation: int, now: float) -> Status:
    """Return a status that says that passes over the job fail; a verdict stands.

    Args:
        before: the stored status, whose conditions tell since when that is so.
        message: the error, in one line.
    """
    facts: dict[str, Fact] = {"Degraded": ("True", reasons.OPERATOR_ERROR, message)}
    if not status.is_true("Finished"):
        facts["Ready"] = ("False", reasons.OPERATOR_ERROR, message)
    since = {kind: renew(before, kind, fact, generation, now) for kind, fact in facts.items()}
    return _with_conditions(status, since, generation)


def read_status(stored: Any) -> tuple[Status, str]:
    """Return a stored status as far as it is understood, and what is not, in words; empty if all is.

    Only the fields that are wrong are left out, or the blocks that need them: what the rest remembers counts.
    """
    fault, rest = "", copy.deepcopy(stored)
    for _ in range(MAX_FAULTS):
        try:
            return Status.model_validate(rest), fault
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            fault = fault or f"status.{'.'.join(map(str, first['loc']))}: {first['msg']}"
            if not _leave_out(rest, first["loc"]):
                break
    return Status(), fault


def _leave_out(values: Any, path: tuple[int | str, ...]) -> bool:
    """Remove the value at a path, or what holds it if it is not there; return whether anything was."""
    found = [values]
    for step in path:
        below = found[-1]
        is_there = (isinstance(below, dict) and step in below) or (
            isinstance(below, list) and isinstance(step, int) and step < len(below)
        )
        if not is_there:
            break
        found.append(below[step])
    if (place := len(found) - 1) == 0:
        return False
    del found[place - 1][path[place - 1]]  # where a field is missing, the block that needs it
    return True


def unreadable(before: Status, generation: int, error: ValidationError, now: float) -> Status:
    """Return a status that says what is not understood; a verdict stands, and what runs goes on.

    The API server has checked the spec against its CRD, so CRD and operator are of different versions.
    """
    if before.is_true("Finished"):
        return before.model_copy(update={"observed_generation": generation})
    first = error.errors()[0]
    path = ".".join(map(str, first["loc"]))
    message = (
        f"spec.{path}: {first['msg']}: the CRD is of another version than the operator; upgrade the operator"
    )
    facts: dict[str, Fact] = {
        "Ready": ("False", reasons.INVALID_SPEC, message),
        "Stalled": ("True", reasons.INVALID_SPEC, message),
    }
    renewed = {kind: renew(before, kind, fact, generation, now) for kind, fact in facts.items()}
    return _with_conditions(before, renewed, generation, without="Reconciling")


def _with_conditions(
    status: Status, renewed: Mapping[str, Condition], generation: int, without: str = ""
) -> Status:
    """Return a status with some conditions replaced or added, and one left out."""
    conditions = [each for each in status.conditions if each.type not in (*renewed, without)]
    conditions += renewed.values()
    order = {each.type: place for place, each in enumerate(status.conditions)}
    conditions.sort(key=lambda each: order.get(each.type, -1))
    return status.model_copy(update={"observed_generation": generation, "conditions": tuple(conditions)})
