"""Decides what to do about a job now: spec, status, cluster, report and time in; an Outcome out. Pure.

It looks at what is there, never at what happened, so a pass may run at any time and any number of times. What
it must remember (attempt, split, clocks) is in the status, which is stored before anything is done that
depends on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from asyncrl_api.job_status import AttemptStatus, ClocksStatus, SplitStatus, Status
from asyncrl_api.parsing import SpecError
from asyncrl_api.report import MASTERED_STATE
from asyncrl_api.times import to_seconds, to_text
from asyncrl_operator.decide import attempts, events, reasons
from asyncrl_operator.decide.desired import (
    DeleteChildren,
    DeletePod,
    DeleteTrainerJob,
    Deletion,
    Desired,
    DesiredTrainer,
    Outcome,
)
from asyncrl_operator.decide.edits import current_templates, rollout_hash
from asyncrl_operator.decide.health import assess, disruption_of, overdue
from asyncrl_operator.decide.observed import Observed, Problem, TrainerJob
from asyncrl_operator.decide.pass_state import PassState
from asyncrl_operator.decide.rebalance import decide_split, next_move
from asyncrl_operator.decide.restart_policy import GiveUp
from asyncrl_operator.decide.rolling import Wave, is_on_dead_node, lost_pods, next_wave
from asyncrl_operator.decide.status import JobObject, Memory, Standing, after_the_end, describe, next_show


@dataclass(frozen=True)
class Decision:
    """What a pass decides, before the status and the Events are made of it."""

    standing: Standing
    memory: Memory
    desired: Desired | None = None
    deletions: tuple[Deletion, ...] = ()
    wakes: tuple[float | None, ...] = ()
    ended: attempts.Ended | None = None
    """The end of the attempt that ended in this pass, so that the user is told."""


def plan(job: JobObject, status: Status, seen: Observed, now: float) -> Outcome:
    """Return what to do about a job.

    Args:
        status: the status as the API server holds it.
        seen: the cluster, as far as it concerns the job.
        now: Unix time, seconds.
    """
    state = PassState(job, status, seen, now)
    if status.is_true("Finished"):
        return _after_the_end(state)
    decision = _with_lost_pods(state, _decide(state))
    after = describe(job, status, seen, state.report, decision.standing, decision.memory, now)
    wakes = [at for at in decision.wakes if at is not None]
    if state.report is not None and (show := next_show(status, state.report)) > now:
        wakes.append(show)
    is_verdict = after.is_true("Finished")
    return Outcome(
        write_status_first=is_verdict or (after.attempt, after.split) != (status.attempt, status.split),
        desired=decision.desired,
        deletions=decision.deletions,
        status=after,
        wake_at=min(wakes, default=None),
        events=events.between(status, after, decision.ended, decision.deletions),
    )


def _decide(state: PassState) -> Decision:
    """Decide in the order of what takes precedence: an end, suspension, obstacles, then running."""
    attempt = state.status.attempt
    if attempt is not None and (job := attempts.job_of(attempt, state.seen)) and job.is_complete:
        return _finish(state, Standing("Succeeded", *_success(state)))
    if state.spec.suspend or state.is_suspending:
        return _suspend(state)
    if not state.status.is_true("Suspended") and (end := overdue(state, state.memory)):
        return _finish(state, end)
    if state.seen.problem is not None:
        return _stalled(state, state.seen.problem)
    earlier = [pod for pod in state.seen.pods if not pod.is_ours and pod.is_alive]
    if earlier and attempt is None:
        message = f"{len(earlier)} pod(s) of an earlier job with this name still run: {earlier[0].name}"
        return Decision(Standing("Pending", reasons.WAITING_FOR_PREDECESSOR, message), state.memory)
    is_well = state.status.is_true("Running") and not state.status.is_true("Degraded")
    try:
        split = decide_split(state.spec, state.status.split, state.report, is_well, state.now)
    except SpecError as error:
        return _stalled(state, Problem(reasons.BUDGET_TOO_SMALL, str(error)))
    return _run(state, split)


# -- running


def _run(state: PassState, split: SplitStatus) -> Decision:
    """Keep the trainer going, attempt by attempt, along with rollout and messaging."""
    resumes = state.status.is_true("Suspended")  # then activeDeadlineSeconds counts from now
    started = to_text(state.now) if resumes else state.memory.start_time or to_text(state.now)
    memory, attempt = replace(state.memory, split=split, start_time=started), state.status.attempt
    if attempt is None or attempt.next_retry_time is not None:
        return _between_attempts(state, memory)
    if attempt.start_time is None:
        if attempts.job_of(attempt, state.seen) is None:
            if _has_room(state, split, attempt.gpus):
                return _go_on(state, memory)
            # The budget was lowered before its Job was made: it is given up, which costs nothing.
            unmade = attempt.model_copy(update={"next_retry_time": to_text(state.now)})
            return _between_attempts(state, replace(memory, attempt=unmade))
        attempt = attempt.model_copy(update={"start_time": to_text(state.now)})
        memory = replace(memory, attempt=attempt)
    verdict = attempts.judge(
        state.spec,
        attempt,
        state.seen,
        trainer_gpus=split.trainer,
        uid=state.job.uid,
        heard_at=state.heard_at(attempt),
        now=state.now,
    )
    if isinstance(verdict, attempts.Running):
        decision = _go_on(state, memory)
        return replace(decision, wakes=(*decision.wakes, verdict.wake_at))
    step = state.report.step if state.report is not None else attempt.step
    after = attempts.end(state.spec, attempt, verdict, step, state.now)
    if isinstance(after, GiveUp):
        message = f"{verdict.message}; {after.reason}"
        return replace(_finish(state, Standing("Failed", verdict.reason, message)), ended=verdict)
    return replace(_between_attempts(state, replace(memory, attempt=after)), ended=verdict)


def _between_attempts(state: PassState, memory: Memory) -> Decision:
    """Wait until the last attempt is gone, its backoff is over and there is room; then begin the next one."""
    before, split = memory.attempt, memory.split
    assert split is not None
    trainers = state.alive_in("trainer")
    deletions = tuple(
        DeleteTrainerJob(job.name)
        for job in state.seen.trainer_jobs
        if not job.is_deleting and not _ends_by_itself(state, job)
    )
    if before is not None and _runs_unseen(before, state):
        deletions = (*deletions, DeleteTrainerJob(before.job_name))
    is_gone = not trainers and not any(not job.is_failed for job in state.seen.trainer_jobs)
    due = to_seconds(before.next_retry_time) if before is not None and before.next_retry_time else 0.0
    if is_gone and state.now >= due and _has_room(state, split, split.trainer):
        attempt = attempts.next_attempt(state.job.name, state.spec, before, state.seen, split.trainer)
        return _go_on(state, replace(memory, attempt=attempt))
    waiting = _go_on(state, memory)
    wakes = (*waiting.wakes, due if due > state.now else None)
    return replace(waiting, deletions=waiting.deletions + deletions, wakes=wakes)


def _has_room(state: PassState, split: SplitStatus, trainer_gpus: int) -> bool:
    """Whether the budget holds a trainer of this size beside the engines that are there."""
    rollout = state.claim("rollout", state.replicas * split.gpus_per_replica)
    return rollout + trainer_gpus <= state.spec.gpu_budget.total


def _runs_unseen(attempt: AttemptStatus, state: PassState) -> bool:
    """Whether an attempt's pods keep running although its Job is not seen.

    The Job has then lost the label that the operator watches Jobs by.
    """
    is_unseen = attempts.job_of(attempt, state.seen) is None
    return is_unseen and any(pod.deleted_at is None for pod in state.alive_in("trainer"))


def _ends_by_itself(state: PassState, job: TrainerJob) -> bool:
    """Whether a Job has failed or is about to report so; such a Job is kept for its logs.

    A Job with a pod on a dead node does not count: it would wait for that pod forever.
    """
    pods = [pod for pod in state.ours if pod.group == "trainer" and pod.attempt == job.attempt]
    if any(pod.is_alive and is_on_dead_node(pod, state.seen.nodes, state.now) for pod in pods):
        return False
    return job.is_failed or any(pod.phase == "Failed" for pod in pods)


def _go_on(state: PassState, memory: Memory) -> Decision:
    """Keep in place everything that a running job needs, and report how much of it is ready."""
    attempt, split = memory.attempt, memory.split
    assert split is not None
    is_between = attempt is None or attempt.next_retry_time is not None
    replicas = _rollout_replicas(state, split, attempt)
    wave = _wave(state, replicas)
    found = assess(state, memory, wave)
    if end := overdue(state, found.memory):
        return _finish(state, end)
    desired = Desired(
        messaging_replicas=1 if state.spec.messaging.mode == "Embedded" else None,
        trainer=None if is_between or attempt is None else DesiredTrainer(attempt.number, attempt.gpus),
        rollout_replicas=replicas,
        disruption=disruption_of(state, attempt),
    )
    move = next_move(state.spec, split) if split.pressure else None
    return Decision(
        found.standing,
        found.memory,
        desired,
        (*wave.deletions, *_outlived_jobs(state, attempt, is_between)),
        (wave.wake_at, move if move is not None and move > state.now else None, *found.wakes),
    )


def _rollout_replicas(state: PassState, split: SplitStatus, attempt: AttemptStatus | None) -> int:
    """Return how many engines may run: none before the trainer has its GPUs, never more than the budget."""
    if not state.replicas and not state.trainer_runs(attempt):
        return 0
    room = state.spec.gpu_budget.total - state.claim("trainer", split.trainer)
    return max(0, min(split.rollout, room)) // split.gpus_per_replica


def _wave(state: PassState, replicas: int) -> Wave:
    """Return the next step of a rolling update, once the StatefulSet holds the newest template."""
    rollout = state.seen.rollout
    if rollout is None or rollout.template != rollout_hash(state.spec) or rollout.replicas != replicas:
        return Wave()
    percent = state.spec.rollout.update.max_unavailable_percent
    current = current_templates(state.spec, state.seen.templates_began)
    return next_wave(state.alive_in("rollout"), current, replicas, percent, state.now)


def _outlived_jobs(state: PassState, attempt: AttemptStatus | None, is_between: bool) -> Sequence[Deletion]:
    """Return the deletions of earlier attempts' Jobs; the last one is kept for its logs if it failed."""
    if is_between or attempt is None or attempts.job_of(attempt, state.seen) is None:
        return ()
    return [
        DeleteTrainerJob(job.name)
        for job in state.seen.trainer_jobs
        if job.attempt < attempt.number
        and not job.is_deleting
        and not (job.is_failed and job.attempt == attempt.number - 1)
    ]


# -- ends


def _success(state: PassState) -> tuple[str, str]:
    """Return why the job is complete: the reason, and the message."""
    report = state.report
    if report is None:
        return reasons.COMPLETE, "the trainer has finished"
    trained = f"{report.step} steps were trained"
    if report.state == MASTERED_STATE:
        return reasons.MASTERED, f"{trained}; {report.message}"
    return reasons.COMPLETE, trained


def _finish(state: PassState, standing: Standing) -> Decision:
    """End the job: engines and broker go to zero pods at once, and a trainer that still runs is stopped."""
    memory = replace(state.memory, completion_time=to_text(state.now), clocks=ClocksStatus())
    desired, deletions = _at_rest(state, with_messaging=True)
    return Decision(standing, memory, desired, deletions, (state.now,))


def _after_the_end(state: PassState) -> Outcome:
    """Keep what is left of a finished job at zero pods, and delete it when its time to live is over.

    Its verdict stands, whatever happens.
    """
    spec, completed = state.spec, state.status.completion_time
    expires = (to_seconds(completed) if completed else 0.0) + spec.ttl_seconds_after_finished
    delay = spec.failure_policy.dead_node_force_delete_seconds
    lost = lost_pods(state.ours, state.seen.nodes, delay, state.now)
    desired, deletions = _at_rest(state, with_messaging=True)
    wakes = [expires, *([lost.wake_at] if lost.wake_at is not None else [])]
    if not state.seen.has_children:
        desired, deletions, wakes = Desired(shared=False), (), []
    elif state.now >= expires:
        desired, deletions, wakes = Desired(shared=False), (DeleteChildren(),), wakes[1:]
    return Outcome(
        write_status_first=False,
        desired=desired,
        deletions=(*deletions, *lost.deletions),
        status=after_the_end(state.job, state.status, state.seen),
        wake_at=min(wakes, default=None),
        events=events.after_the_end(state.seen, deletions),
    )


def _at_rest(state: PassState, *, with_messaging: bool) -> tuple[Desired, tuple[Deletion, ...]]:
    """Return what brings a job to zero pods; nothing is created for that.

    Args:
        with_messaging: whether the broker goes too. A trainer that makes its last checkpoint still needs it.
    """
    seen, is_over = state.seen, state.status.is_true("Finished")
    desired = Desired(
        shared=False,
        messaging_replicas=int(not with_messaging) if seen.messaging is not None else None,
        rollout_replicas=0 if seen.rollout is not None else None,
    )
    drops_failed = is_over and not state.spec.failure_policy.retain_pods_on_failure
    deletions = [
        DeleteTrainerJob(job.name)
        for job in seen.trainer_jobs
        if not job.is_deleting and not job.is_complete and (drops_failed or not _ends_by_itself(state, job))
    ]
    return desired, tuple(deletions)


# -- suspension, obstacles


def _suspend(state: PassState) -> Decision:
    """Bring the job to zero pods: first the engines and, after a checkpoint, the trainer; then the broker."""
    memory, attempt = replace(state.memory, clocks=ClocksStatus()), state.status.attempt
    if attempt is not None and attempt.next_retry_time is None:
        ended = attempts.end(
            state.spec, attempt, attempts.Ended(reasons.SUSPENDED, ""), attempt.step, state.now
        )
        assert not isinstance(ended, GiveUp), "a suspension costs nothing"
        memory = replace(memory, attempt=ended)
    others = [pod for pod in state.alive if pod.group != "messaging"]
    desired, deletions = _at_rest(state, with_messaging=not others)
    if state.alive:
        text = f"{len(state.alive)} pod(s) still run; the trainer makes a checkpoint"
        return Decision(Standing("Suspending", reasons.SUSPENDING, text), memory, desired, deletions)
    if memory.split is None:
        memory = replace(memory, split=_first_split(state))
    text = "spec.suspend is set" if state.spec.suspend else "the job resumes"
    wake = None if state.spec.suspend else state.now
    return Decision(Standing("Suspended", reasons.SUSPENDED, text), memory, desired, deletions, (wake,))


def _first_split(state: PassState) -> SplitStatus | None:
    """Return the split that a queue is told of before the job starts."""
    try:
        return decide_split(state.spec, None, None, False, state.now)
    except SpecError:
        return None


def _stalled(state: PassState, problem: Problem) -> Decision:
    """Touch nothing: what runs goes on, and what does not exist is not created."""
    phase = state.status.phase or "Pending"
    return Decision(Standing(phase, problem.reason, problem.message, stalled=problem), state.memory)


def _with_lost_pods(state: PassState, decision: Decision) -> Decision:
    delay = state.spec.failure_policy.dead_node_force_delete_seconds
    lost = lost_pods(state.ours, state.seen.nodes, delay, state.now)
    forced = {each.uid for each in lost.deletions}
    others = [
        each for each in decision.deletions if not isinstance(each, DeletePod) or each.uid not in forced
    ]
    wakes = (*decision.wakes, lost.wake_at)
    return replace(decision, deletions=(*others, *lost.deletions), wakes=wakes)
