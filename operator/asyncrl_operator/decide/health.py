"""The health of a job that is to run: up or starting, at strength or degraded, and since when. Pure."""

from dataclasses import dataclass, replace

from asyncrl_api.job_status import AttemptStatus, ClocksStatus
from asyncrl_api.times import to_seconds, to_text
from asyncrl_operator.decide import reasons
from asyncrl_operator.decide.clocks import (
    Clocks,
    Deadline,
    Parts,
    advance,
    deadlines,
    is_below_minimum,
    is_up,
)
from asyncrl_operator.decide.observed import Problem
from asyncrl_operator.decide.pass_state import PassState
from asyncrl_operator.decide.rolling import Wave
from asyncrl_operator.decide.status import Memory, Standing

REPORT_STALE_SECONDS = 300.0
"""A trainer that runs and has not reported for so long is told of."""
ENGINE_SECONDS = 180.0
"""For a new engine to become ready before a job counts as short of engines."""
IMAGE_REASONS = ("ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull")
NO_FAULT = ("", reasons.SUSPENDED)
"""Reasons of an attempt's end after which the next is a start, not a restart."""


@dataclass(frozen=True)
class Health:
    """How the job stands, what is remembered of it, and when it may change by itself."""

    standing: Standing
    memory: Memory
    wakes: tuple[float, ...]


def assess(state: PassState, memory: Memory, wave: Wave) -> Health:
    """Return how a job stands whose pods are wanted.

    It is up once the trainer, the broker and an engine are; and stays so, degraded if need be, for as long
    as the trainer runs.
    """
    parts, was_up = _parts(state, memory), state.status.is_true("Running")
    clocks = advance(state.spec, _clocks(memory), parts, was_up=was_up, now=state.now)
    memory = replace(
        memory,
        clocks=ClocksStatus(
            pending_since=_text(clocks.pending_since), below_minimum_since=_text(clocks.below_minimum_since)
        ),
    )
    wakes = [deadline.at for deadline in _deadlines(state, memory)]
    if not is_up(parts, was_up=was_up):
        return Health(_not_up(state, memory.attempt), memory, tuple(wakes))
    if (stale_at := _stale_at(state, memory.attempt)) is not None and stale_at > state.now:
        wakes.append(stale_at)
    wakes += [at for at in _due_ready(state) if at > state.now]
    held = sum(pod.gpus for pod in state.alive)
    report = state.report
    progress = "no step yet" if report is None else f"step {report.step} of {report.max_steps}"
    message = f"{held}/{state.spec.gpu_budget.total} GPUs in use, {progress}"
    degraded = _degraded(state, wave, is_below_minimum(state.spec, parts), stale_at)
    return Health(Standing("Running", reasons.RUNNING, message, degraded=degraded), memory, tuple(wakes))


def overdue(state: PassState, memory: Memory) -> Standing | None:
    """Return the end of a job one of whose clocks has run out."""
    over = (each for each in _deadlines(state, memory) if state.now >= each.at)
    return next((Standing("Failed", each.reason, each.message) for each in over), None)


def _deadlines(state: PassState, memory: Memory) -> list[Deadline]:
    return list(deadlines(state.spec, _clocks(memory), _parts(state, memory), state.status.message))


def _parts(state: PassState, memory: Memory) -> Parts:
    return Parts(
        trainer_runs=state.trainer_runs(memory.attempt),
        is_messaging_ready=state.is_messaging_ready,
        ready_engines=state.num_ready_engines,
        engines=state.replicas,
    )


def _clocks(memory: Memory) -> Clocks:
    remembered = memory.clocks
    return Clocks(
        _seconds(memory.start_time),
        _seconds(remembered.pending_since),
        _seconds(remembered.below_minimum_since),
    )


def _seconds(text: str | None) -> float | None:
    return None if text is None else to_seconds(text)


def _text(seconds: float | None) -> str | None:
    return None if seconds is None else to_text(seconds)


def _not_up(state: PassState, attempt: AttemptStatus | None) -> Standing:
    last = attempt.last_reason if attempt is not None else ""
    if last == reasons.RESIZED:
        return Standing("Resizing", last, "the trainer starts with another size from a checkpoint")
    starts = _what_starts(state, attempt)
    if last in NO_FAULT:
        return Standing("Starting", starts.reason, starts.message)
    assert attempt is not None
    text = f"attempt {attempt.number} starts"
    if attempt.next_retry_time is not None:
        text = (
            f"attempt {attempt.number} ended; the next waits for {attempt.next_retry_time} and its pods' end"
        )
    return Standing("Restarting", last, f"{text}: {starts.message}")


def _what_starts(state: PassState, attempt: AttemptStatus | None) -> Problem:
    """Return what is waited for, in the words of who keeps it waiting."""
    if obstacle := state.seen.blocked or _obstacle(state):
        return obstacle
    if not state.trainer_runs(attempt):
        return Problem(reasons.TRAINER_STARTING, "the trainer starts")
    if not state.is_messaging_ready:
        return Problem(reasons.MESSAGING_STARTING, "the NATS server starts")
    return Problem(reasons.ROLLOUT_STARTING, "the trainer runs, no engine is ready yet")


def _obstacle(state: PassState) -> Problem | None:
    """Return what keeps a pod from starting, as scheduler or kubelet say it."""
    pods = sorted(state.alive, key=lambda pod: pod.name)
    for pod in pods:
        if pod.unschedulable:
            return Problem(reasons.UNSCHEDULABLE, f"pod {pod.name}: {pod.unschedulable}")
    for pod in pods:
        reason = pod.waiting.partition(":")[0]
        if reason and reason not in ("ContainerCreating", "PodInitializing"):
            return Problem(
                reasons.IMAGE_PULL if reason in IMAGE_REASONS else reason, f"pod {pod.name}: {pod.waiting}"
            )
    return None


def _stale_at(state: PassState, attempt: AttemptStatus | None) -> float | None:
    heard_at = state.heard_at(attempt) if attempt is not None else None
    return None if heard_at is None else heard_at + REPORT_STALE_SECONDS


def _due_ready(state: PassState) -> list[float]:
    """Return when each engine that is not ready should have been."""
    return [pod.created_at + ENGINE_SECONDS for pod in state.alive_in("rollout") if not pod.is_ready]


def _degraded(state: PassState, wave: Wave, below: bool, stale_at: float | None) -> Problem | None:
    """Return what is wrong with a job that is up, the worst first."""
    ready, report, bound = state.num_ready_engines, state.report, state.spec.staleness.max_versions
    obstacle = _obstacle(state)
    why = f"; {obstacle.message}" if obstacle else ""
    if below:
        least = state.spec.failure_policy.rollout.min_available_percent
        text = f"{ready}/{state.replicas} engines are ready, below minAvailablePercent {least}{why}"
        return Problem(reasons.ROLLOUT_BELOW_MINIMUM, text)
    if not state.is_messaging_ready:
        return Problem(reasons.MESSAGING_NOT_READY, f"the NATS server is not ready{why}")
    if wave.stuck:
        return Problem(reasons.ROLLOUT_UPDATE_STUCK, f"the update of the engines has stopped: {wave.stuck}")
    if stale_at is not None and state.now >= stale_at:
        return Problem(
            reasons.REPORT_STALE, f"the trainer has not reported for {int(REPORT_STALE_SECONDS)} s or more"
        )
    if report is not None and report.staleness_p95 is not None and report.staleness_p95 > bound:
        text = f"tokens of {report.staleness_p95} versions ago are trained; staleness.maxVersions is {bound}"
        return Problem(reasons.STALENESS_EXCEEDED, text)
    if state.seen.blocked is not None:
        return state.seen.blocked
    is_late = any(at <= state.now for at in _due_ready(state))
    if ready < state.replicas and (is_late or obstacle):
        return Problem(reasons.ROLLOUT_SHORT, f"{ready}/{state.replicas} engines are ready{why}")
    return None
