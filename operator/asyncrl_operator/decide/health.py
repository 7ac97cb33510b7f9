"""The health of a job that should run: up or starting, at full strength or degraded, and since when. Pure."""

from dataclasses import dataclass, replace

from asyncrl_api.job_status import AttemptStatus, ClocksStatus
from asyncrl_api.times import to_seconds, to_text
from asyncrl_operator.decide import attempts, reasons
from asyncrl_operator.decide.clocks import (
    Clocks,
    Deadline,
    Parts,
    advance,
    deadlines,
    is_below_minimum,
    is_up,
)
from asyncrl_operator.decide.disruption import announced_disruption
from asyncrl_operator.decide.observed import Problem
from asyncrl_operator.decide.pass_state import PassState
from asyncrl_operator.decide.rolling import Wave
from asyncrl_operator.decide.status import Memory, Standing

REPORT_STALE_SECONDS = 300.0
"""How long a running trainer may go without a report before the status says so."""
ENGINE_SECONDS = 180.0
"""The time that a new engine has to become ready before the job counts as short of engines."""
IMAGE_REASONS = ("ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull")
NO_FAULT = ("", reasons.SUSPENDED)
"""The reasons for an attempt's end after which the next attempt is a start, not a restart."""


@dataclass(frozen=True)
class Health:
    """The standing of a job, what is remembered of it, and when its standing may change by itself."""

    standing: Standing
    memory: Memory
    wakes: tuple[float, ...]


def assess(state: PassState, memory: Memory, wave: Wave) -> Health:
    """Return the health of a job that should have pods.

    It is up once the trainer, the broker and one engine are, and stays up, degraded if need be, for as long
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
    if disruption := disruption_of(state, memory.attempt):
        message += f"; a disruption is announced ({disruption}): a checkpoint after each step"
    degraded = _degraded(state, wave, is_below_minimum(state.spec, parts), stale_at)
    return Health(Standing("Running", reasons.RUNNING, message, degraded=degraded), memory, tuple(wakes))


def disruption_of(state: PassState, attempt: AttemptStatus | None) -> str:
    """Return what is announced to end an attempt's pods; empty if nothing is."""
    pods = [] if attempt is None else attempts.pods_of(attempt, state.seen)
    return announced_disruption(pods, state.seen.nodes)


def overdue(state: PassState, memory: Memory) -> Standing | None:
    """Return the failure of a job one of whose clocks has run out; None if none has."""
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
        return Standing("Resizing", last, "the trainer starts from a checkpoint with another number of GPUs")
    starts = _what_starts(state, attempt)
    if last in NO_FAULT:
        return Standing("Starting", starts.reason, starts.message)
    assert attempt is not None
    text = f"attempt {attempt.number} starts"
    if attempt.next_retry_time is not None:
        text = (
            f"attempt {attempt.number} ended; the next waits until {attempt.next_retry_time} and for the old "
            "pods to end"
        )
    return Standing("Restarting", last, f"{text}: {starts.message}")


def _what_starts(state: PassState, attempt: AttemptStatus | None) -> Problem:
    """Return what the job is waiting for, in the words of whatever keeps it waiting."""
    if obstacle := state.seen.blocked or _obstacle(state):
        return obstacle
    if not state.trainer_runs(attempt):
        return Problem(reasons.TRAINER_STARTING, "the trainer is starting")
    if not state.is_messaging_ready:
        return Problem(reasons.MESSAGING_STARTING, "the NATS server is starting")
    return Problem(reasons.ROLLOUT_STARTING, "the trainer runs, and no engine is ready yet")


def _obstacle(state: PassState) -> Problem | None:
    """Return what keeps a pod from starting, in the words of the scheduler or the kubelet."""
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
    """Return, for each engine that is not ready, when it should be."""
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
    if report is not None and report.disk_fault:
        return Problem(reasons.DISK_FAILING, report.disk_fault)
    if report is not None and report.staleness_p95 is not None and report.staleness_p95 > bound:
        text = (
            f"tokens of {report.staleness_p95} versions ago are trained on; staleness.maxVersions is {bound}"
        )
        return Problem(reasons.STALENESS_EXCEEDED, text)
    if report is not None and report.skipped_updates:
        text = (
            f"{report.skipped_updates} optimizer updates of the last steps were skipped: their gradient is "
            "not finite"
        )
        return Problem(reasons.UPDATES_SKIPPED, text)
    if state.seen.blocked is not None:
        return state.seen.blocked
    is_late = any(at <= state.now for at in _due_ready(state))
    if ready < state.replicas and (is_late or obstacle):
        return Problem(reasons.ROLLOUT_SHORT, f"{ready}/{state.replicas} engines are ready{why}")
    return None
