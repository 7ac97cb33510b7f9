"""What the user is told about a pass: Events with fixed reasons, found by comparing two statuses. Pure."""

from collections.abc import Iterable

from asyncrl_api.job_status import Status
from asyncrl_api.times import to_seconds
from asyncrl_operator.decide import reasons
from asyncrl_operator.decide.attempts import Ended
from asyncrl_operator.decide.desired import DeleteChildren, DeletePod, Deletion, Event
from asyncrl_operator.decide.observed import Observed

CHECKPOINT_SECONDS = 600.0
"""The shortest time between two Events about checkpoints."""
PHASE_EVENTS = {reasons.RUNNING, reasons.SUSPENDING, reasons.SUSPENDED}
"""The phases whose beginning is an Event with the phase's own name as its reason."""
OBSTACLES = {reasons.UNSCHEDULABLE, reasons.IMAGE_PULL, reasons.QUOTA_EXCEEDED}
"""The reasons for which a starting job may wait until somebody acts."""


def between(
    before: Status, after: Status, ended: Ended | None, deletions: Iterable[Deletion]
) -> tuple[Event, ...]:
    """Return the Events of a pass; none if nothing has changed.

    Args:
        ended: the attempt that ended in this pass.
    """
    return (
        *_phases(before, after),
        *([_end_of_attempt(ended)] if ended is not None else []),
        *_sizes(before, after),
        *_warnings(before, after),
        *_checkpoint(before, after),
        *_forced(deletions),
    )


def after_the_end(seen: Observed, deletions: Iterable[Deletion]) -> tuple[Event, ...]:
    """Return the Event of an expired job, once, although it takes several passes to delete all children."""
    groups = [group for group in (seen.rollout, seen.messaging) if group is not None]
    begins = any(not group.is_deleting for group in groups)
    expired = begins and any(isinstance(each, DeleteChildren) for each in deletions)
    text = "the objects of the finished job are deleted (spec.ttlSecondsAfterFinished)"
    return (Event(reasons.TTL_EXPIRED, text),) if expired else ()


def _phases(before: Status, after: Status) -> list[Event]:
    events = []
    number = after.attempt.number if after.attempt is not None else 0
    if number and before.attempt is None:
        events.append(Event(reasons.STARTED, f"attempt {number} of the trainer begins"))
    if before.phase == after.phase:
        return events
    if before.phase == "Suspended":
        events.append(Event(reasons.RESUMED, "the job goes on from its checkpoint"))
    if after.phase in PHASE_EVENTS:
        events.append(Event(after.phase, after.message))
    if after.phase == "Succeeded":
        events.append(Event(_reason_of_success(after), after.message))
    if after.phase == "Failed":
        events.append(Event(reasons.FAILED, after.message, "Warning"))
    return events


def _reason_of_success(after: Status) -> str:
    complete = after.condition("Complete")
    return reasons.COMPLETE if complete is None else complete.reason


def _end_of_attempt(ended: Ended) -> Event:
    reason = reasons.DISRUPTED if ended.charge == "disruption" else reasons.TRAINER_RESTART
    return Event(reason, f"{ended.reason}: {ended.message}", "Warning" if ended.charge else "Normal")


def _sizes(before: Status, after: Status) -> list[Event]:
    old, new = before.split, after.split
    if new is None or old is None or (old.trainer, old.rollout) == (new.trainer, new.rollout):
        return []
    text = f"trainer {old.trainer} -> {new.trainer}, rollout {old.rollout} -> {new.rollout} ({new.reason})"
    events = [Event(reasons.SPLIT_CHANGED, text)]
    if old.rollout != new.rollout:
        size = new.gpus_per_replica
        events.append(
            Event(reasons.ROLLOUT_SCALED, f"{old.rollout // size} -> {new.rollout // size} engines")
        )
    return events


def _warnings(before: Status, after: Status) -> list[Event]:
    """Return what has gone wrong: a warning for each reason that was not there before."""
    events = []
    for kind in ("Stalled", "Degraded", "Reconciling"):
        old, new = before.condition(kind), after.condition(kind)
        if new is None or new.status != "True" or after.phase == "Failed":
            continue
        # Behind an error of the operator nobody knows what was told before.
        told = (new.reason, reasons.OPERATOR_ERROR)
        is_known = old is not None and old.status == "True" and old.reason in told
        if not is_known and (kind != "Reconciling" or new.reason in OBSTACLES):
            events.append(Event(new.reason, new.message, "Warning"))
    return events


def _checkpoint(before: Status, after: Status) -> list[Event]:
    old, new = before.last_checkpoint, after.last_checkpoint
    if new is None or new == old:
        return []
    if old is not None and to_seconds(new.time) - to_seconds(old.time) < CHECKPOINT_SECONDS:
        return []
    return [Event(reasons.CHECKPOINT_SAVED, f"step {new.step}: {new.path}")]


def _forced(deletions: Iterable[Deletion]) -> list[Event]:
    return [
        Event(reasons.POD_FORCE_DELETED, f"pod {each.name}: its node is dead", "Warning")
        for each in deletions
        if isinstance(each, DeletePod) and each.is_forced
    ]
