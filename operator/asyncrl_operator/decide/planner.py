"""What is to be done about a job now: spec, status, cluster, report and time in; an Outcome out. Pure.

It asks what is, never what happened, so a pass may run at any time and any number of times. What it must
remember (attempt, split, clocks) is in the status, stored before anything is done that rests on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from asyncrl_api.manifests import SpecError
from asyncrl_api.status import AttemptStatus, ClocksStatus, SplitStatus, Status
from asyncrl_api.times import to_seconds, to_text
from asyncrl_operator.decide import attempts, events
from asyncrl_operator.decide.observed import (
    Attempt,
    DeleteChildren,
    DeletePod,
    DeleteTrainerJob,
    Deletion,
    Desired,
    Observed,
    Outcome,
    Problem,
    TrainerJob,
)
from asyncrl_operator.decide.rebalance import decide_split, next_move
from asyncrl_operator.decide.restart_policy import GiveUp
from asyncrl_operator.decide.rolling import Wave, is_on_dead_node, lost_pods, next_wave
from asyncrl_operator.decide.scene import Scene
from asyncrl_operator.decide.standing import overdue, stand
from asyncrl_operator.decide.status import Job, Memory, Standing, after_the_end, describe, next_show
from asyncrl_operator.hashes import rollout_hash


@dataclass(frozen=True)
class Decision:
    """What a pass comes to."""

    standing: Standing
    memory: Memory
    desired: Desired | None = None
    deletions: tuple[Deletion, ...] = ()
    wakes: tuple[float | None, ...] = ()
    ended: attempts.Ended | None = None
    """The attempt that ended in this pass, for the user to be told."""


def plan(job: Job, status: Status, seen: Observed, now: float) -> Outcome:
    """Return what is to be done about a job.

    Args:
        status: as the API server holds it.
        seen: the cluster, as far as it concerns the job.
        now: Unix time, seconds.
    """
    scene = Scene(job, status, seen, now)
    if status.is_true("Finished"):
        return _after_the_end(scene)
    decision = _with_lost_pods(scene, _decide(scene))
    after = describe(job, status, seen, scene.report, decision.standing, decision.memory, now)
    wakes = [at for at in decision.wakes if at is not None]
    if scene.report is not None and (show := next_show(status, scene.report)) > now:
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


def _decide(scene: Scene) -> Decision:
    """The order of what counts: an end, suspension, obstacles, then running."""
    attempt = scene.status.attempt
    if attempt is not None and (job := attempts.job_of(attempt, scene.seen)) and job.is_complete:
        return _finish(scene, Standing("Succeeded", "Complete", _last_words(scene)))
    if scene.spec.suspend or scene.is_suspending:
        return _suspend(scene)
    if not scene.status.is_true("Suspended") and (end := overdue(scene, scene.memory)):
        return _finish(scene, end)
    if scene.seen.problem is not None:
        return _stalled(scene, scene.seen.problem)
    earlier = [pod for pod in scene.seen.pods if not pod.is_ours and pod.is_alive]
    if earlier and attempt is None:
        message = f"{len(earlier)} pod(s) of an earlier job of this name still run: {earlier[0].name}"
        return Decision(Standing("Pending", "WaitingForPredecessor", message), scene.memory)
    is_well = scene.status.is_true("Running") and not scene.status.is_true("Degraded")
    try:
        split = decide_split(scene.spec, scene.status.split, scene.report, is_well, scene.now)
    except SpecError as error:
        return _stalled(scene, Problem("BudgetTooSmall", str(error)))
    return _run(scene, split)


# -- running


def _run(scene: Scene, split: SplitStatus) -> Decision:
    """Keep the trainer going, attempt by attempt, and rollout and messaging beside it."""
    resumes = scene.status.is_true("Suspended")  # the deadline's clock begins again
    started = to_text(scene.now) if resumes else scene.memory.start_time or to_text(scene.now)
    memory, attempt = replace(scene.memory, split=split, start_time=started), scene.status.attempt
    if attempt is None or attempt.next_retry_time is not None:
        return _between_attempts(scene, memory)
    if attempt.start_time is None:
        if attempts.job_of(attempt, scene.seen) is None:
            return _go_on(scene, memory)
        attempt = attempt.model_copy(update={"start_time": to_text(scene.now)})
        memory = replace(memory, attempt=attempt)
    verdict = attempts.judge(
        scene.spec, attempt, scene.seen, trainer_gpus=split.trainer, uid=scene.job.uid, now=scene.now
    )
    if isinstance(verdict, attempts.Running):
        decision = _go_on(scene, memory)
        return replace(decision, wakes=(*decision.wakes, verdict.wake_at))
    step = scene.report.step if scene.report is not None else attempt.step
    after = attempts.end(scene.spec, attempt, verdict, step, scene.now)
    if isinstance(after, GiveUp):
        message = f"{verdict.message}; {after.reason}"
        return replace(_finish(scene, Standing("Failed", verdict.reason, message)), ended=verdict)
    return replace(_between_attempts(scene, replace(memory, attempt=after)), ended=verdict)


def _between_attempts(scene: Scene, memory: Memory) -> Decision:
    """Wait until the last attempt is gone, its backoff is over and there is room; then begin the next."""
    before, split = memory.attempt, memory.split
    assert split is not None
    trainers = scene.alive_in("trainer")
    deletions = tuple(
        DeleteTrainerJob(job.name)
        for job in scene.seen.trainer_jobs
        if not job.is_deleting and not _ends_by_itself(scene, job)
    )
    if before is not None and _runs_unseen(before, scene):
        deletions = (*deletions, DeleteTrainerJob(before.job_name))
    is_gone = not trainers and not any(not job.is_failed for job in scene.seen.trainer_jobs)
    due = to_seconds(before.next_retry_time) if before is not None and before.next_retry_time else 0.0
    rollout = scene.claim("rollout", scene.replicas * split.gpus_per_replica)
    has_room = rollout + split.trainer <= scene.spec.gpu_budget.total
    if is_gone and scene.now >= due and has_room:
        attempt = attempts.next_attempt(scene.job.name, scene.spec, before, scene.seen, split.trainer)
        return _go_on(scene, replace(memory, attempt=attempt))
    waiting = _go_on(scene, memory)
    wakes = (*waiting.wakes, due if due > scene.now else None)
    return replace(waiting, deletions=waiting.deletions + deletions, wakes=wakes)


def _runs_unseen(attempt: AttemptStatus, scene: Scene) -> bool:
    """Whether an attempt's pods run on for a Job that is not seen: it has lost the label it is watched by."""
    is_unseen = attempts.job_of(attempt, scene.seen) is None
    return is_unseen and any(pod.deleted_at is None for pod in scene.alive_in("trainer"))


def _ends_by_itself(scene: Scene, job: TrainerJob) -> bool:
    """Whether a Job has failed, or is about to say so: it stays, for its logs.

    With a pod on a dead node it would wait for that pod for ever.
    """
    pods = [pod for pod in scene.ours if pod.group == "trainer" and pod.attempt == job.attempt]
    if any(pod.is_alive and is_on_dead_node(pod, scene.seen.nodes, scene.now) for pod in pods):
        return False
    return job.is_failed or any(pod.phase == "Failed" for pod in pods)


def _go_on(scene: Scene, memory: Memory) -> Decision:
    """Have there what belongs to a job that runs, and say how far that is so."""
    attempt, split = memory.attempt, memory.split
    assert split is not None
    is_between = attempt is None or attempt.next_retry_time is not None
    replicas = _rollout_replicas(scene, split, attempt)
    wave = _wave(scene, replicas)
    found = stand(scene, memory, wave)
    if end := overdue(scene, found.memory):
        return _finish(scene, end)
    desired = Desired(
        messaging_replicas=1 if scene.spec.messaging.mode == "Embedded" else None,
        trainer=None if is_between or attempt is None else Attempt(attempt.number, attempt.gpus),
        rollout_replicas=replicas,
    )
    move = next_move(scene.spec, split) if split.pressure else None
    return Decision(
        found.standing,
        found.memory,
        desired,
        (*wave.deletions, *_outlived_jobs(scene, attempt, is_between)),
        (wave.wake_at, move if move is not None and move > scene.now else None, *found.wakes),
    )


def _rollout_replicas(scene: Scene, split: SplitStatus, attempt: AttemptStatus | None) -> int:
    """Return how many engines there may be: none before the trainer has its GPUs, never above the budget."""
    if not scene.replicas and not scene.trainer_runs(attempt):
        return 0
    room = scene.spec.gpu_budget.total - scene.claim("trainer", split.trainer)
    return max(0, min(split.rollout, room)) // split.gpus_per_replica


def _wave(scene: Scene, replicas: int) -> Wave:
    """Return the next step of a rolling update, once the StatefulSet holds the new template."""
    rollout, template = scene.seen.rollout, rollout_hash(scene.spec)
    if rollout is None or rollout.template != template or rollout.replicas != replicas:
        return Wave()
    percent = scene.spec.rollout.update.max_unavailable_percent
    return next_wave(scene.alive_in("rollout"), template, replicas, percent, scene.now)


def _outlived_jobs(scene: Scene, attempt: AttemptStatus | None, is_between: bool) -> Sequence[Deletion]:
    """Return the Jobs of earlier attempts; the last one that failed stays, for its logs."""
    if is_between or attempt is None or attempts.job_of(attempt, scene.seen) is None:
        return ()
    return [
        DeleteTrainerJob(job.name)
        for job in scene.seen.trainer_jobs
        if job.attempt < attempt.number
        and not job.is_deleting
        and not (job.is_failed and job.attempt == attempt.number - 1)
    ]


# -- ends


def _last_words(scene: Scene) -> str:
    return "the trainer has finished" if scene.report is None else f"{scene.report.step} steps are trained"


def _finish(scene: Scene, standing: Standing) -> Decision:
    """End the job: engines and broker go to zero pods at once, a trainer that still runs is stopped."""
    memory = replace(scene.memory, completion_time=to_text(scene.now), clocks=ClocksStatus())
    desired, deletions = _at_rest(scene, with_messaging=True)
    return Decision(standing, memory, desired, deletions, (scene.now,))


def _after_the_end(scene: Scene) -> Outcome:
    """A verdict stands. What is left of the job is kept at zero pods, and deleted when its time is over."""
    spec, completed = scene.spec, scene.status.completion_time
    expires = (to_seconds(completed) if completed else 0.0) + spec.ttl_seconds_after_finished
    delay = spec.failure_policy.dead_node_force_delete_seconds
    lost = lost_pods(scene.ours, scene.seen.nodes, delay, scene.now)
    desired, deletions = _at_rest(scene, with_messaging=True)
    wakes = [expires, *([lost.wake_at] if lost.wake_at is not None else [])]
    if not scene.seen.has_children:
        desired, deletions, wakes = Desired(shared=False), (), []
    elif scene.now >= expires:
        desired, deletions, wakes = Desired(shared=False), (DeleteChildren(),), wakes[1:]
    return Outcome(
        write_status_first=False,
        desired=desired,
        deletions=(*deletions, *lost.deletions),
        status=after_the_end(scene.job, scene.status, scene.seen),
        wake_at=min(wakes, default=None),
        events=events.after_the_end(scene.seen, deletions),
    )


def _at_rest(scene: Scene, *, with_messaging: bool) -> tuple[Desired, tuple[Deletion, ...]]:
    """Return what brings a job to zero pods; nothing is made for it.

    Args:
        with_messaging: the broker goes too. A trainer that makes its last checkpoint still needs it.
    """
    seen, is_over = scene.seen, scene.status.is_true("Finished")
    desired = Desired(
        shared=False,
        messaging_replicas=int(not with_messaging) if seen.messaging is not None else None,
        rollout_replicas=0 if seen.rollout is not None else None,
    )
    drops_failed = is_over and not scene.spec.failure_policy.retain_pods_on_failure
    deletions = [
        DeleteTrainerJob(job.name)
        for job in seen.trainer_jobs
        if not job.is_deleting and not job.is_complete and (drops_failed or not _ends_by_itself(scene, job))
    ]
    return desired, tuple(deletions)


# -- suspension, obstacles


def _suspend(scene: Scene) -> Decision:
    """Zero pods: engines and trainer first, the trainer after a checkpoint, then the broker."""
    memory, attempt = replace(scene.memory, clocks=ClocksStatus()), scene.status.attempt
    if attempt is not None and attempt.next_retry_time is None:
        ended = attempts.end(scene.spec, attempt, attempts.Ended("Suspended", ""), attempt.step, scene.now)
        assert not isinstance(ended, GiveUp), "a suspension costs nothing"
        memory = replace(memory, attempt=ended)
    others = [pod for pod in scene.alive if pod.group != "messaging"]
    desired, deletions = _at_rest(scene, with_messaging=not others)
    if scene.alive:
        text = f"{len(scene.alive)} pod(s) still run; the trainer makes a checkpoint"
        return Decision(Standing("Suspending", "Suspending", text), memory, desired, deletions)
    if memory.split is None:
        memory = replace(memory, split=_first_split(scene))
    text = "spec.suspend is set" if scene.spec.suspend else "resumes"
    wake = None if scene.spec.suspend else scene.now
    return Decision(Standing("Suspended", "Suspended", text), memory, desired, deletions, (wake,))


def _first_split(scene: Scene) -> SplitStatus | None:
    """Return the split that a queue is told of before the job starts."""
    try:
        return decide_split(scene.spec, None, None, False, scene.now)
    except SpecError:
        return None


def _stalled(scene: Scene, problem: Problem) -> Decision:
    """Touch nothing: what runs goes on, what does not exist is not made."""
    phase = scene.status.phase or "Pending"
    return Decision(Standing(phase, problem.reason, problem.message, stalled=problem), scene.memory)


def _with_lost_pods(scene: Scene, decision: Decision) -> Decision:
    delay = scene.spec.failure_policy.dead_node_force_delete_seconds
    lost = lost_pods(scene.ours, scene.seen.nodes, delay, scene.now)
    forced = {each.uid for each in lost.deletions}
    others = [
        each for each in decision.deletions if not isinstance(each, DeletePod) or each.uid not in forced
    ]
    wakes = (*decision.wakes, lost.wake_at)
    return replace(decision, deletions=(*others, *lost.deletions), wakes=wakes)
