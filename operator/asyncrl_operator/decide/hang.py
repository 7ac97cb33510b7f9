"""Whether a trainer hangs: one rule for operator and local runner. Pure.

Two things are known of a trainer, and either may stand still. *It says* for how long it has made no progress
though it was its turn: measured by its own clock, so that no two clocks are compared, and 0 while it waits
for groups, answers or engines. And *it is heard*: a report is renewed every few seconds whatever it says, so
one whose first process is stopped, or whose disk holds it up, falls silent. Silence is counted by the clock
of whoever listens.

A runtime from before `secondsWithoutProgress` says nothing of the first kind; it is judged by its silence.
"""

from dataclasses import dataclass

HUNG_CODE = 1
"""What the restart policy counts a hang as: an exit code, hence a failure of the trainer's own, whatever
signal ends it."""


@dataclass(frozen=True)
class Signs:
    """What an executor knows of the present attempt."""

    said: float | None
    """`secondsWithoutProgress` of its last report; None: no report yet, or one without it."""
    heard_at: float
    """When it reported last, or began: seconds by the clock of the executor."""
    delay_seconds: float
    """How late a report may be heard although the trainer is well."""


def hung(limit_seconds: float, signs: Signs, now: float) -> str:
    """Return why a trainer hangs; empty if it does not.

    Args:
        limit_seconds: `failurePolicy.trainer.hangSeconds`; 0: none hangs.
        now: by the clock of `heard_at`.
    """
    if not limit_seconds:
        return ""
    rule = f"failurePolicy.trainer.hangSeconds: {limit_seconds:.0f}"
    if signs.said is not None and signs.said >= limit_seconds:
        return f"the trainer made no progress in {signs.said:.0f} s, and it was its turn ({rule})"
    if now >= silent_at(limit_seconds, signs):
        return f"the trainer has not reported for {now - signs.heard_at:.0f} s ({rule})"
    return ""


def silent_at(limit_seconds: float, signs: Signs) -> float:
    """Return when silence will have lasted too long, by the clock of `heard_at`."""
    return signs.heard_at + limit_seconds + signs.delay_seconds
