"""Proves from the ledger that every ticket was trained in exactly one step or counted as discarded. Pure."""

from collections import Counter
from dataclasses import dataclass

from asyncrl_api.ledger import History


@dataclass(frozen=True)
class Audit:
    """What happened to the tickets 1 to N."""

    num_issued: int
    num_steps: int
    num_trained: int
    num_without_effect: int
    """Those of the trained tickets whose update was not applied, since its gradient was not finite."""
    discarded: Counter[str]
    """The number of discarded tickets by reason."""
    missing: tuple[int, ...]
    """The tickets that were neither trained nor discarded, although the job is over."""
    twice: tuple[int, ...]
    """The tickets that were closed more than once."""
    num_open: int
    """The tickets that are not closed yet, if the job goes on; its ledger does not know the last ones yet."""
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
        num_without_effect=sum(len(step.without_effect) for step in history.steps),
        discarded=reasons,
        missing=unclosed if is_finished else (),
        twice=tuple(sorted(ticket for ticket, count in times.items() if count > 1)) + strangers,
        num_open=0 if is_finished else len(unclosed),
        is_finished=is_finished,
    )


def render(result: Audit) -> str:
    """Return the audit as text for people; programs may read its first line too."""
    discarded = sum(result.discarded.values())
    lines = [
        f"trained {result.num_trained}  discarded {discarded}  missing {len(result.missing)}"
        f"  twice {len(result.twice)}",
        f"{result.num_issued} tickets, {result.num_steps} steps"
        + ("" if result.is_finished else f"; the job is not finished, {result.num_open} tickets are open"),
    ]
    if count := result.num_without_effect:
        lines.append(f"  trained without effect: {count}, since the gradient of their update was not finite")
    lines += [f"  discarded as {reason}: {count}" for reason, count in result.discarded.most_common()]
    lines += [f"  missing: {_list(result.missing)}"] if result.missing else []
    lines += [f"  twice: {_list(result.twice)}"] if result.twice else []
    return "\n".join(lines)


def _list(tickets: tuple[int, ...]) -> str:
    return ", ".join(map(str, tickets[:20])) + (" ..." if len(tickets) > 20 else "")
