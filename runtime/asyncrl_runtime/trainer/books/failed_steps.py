"""What becomes of a recorded step that failed by its own fault: it is tried once more, then given up. Pure.

The ledger holds the failures (`asyncrl_api.ledger`), so the next attempt decides, whatever ended this one.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from asyncrl_api.ledger import History, StepFailure

MAX_FAILURES = 2
"""How often a recorded step may fail by its own fault before it is given up."""


class GivenUp(NamedTuple):
    """A step that is given up, with all that were recorded after it."""

    version: int
    discards: Mapping[str, tuple[int, ...]]
    """The tickets that are discarded, by reason: the guilty ones, and those that these steps discarded, which
    nobody would sample again. What they trained is open again."""
    cause: str


def step_to_give_up(history: History) -> GivenUp | None:
    """Return the first recorded step that has failed too often; None if there is none."""
    failures: dict[int, list[StepFailure]] = {}
    for failure in history.in_a_row:
        failures.setdefault(failure.version, []).append(failure)
    for version, failed in sorted(failures.items()):
        if len(failed) >= MAX_FAILURES:
            last, recorded = failed[-1], history.steps[version].tickets
            reason = "step_failed" if last.out_of_memory_at is None else "out_of_memory"
            guilty = tuple(ticket for ticket in recorded if ticket in last.tickets)
            discards = defaultdict(tuple, {reason: guilty or recorded})
            for step in history.steps[version:]:
                for why, tickets in step.discards.items():
                    discards[why] += tickets
            return GivenUp(version, dict(discards), last.cause)
    return None


def bounded_tokens(manifest: int, failures: Iterable[StepFailure], version: int, longest: int) -> int:
    """Return the tokens per micro-batch with which a step is trained.

    Half of the least with which memory ran out, in this step or one before it; a manifest that says less
    than that is taken at its word.

    Args:
        manifest: `spec.training.tokensPerMicroBatch`.
        failures: those of the surviving history.
        longest: the tokens of the step's longest sample, which one micro-batch has to hold.
    """
    exceeded = [each.out_of_memory_at for each in failures if each.version <= version]
    halves = [at // 2 for at in exceeded if at is not None and at <= manifest]
    return max(min([manifest, *halves]), min(longest, manifest))
