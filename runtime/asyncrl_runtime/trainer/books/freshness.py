"""How many tickets are kept open where fewer than the bound are enough, so that samples are fresh. Pure.

A trainer that is the bottleneck finds a full queue at each step, whose groups are as old as the bound allows,
although half a batch in the queue would keep it as busy. `spec.staleness.target: Auto` opens as few tickets
as leave that much. The bound of `TicketBook.limit` stays what it is: here tickets are only issued later.
"""

from typing import Literal

SPARE_SHARE = 0.5
"""The share of a batch that is meant to be left in the queue when the trainer takes one."""
RAISE = 0.5
"""The share of what was missing by which the number of open tickets grows, at each step."""


class Freshness:
    """Decides how many tickets may be open, from what the trainer finds when it wants a batch.

    An integral controller: what a change does is seen after the time that a group takes, up to eta + 1 steps
    later. So the number falls by `1 / (2 (eta + 1))` of what was too much, which cannot swing, and rises
    faster, since a trainer that waits costs more than a token that is old.
    """

    def __init__(self) -> None:
        self._fewer = 0.0
        """How many fewer tickets are open than the bound allows."""

    def open_tickets(self, target: int | Literal["Auto"], batch_size: int, max_versions: int) -> int:
        """Return how many tickets may be open at most, from one batch to (eta + 1) batches.

        Args:
            target: `spec.staleness.target`.
            max_versions: `spec.staleness.maxVersions`, eta.
        """
        bound = (max_versions + 1) * batch_size
        if target != "Auto":
            return min(bound, (target + 1) * batch_size)
        return max(batch_size, bound - round(self._fewer))

    def batch_wanted(self, num_arrived: int, batch_size: int, max_versions: int) -> None:
        """Take into account how many groups lay in the queue when the trainer wanted its next batch."""
        too_many = num_arrived - batch_size * (1 + SPARE_SHARE)
        gain = RAISE if too_many < 0 else 1 / (2 * (max_versions + 1))
        self._fewer = min(max(0.0, self._fewer + gain * too_many), float(max_versions * batch_size))
