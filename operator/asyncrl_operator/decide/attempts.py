"""Whether the trainer's present attempt goes on or ends, and whether and when another one follows. Pure.

An attempt ends as a whole: collectives do not survive a lost rank. Why it ended is read from all its pods
together, since the peers of a lost pod crash with ordinary exit codes at about the same moment.
"""

import signal
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from asyncrl_api.exits import ExitCode
from asyncrl_api.job import Spec
from asyncrl_api.job_status import AttemptStatus
from asyncrl_api.report import Report
from asyncrl_api.times import to_seconds, to_text
from asyncrl_operator.decide import reasons
from asyncrl_operator.decide.edits import trainer_edit, trainer_hash
from asyncrl_operator.decide.hang import HUNG_CODE, Signs, hung, silent_at
from asyncrl_operator.decide.observed import Observed, Pod, TrainerJob
from asyncrl_operator.decide.restart_policy import GiveUp, TrainerBudget
from asyncrl_operator.decide.rolling import is_on_dead_node

TRAINER_CONTAINER = "trainer"
UNSCHEDULABLE_SECONDS = 300.0
"""How long some pods of an attempt may hold GPUs while others find no node."""
RETRY_SPREAD_SECONDS = 60.0
"""The span over which the retries are spread, so that jobs that block each other try at different times."""
REPORT_DELAY_SECONDS = 60.0
"""How late a report may be although the trainer is well: it is copied every 30 s, and the API server may be
away for a moment."""
REMEMBERED = {"last_reason", "restarts", "disruptions", "failures_in_a_row", "step"}
"""The fields that an attempt takes over from the one before it."""
SIGNAL_CODES = {128 + signal.SIGKILL, 128 + signal.SIGTERM}

Charge = Literal["", "restart", "disruption"]


@dataclass(frozen=True)
class Running:
    """The attempt goes on."""

    wake_at: float | None = None
    """When to look again even if nothing has changed."""


@dataclass(frozen=True)
class Ended:
    """The attempt has ended, or has to end."""

    reason: str
    message: str
    charge: Charge = ""
    code: int = 0
    """The exit code that the restart policy judges; for a disruption, minus the signal's number."""
    delay_seconds: float = 0.0


def judge(
    spec: Spec,
    attempt: AttemptStatus,
    seen: Observed,
    *,
    trainer_gpus: int,
    uid: str,
    heard_at: float | None,
    now: float,
) -> Running | Ended:
    """Return whether an attempt goes on; its Job has been seen at least once and is not complete.

    Args:
        trainer_gpus: the GPUs that the split gives the trainer now.
        uid: the AsyncRLJob's; it spreads the retries.
        heard_at: when the attempt last reported, or else began to run; None before that.
    """
    job = job_of(attempt, seen)
    pods = pods_of(attempt, seen)
    limit, signs = spec.failure_policy.trainer.hang_seconds, _signs(attempt, pods, seen.report, heard_at)
    return (
        _disrupted(job, pods, seen, now)
        or _failed(spec, pods)
        or _vanished(job, pods)
        or _changed(spec, attempt, seen, trainer_gpus)
        or _hung(limit, signs, now)
        or _partly_scheduled(attempt, pods, uid, now)
        or Running(_next_look(limit, signs, attempt, pods))
    )


def end(spec: Spec, attempt: AttemptStatus, ended: Ended, step: int, now: float) -> AttemptStatus | GiveUp:
    """Return the ended attempt as it is remembered, or `GiveUp` if no other follows it.

    Args:
        step: the policy's last reported step.
    """
    if not ended.charge:
        changes = {"next_retry_time": to_text(now + ended.delay_seconds), "last_reason": ended.reason}
        return attempt.model_copy(update=changes)
    budget = TrainerBudget(
        spec.failure_policy.trainer,
        num_restarts=attempt.restarts,
        num_disruptions=attempt.disruptions,
        failures_in_a_row=attempt.failures_in_a_row,
        step=attempt.step,
    )
    decision = budget.ended(ended.code, step)
    if isinstance(decision, GiveUp):
        return decision
    return attempt.model_copy(
        update={
            "next_retry_time": to_text(now + decision.delay_seconds),
            "last_reason": ended.reason,
            "restarts": budget.num_restarts,
            "disruptions": budget.num_disruptions,
            "failures_in_a_row": budget.failures_in_a_row,
            "step": budget.step,
        }
    )


def next_attempt(
    name: str, spec: Spec, before: AttemptStatus | None, seen: Observed, gpus: int
) -> AttemptStatus:
    """Return the attempt after `before`; its number is higher than that of every existing Job."""
    number = max([before.number if before else 0, *(job.attempt for job in seen.trainer_jobs)]) + 1
    return AttemptStatus(
        number=number,
        job_name=f"{name}-trainer-{number}",
        config_hash=trainer_hash(spec),
        gpus=gpus,
        **(before.model_dump(include=REMEMBERED) if before else {}),
    )


def job_of(attempt: AttemptStatus, seen: Observed) -> TrainerJob | None:
    """Return the Job of an attempt; None if there is none."""
    return next((job for job in seen.trainer_jobs if job.attempt == attempt.number), None)


def pods_of(attempt: AttemptStatus, seen: Observed) -> list[Pod]:
    """Return the pods of an attempt."""
    return [
        pod for pod in seen.pods if pod.is_ours and pod.group == "trainer" and pod.attempt == attempt.number
    ]


def _disrupted(job: TrainerJob | None, pods: Sequence[Pod], seen: Observed, now: float) -> Ended | None:
    """Return the end of an attempt that is nobody's fault: preemption, eviction, a lost node."""
    if job is None or job.is_deleting:
        return _disruption(reasons.JOB_DELETED, "the trainer's Job was deleted")
    for pod in pods:
        if pod.disruption:
            return _disruption(reasons.DISRUPTED, f"pod {pod.name}: {pod.disruption}")
        if pod.is_alive and is_on_dead_node(pod, seen.nodes, now):
            return _disruption(reasons.NODE_LOST, f"pod {pod.name}: its node {pod.node} is gone or not ready")
    return None


def _vanished(job: TrainerJob | None, pods: Sequence[Pod]) -> Ended | None:
    """Return the end of an attempt one of whose pods was deleted by hand.

    A pod that its Job deletes because another one failed does not count: `_failed` is asked first.
    """
    for pod in pods:
        if pod.deleted_at is not None:
            return _disruption(reasons.POD_DELETED, f"pod {pod.name} was deleted")
    if job is not None and job.is_failed:
        return _disruption(reasons.PODS_LOST, f"the trainer's Job failed without an exit code: {job.message}")
    return None


def _disruption(reason: str, message: str) -> Ended:
    return Ended(reason, message, "disruption", -signal.SIGKILL)


def _failed(spec: Spec, pods: Sequence[Pod]) -> Ended | None:
    """Return the end of an attempt one of whose ranks ended with an exit code.

    A fatal exit code counts for more than whatever its peers died of, and so does that of a failed step.
    """
    fatal = spec.failure_policy.trainer.fatal_exit_codes
    failures = [
        (
            each.exit_code in fatal,
            each.ran_out_of_memory,
            each.exit_code == ExitCode.STEP_FAILED,
            each.exit_code not in SIGNAL_CODES,
            pod,
            each,
        )
        for pod in pods
        if pod.deleted_at is None
        for each in pod.ends
        if each.container == TRAINER_CONTAINER and each.exit_code != 0
    ]
    if not failures:
        return None
    *_, pod, worst = max(failures, key=lambda failure: failure[:4])
    if worst.ran_out_of_memory:
        text = f"container {worst.container} of pod {pod.name} used more memory than its limit allows"
        return Ended(reasons.OOM_KILLED, text, "restart", worst.exit_code)
    text = f"pod {pod.name}: exit code {worst.exit_code}"
    if worst.exit_code in fatal:
        return Ended(reasons.FATAL_EXIT, text, "restart", worst.exit_code)
    if worst.exit_code == ExitCode.STEP_FAILED:
        return Ended(reasons.STEP_FAILED, text, "restart", worst.exit_code)
    if worst.exit_code in SIGNAL_CODES:
        return Ended(reasons.KILLED, text, "disruption", 128 - worst.exit_code)
    return Ended(reasons.TRAINER_FAILED, text, "restart", worst.exit_code)


def _changed(spec: Spec, attempt: AttemptStatus, seen: Observed, trainer_gpus: int) -> Ended | None:
    """Return the end of an attempt after an edit of a field marked R, or with a new size from the split.

    Neither is a fault, so nothing is charged.
    """
    if edit := trainer_edit(spec, seen.attempts_began.get(attempt.number), attempt.config_hash):
        return Ended(reasons.CONFIG_CHANGED, edit)
    if attempt.gpus != trainer_gpus:
        return Ended(reasons.RESIZED, f"the trainer goes from {attempt.gpus} to {trainer_gpus} GPUs")
    return None


def _signs(
    attempt: AttemptStatus, pods: Sequence[Pod], report: Report | None, heard_at: float | None
) -> Signs | None:
    """Return the signs of life of a trainer all of whose pods run; before that it cannot hang."""
    if heard_at is None or not pods or any(pod.phase != "Running" for pod in pods):
        return None
    is_present = report is not None and report.attempt == attempt.number
    said = report.seconds_without_progress if report is not None and is_present else None
    return Signs(said, heard_at, REPORT_DELAY_SECONDS)


def _hung(limit: float, signs: Signs | None, now: float) -> Ended | None:
    """Return the end of an attempt that makes no progress or has fallen silent: the trainer's own failure."""
    why = hung(limit, signs, now) if signs is not None else ""
    return Ended(reasons.HUNG, why, "restart", code=HUNG_CODE) if why else None


def began_at(attempt: AttemptStatus, seen: Observed) -> float | None:
    """Return when an attempt began to run, or else when its Job was created; None before that."""
    if attempt.start_time is None:
        return None
    running = [pod.ready_changed_at for pod in pods_of(attempt, seen) if pod.phase == "Running"]
    return max(to_seconds(attempt.start_time), *running, 0.0)


def _partly_scheduled(attempt: AttemptStatus, pods: Sequence[Pod], uid: str, now: float) -> Ended | None:
    """Return the end of an attempt some of whose pods have held GPUs too long while others found no node.

    Ending it gives the GPUs back.
    """
    without = [pod for pod in pods if pod.unschedulable]
    if not without or len(without) == len(pods) or attempt.start_time is None:
        return None
    if now < to_seconds(attempt.start_time) + UNSCHEDULABLE_SECONDS:
        return None
    spread = zlib.crc32(f"{uid}/{attempt.number}".encode()) / 2**32
    text = f"{len(without)} of {len(pods)} trainer pods found no node: {without[0].unschedulable}"
    return Ended(reasons.UNSCHEDULABLE, text, delay_seconds=5 + spread * RETRY_SPREAD_SECONDS)


def _next_look(
    limit: float, signs: Signs | None, attempt: AttemptStatus, pods: Sequence[Pod]
) -> float | None:
    looks = []
    if limit and signs is not None:
        looks.append(silent_at(limit, signs))
    if any(pod.unschedulable for pod in pods) and attempt.start_time is not None:
        looks.append(to_seconds(attempt.start_time) + UNSCHEDULABLE_SECONDS)
    return min(looks, default=None)
