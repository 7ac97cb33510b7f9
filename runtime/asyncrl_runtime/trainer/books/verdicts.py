"""What of each group that has arrived may be trained, so that it is worked out once per version. No I/O."""

from collections.abc import Mapping

from asyncrl_api.job import StalenessSpec
from asyncrl_runtime.contract.messages import Group
from asyncrl_runtime.trainer.books.staleness import LiveGroup, assess
from asyncrl_runtime.trainer.books.tickets import Discard


class Verdicts:
    """Remembers verdicts, without arrays per token, until something changes that they rest on.

    To assess a group takes about a millisecond at full size, and while the trainer waits, every group that
    comes is a reason to look at all that have come.
    """

    def __init__(self) -> None:
        self._rests_on: object = None
        self._by_ticket: dict[int, LiveGroup | Discard] = {}
        self._ahead: Verdicts | None = None
        self.num_assessed = 0
        """How often a group was assessed: each time takes a part of a millisecond."""

    def on(
        self,
        group: Group,
        version: int,
        rule: StalenessSpec,
        began: Mapping[int, int],
        sample_filter: str,
    ) -> LiveGroup | Discard:
        """Return what `assess` says of a group that has arrived."""
        rests_on = version, rule, dict(began), sample_filter
        if rests_on != self._rests_on:
            ahead = self._ahead
            self.clear()
            self._rests_on = rests_on
            if ahead is not None and ahead._rests_on == rests_on:
                self._by_ticket = ahead._by_ticket
        if (known := self._by_ticket.get(group.ticket)) is not None:
            return known
        self.num_assessed += 1
        verdict = assess(group, version, rule, began, sample_filter)
        self._by_ticket[group.ticket] = verdict
        return verdict

    def forget(self, ticket: int) -> None:
        """Let go of a group that is no longer in the inbox."""
        self._by_ticket.pop(ticket, None)

    def clear(self) -> None:
        """Forget all: tickets may come back with other samples."""
        self._by_ticket.clear()
        self._ahead = None

    def take_over(self, ahead: "Verdicts") -> None:
        """Keep what was worked out elsewhere for the version that comes next."""
        self._ahead = ahead
