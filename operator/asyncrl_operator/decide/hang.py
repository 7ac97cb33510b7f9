"""Whether a trainer hangs: one rule for operator and local runner. Pure.

Two signs show that a trainer is alive, and either may fail. *It says* how long it has made no progress
although it was its turn. That is measured by its own clock, so that no two clocks are compared, and is 0
while it waits for groups, answers or engines. And *it is heard*: it renews its report every few seconds
whatever the report says, so a trainer whose first process is stopped, or whose disk holds it up, falls
silent. Silence is counted by the clock of whoever listens.

A runtime from before `secondsWithoutProgress` does not give the first sign; it is judged by its silence.
"""

from dataclasses import dataclass

HUNG_CODE = 1
"""The exit code that stands for a hang in the restart policy. A hang is thus a failure of the trainer's own,
whatever signal ends it."""


@dataclass(frozen=True)
class Signs:
    """What an executor knows of the present attempt."""

    said: float | None
    """`secondsWithoutProgress` in its last report; None if there is no report yet, or one without it."""
    heard_at: float
    """When it last reported, or began, in seconds by the executor's clock."""
    delay_seconds: float
    """How late a report may arrive although the trainer is well."""


def hung(limit_seconds: float, signs: Signs, now: float) -> str:
    """Return why a trainer counts as hung; empty if it does not.

    Args:
        limit_seconds: `failurePolicy.trainer.hangSeconds`; 0: no trainer counts as hung.
        now: the time by the clock of `heard_at`.
    """
    if not limit_seconds:
        return ""
    rule = f"failurePolicy.trainer.hangSeconds: {limit_seconds:.0f}"
    if signs.said is not None and signs.said >= limit_seconds:
        return f"the trainer made no progress in {signs.said:.0f} s although it was its turn ({rule})"
    if now >= silent_at(limit_seconds, signs):
        return f"the trainer has not reported for {now - signs.heard_at:.0f} s ({rule})"
    return ""


def silent_at(limit_seconds: float, signs: Signs) -> float:
    """Return when silence will have lasted too long, by the clock of `heard_at`."""
    return signs.heard_at + limit_seconds + signs.delay_seconds
