"""Proves from the ledger that each ticket was trained in exactly one step or counted as discarded. Pure."""

from collections import Counter
from dataclasses import dataclass

from asyncrl_runtime.transport.ledger import History


@dataclass(frozen=True)
class Audit:
    """What became of the tickets 1 to N."""

    num_issued: int
    num_steps: int
    num_trained: int
    discarded: Counter[str]
    """By reason."""
    missing: tuple[int, ...]
    """Neither trained nor discarded, though the job is over."""
    twice: tuple[int, ...]
    """Closed more than once."""
    num_open: int
    """Not closed yet; the job goes on. The ledger of a job that goes on does not know its last tickets."""
    is_finished: bool

    @property
    def is_clean(self) -> bool:
        return not self.missing and not self.twice


def audit(history: History) -> Audit:
    """Count every ticket of the surviving history."""
    trained = Counter(ticket for step in history.steps for ticket in step.tickets)
    discarded: Counter[int] = Counter()
    reasons: Counter[str] = Counter()
    for by_reason in [*(step.discards for step in history.steps), history.left_over]:
        for reason, tickets in by_reason.items():
            discarded.update(tickets)
            reasons[reason] += len(tickets)
    times = trained + discarded
    is_finished = history.num_issued is not None
    num_issued = history.num_issued if history.num_issued is not None else max(times, default=0)
    unclosed = tuple(ticket for ticket in range(1, num_issued + 1) if ticket not in times)
    strangers = tuple(ticket for ticket in times if ticket > num_issued)
    return Audit(
        num_issued=num_issued,
        num_steps=len(history.steps),
        num_trained=len(trained),
        discarded=reasons,
        missing=unclosed if is_finished else (),
        twice=tuple(sorted(ticket for ticket, count in times.items() if count > 1)) + strangers,
        num_open=0 if is_finished else len(unclosed),
        is_finished=is_finished,
    )
