"""When a process that ended is started again, and when the job has failed. Pure.

Two budgets for the trainer: an exit code counts against `maxRestarts`, a signal (a kill, an eviction, the
kernel's OOM killer) against `maxDisruptions`. Everything else is restarted like a pod's container.
"""

from dataclasses import dataclass, field

from asyncrl_api.exits import ExitCode
from asyncrl_api.job import TrainerFailureSpec

CONTAINER_BACKOFF_SECONDS = 0.5
CONTAINER_MAX_BACKOFF_SECONDS = 10.0
CONTAINER_RESET_SECONDS = 60.0
"""A process that lived so long begins again with the shortest backoff."""
MESSAGING_MAX_FAILURES = 4
"""In a row. Without its broker a job waits in silence, and what keeps one from starting (its port is taken,
its files are unusable) seldom passes."""
FINAL_CODES = frozenset({ExitCode.USAGE, ExitCode.UNUSABLE, ExitCode.REFUSED})


@dataclass(frozen=True)
class Restart:
    """Start it again after so many seconds."""

    delay_seconds: float


@dataclass(frozen=True)
class GiveUp:
    """The job has failed; says why in one sentence."""

    reason: str


@dataclass
class TrainerBudget:
    """Counts the trainer's ends. The backoff begins at the second failure without a step in between."""

    spec: TrainerFailureSpec
    num_restarts: int = 0
    num_disruptions: int = 0
    failures_in_a_row: int = 0
    """Ends since a step was made."""
    step: int = -1
    """At the last end."""

    def ended(self, code: int, step: int) -> Restart | GiveUp:
        """Decide on a trainer that ended.

        Args:
            code: its exit code; minus the signal's number if a signal ended it.
            step: of the policy when it ended, as far as reported.
        """
        self.failures_in_a_row = 1 if step > self.step else self.failures_in_a_row + 1
        self.step = max(step, self.step)
        if code in self.spec.fatal_exit_codes:
            return GiveUp(f"exit code {code} is final")
        if code < 0:
            self.num_disruptions += 1
            if self.num_disruptions > self.spec.max_disruptions:
                return GiveUp(f"more than maxDisruptions = {self.spec.max_disruptions} signals ended it")
        else:
            self.num_restarts += 1
            if self.num_restarts > self.spec.max_restarts:
                return GiveUp(f"it failed more than maxRestarts = {self.spec.max_restarts} times")
        return Restart(self._backoff())

    def _backoff(self) -> float:
        if self.failures_in_a_row < 2:
            return 0.0
        doublings = min(self.failures_in_a_row - 2, 31)  # no bound is further than 2**31 from a second
        return min(self.spec.backoff_seconds * 2.0**doublings, self.spec.max_backoff_seconds)


@dataclass
class ContainerBackoff:
    """Restarts a process, ever more slowly while it keeps ending.

    Args:
        max_failures: exit codes in a row that are borne; None: a process may fail for ever.
    """

    max_failures: int | None = None
    num_failures: int = field(default=0, init=False)
    """Exit codes in a row. A process that lived for long, or until it was killed, can be started."""
    _delay: float = field(default=0.0, init=False)

    def ended(self, code: int, lived_seconds: float) -> Restart | GiveUp:
        if code in FINAL_CODES:
            return GiveUp(f"exit code {code} is final")
        if lived_seconds >= CONTAINER_RESET_SECONDS:
            self._delay = 0.0
        if lived_seconds >= CONTAINER_RESET_SECONDS or code < 0:
            self.num_failures = 0
        if code >= 0:
            self.num_failures += 1
        if self.max_failures is not None and self.num_failures > self.max_failures:
            return GiveUp(f"it failed {self.num_failures} times in a row")
        delay, self._delay = self._delay, self._next(self._delay)
        return Restart(delay)

    @staticmethod
    def _next(delay: float) -> float:
        return min(CONTAINER_MAX_BACKOFF_SECONDS, max(CONTAINER_BACKOFF_SECONDS, delay * 2))
