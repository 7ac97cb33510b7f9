"""How long a job has been active, pending or short of engines, and when that ends it. Pure.

Operator and local runner share this policy. It takes plain values that both can give: seconds by the
executor's own clock, and how many engines there are.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from asyncrl_api.job import Spec
from asyncrl_operator.decide import reasons


@dataclass(frozen=True)
class Parts:
    """The parts of a job that run or are ready, as its executor sees them."""

    trainer_runs: bool
    is_messaging_ready: bool
    ready_engines: int
    engines: int
    """The number of engines that there should be."""


@dataclass(frozen=True)
class Clocks:
    """When each state began, in seconds by the executor's clock; None while the job is not in that state."""

    active_since: float | None = None
    pending_since: float | None = None
    below_minimum_since: float | None = None


@dataclass(frozen=True)
class Deadline:
    """When a clock runs out, and why the job has then failed."""

    at: float
    reason: str
    message: str


def is_up(parts: Parts, *, was_up: bool) -> bool:
    """Whether a job is up: from when trainer, broker and one engine are, for as long as the trainer runs."""
    return parts.trainer_runs and (was_up or (parts.is_messaging_ready and parts.ready_engines > 0))


def is_below_minimum(spec: Spec, parts: Parts) -> bool:
    """Whether fewer engines are ready than `failurePolicy.rollout.minAvailablePercent` asks for."""
    return parts.ready_engines * 100 < spec.failure_policy.rollout.min_available_percent * parts.engines


def advance(spec: Spec, before: Clocks, parts: Parts, *, was_up: bool, now: float) -> Clocks:
    """Return the clocks as they run now. Only a job that is up can be short of engines."""
    up = is_up(parts, was_up=was_up)
    is_below = up and is_below_minimum(spec, parts)
    return Clocks(
        before.active_since,
        pending_since=None if up else _since(before.pending_since, now),
        below_minimum_since=_since(before.below_minimum_since, now) if is_below else None,
    )


def deadlines(spec: Spec, clocks: Clocks, parts: Parts, last_words: str = "") -> Iterator[Deadline]:
    """Yield the deadlines of the clocks that run, in the order in which they count.

    Args:
        last_words: what a pending job is waiting for.
    """
    if spec.active_deadline_seconds and clocks.active_since is not None:
        text = f"spec.activeDeadlineSeconds: {spec.active_deadline_seconds} have passed"
        yield Deadline(clocks.active_since + spec.active_deadline_seconds, reasons.DEADLINE_EXCEEDED, text)
    if spec.pending_deadline_seconds and clocks.pending_since is not None:
        text = f"spec.pendingDeadlineSeconds: not running after {spec.pending_deadline_seconds} s"
        at = clocks.pending_since + spec.pending_deadline_seconds
        yield Deadline(at, reasons.PENDING_DEADLINE_EXCEEDED, f"{text}; {last_words}" if last_words else text)
    policy = spec.failure_policy.rollout
    if policy.on_below_minimum == "Fail" and clocks.below_minimum_since is not None:
        text = (
            f"{parts.ready_engines}/{parts.engines} engines were ready, below minAvailablePercent "
            f"{policy.min_available_percent}, for {policy.below_minimum_seconds} s"
        )
        at = clocks.below_minimum_since + policy.below_minimum_seconds
        yield Deadline(at, reasons.ROLLOUT_BELOW_MINIMUM, text)


def _since(before: float | None, now: float) -> float:
    return now if before is None else before
