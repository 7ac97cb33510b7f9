"""The split of the GPUs, pass by pass: the first one, a changed budget, what the measurements call for. Pure.

In mode Auto, GPUs move in whole rollout replicas. They move only if every report for half a cooldown has
shown the same group to be short, and a whole cooldown has passed since the last move. Nothing moves while a
group is not well, because reports then say more about the fault than about the split.

A group is short if the next split in its favor is expected to make steps shorter. Both groups work side by
side, so a step takes as long as the slower one needs: the trainer is busy for `1 - wait_share` of it, and the
engines run `rollout_load` of what they could, which stands for the time that they would need if nothing held
them up. With more GPUs a group needs proportionally less.
"""

from dataclasses import dataclass
from typing import Literal

from asyncrl_api.job import Spec
from asyncrl_api.job_status import SplitStatus
from asyncrl_api.report import Report
from asyncrl_api.times import to_seconds, to_text
from asyncrl_operator.layout import Split, gpus_per_replica, plan_split, smallest_trainer, trainer_sizes

Short = Literal["", "Rollout", "Trainer"]

LEAST_GAIN = 0.03
"""The share by which steps must be expected to become shorter for GPUs to move. What is expected is not that
exact: a smaller gain might send the same GPUs to and fro."""
BUSY_SHARE = 0.05
"""The share of its time that the trainer may wait for a batch while GPUs of rollout count as superfluous."""


@dataclass(frozen=True)
class _Sizes:
    """The sizes that the spec allows, in GPUs and, for `fewest` and `most`, in replicas."""

    total: int
    replica: int
    fewest: int
    most: int
    trainers: tuple[int, ...]

    def rollout(self, trainer: int) -> int:
        """Return the GPUs of as many replicas as fit beside a trainer of this size."""
        return max(0, min(self.most, (self.total - trainer) // self.replica)) * self.replica


def decide_split(
    spec: Spec, before: SplitStatus | None, report: Report | None, is_well: bool, now: float
) -> SplitStatus:
    """Return the split that holds from now on; `before` itself if nothing changes.

    Args:
        before: the last decision; None for a new job.
        report: the running attempt's report, if there is one.
        is_well: whether all groups run at full strength.
        now: Unix time, seconds.

    Raises:
        SpecError: nothing fits into the budget.
    """
    first = plan_split(spec)  # may raise, whatever was decided before
    if spec.gpu_budget.mode == "Manual":
        return _unless_same(before, _status(first, spec, first.reason, now))
    if before is None:
        return _status(first, spec, first.reason, now)
    sizes = _sizes(spec)
    if (fitted := _refit(before, sizes)) is None:
        return _status(first, spec, "BudgetChanged", now)
    if fitted != (before.trainer, before.rollout) or before.total != sizes.total:
        return _moved(fitted, spec, sizes, "BudgetChanged", now)
    if before.decided_by != "Auto":
        return _moved(fitted, spec, sizes, "ModeChanged", now)
    return _follow_measurements(
        spec, before, sizes, _short(spec, before, sizes, report) if is_well else "", now
    )


def _sizes(spec: Spec) -> _Sizes:
    least = smallest_trainer(spec)
    return _Sizes(
        spec.gpu_budget.total,
        gpus_per_replica(spec),
        spec.rollout.min_replicas,
        spec.rollout.max_replicas,
        tuple(size for size in trainer_sizes(spec) if size >= least),
    )


def _refit(before: SplitStatus, sizes: _Sizes) -> tuple[int, int] | None:
    """Return the old split fitted to new bounds, None if that cannot be. Rollout grows and shrinks first."""
    if before.gpus_per_replica != sizes.replica:
        return None
    largest = sizes.total - sizes.fewest * sizes.replica
    trainers = [size for size in sizes.trainers if size <= min(before.trainer, largest)]
    if not trainers:
        return None
    trainer = trainers[-1]
    room = sizes.rollout(trainer)
    is_as_it_was = before.total == sizes.total and trainer == before.trainer
    wanted = min(before.rollout, room) if is_as_it_was else room
    return trainer, max(wanted, sizes.fewest * sizes.replica)


@dataclass(frozen=True)
class _Need:
    """What each group needs of the time of a step, with the split that it was measured with."""

    trainer: float
    rollout: float
    split: SplitStatus

    @property
    def step(self) -> float:
        return max(self.trainer, self.rollout)

    def at(self, trainer: int, rollout: int) -> float:
        """Return how long a step is expected to take with other sizes, in GPUs."""
        return max(self.trainer * self.split.trainer / trainer, self.rollout * self.split.rollout / rollout)


def _short(spec: Spec, before: SplitStatus, sizes: _Sizes, report: Report | None) -> Short:
    """Return the group that is short according to one report."""
    if report is None or report.wait_share is None:
        return ""
    load = 1.0 if report.rollout_load is None else report.rollout_load  # an older runtime does not tell
    need = _Need(1 - report.wait_share, load, before)
    groups: tuple[Short, ...] = ("Rollout", "Trainer")
    for short in groups:
        if (target := _relieve(short, spec, before, sizes)) is None:
            continue
        trainer, rollout = target
        if need.at(trainer, rollout) <= (1 - LEAST_GAIN) * need.step:
            return short
        are_given_back = trainer == before.trainer and rollout < before.rollout
        if are_given_back and need.trainer >= 1 - BUSY_SHARE and need.at(trainer, rollout) <= need.trainer:
            return short
    return ""


def _follow_measurements(
    spec: Spec, before: SplitStatus, sizes: _Sizes, short: Short, now: float
) -> SplitStatus:
    if not short:
        if not before.pressure:
            return before
        return before.model_copy(update={"pressure": "", "pressure_time": None})
    if short != before.pressure or before.pressure_time is None:
        return before.model_copy(update={"pressure": short, "pressure_time": to_text(now)})
    if now < next_move(spec, before):
        return before
    target = _relieve(short, spec, before, sizes)
    return before if target is None else _moved(target, spec, sizes, f"{short}Short", now)


def next_move(spec: Spec, split: SplitStatus) -> float:
    """Return when a split under pressure may change, in Unix time."""
    cooldown = spec.gpu_budget.auto.cooldown_seconds
    since = to_seconds(split.pressure_time or split.last_change_time)
    return max(to_seconds(split.last_change_time) + cooldown, since + cooldown / 2)


def _relieve(short: Short, spec: Spec, before: SplitStatus, sizes: _Sizes) -> tuple[int, int] | None:
    """Return the next split that favors the group that is short; None if there is none."""
    may_resize = spec.gpu_budget.auto.trainer_resize == "AtCheckpoint"
    smaller = [size for size in sizes.trainers if size < before.trainer]
    larger = [size for size in sizes.trainers if size > before.trainer]
    if short == "Rollout":
        if before.rollout < sizes.rollout(before.trainer):
            return before.trainer, before.rollout + sizes.replica
        if may_resize and smaller and sizes.rollout(smaller[-1]) > before.rollout:
            return smaller[-1], sizes.rollout(smaller[-1])
        return None
    if may_resize:
        if larger and sizes.rollout(larger[0]) >= sizes.fewest * sizes.replica:
            return larger[0], min(before.rollout, sizes.rollout(larger[0]))
        return None
    # GPUs that the trainer may not take are given back: samples that only grow old are worth nothing.
    fewer = before.rollout - sizes.replica
    return (before.trainer, fewer) if fewer >= sizes.fewest * sizes.replica else None


def _moved(sizes: tuple[int, int], spec: Spec, limits: _Sizes, reason: str, now: float) -> SplitStatus:
    trainer, rollout = sizes
    idle = limits.total - trainer - rollout
    return _status(Split(trainer, rollout, idle, limits.replica, reason), spec, reason, now)


def _status(split: Split, spec: Spec, reason: str, now: float) -> SplitStatus:
    return SplitStatus(
        trainer=split.trainer,
        rollout=split.rollout,
        idle=split.idle,
        gpus_per_replica=split.gpus_per_replica,
        total=spec.gpu_budget.total,
        decided_by=spec.gpu_budget.mode,
        reason=reason,
        last_change_time=to_text(now),
    )


def _unless_same(before: SplitStatus | None, after: SplitStatus) -> SplitStatus:
    if before is None:
        return after
    time = {"last_change_time": before.last_change_time}
    return before if after.model_copy(update=time) == before else after
