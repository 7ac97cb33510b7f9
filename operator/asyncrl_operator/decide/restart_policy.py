"""When a process that has ended is started again, and when the job has failed. Pure.

The trainer has two budgets: an exit code counts against `maxRestarts`, a signal (a kill, an eviction, the
kernel's OOM killer) against `maxDisruptions`. A step that cannot be trained fails twice before it is given
up; that counts against neither, unless no step is made for longer. All other processes are restarted like a
pod's containers.
"""

from dataclasses import dataclass, field

from asyncrl_api.exits import ExitCode
from asyncrl_api.job import TrainerFailureSpec

CONTAINER_BACKOFF_SECONDS = 0.5
CONTAINER_MAX_BACKOFF_SECONDS = 10.0
CONTAINER_RESET_SECONDS = 60.0
"""How long a process must have lived for its backoff to begin again with the shortest."""
MESSAGING_MAX_FAILURES = 4
"""How often in a row the broker may fail. Without it a job waits in silence, and what keeps a broker from
starting (its port is taken, its files are unusable) seldom goes away."""
FREE_STEP_FAILURES = 2
"""How many ends in a row, without a step in between, a step that cannot be trained may cause for nothing."""
FINAL_CODES = frozenset({ExitCode.USAGE, ExitCode.UNUSABLE, ExitCode.REFUSED})


@dataclass(frozen=True)
class Restart:
    """The process is to be started again after a delay."""

    delay_seconds: float


@dataclass(frozen=True)
class GiveUp:
    """The job has failed."""

    reason: str
    """Why, in one sentence."""


@dataclass
class TrainerBudget:
    """Counts the trainer's ends. The backoff begins at the second end without a step in between."""

    spec: TrainerFailureSpec
    num_restarts: int = 0
    num_disruptions: int = 0
    failures_in_a_row: int = 0
    """The number of ends since the last step that was made."""
    step: int = -1
    """The policy's step at the last end."""

    def ended(self, code: int, step: int) -> Restart | GiveUp:
        """Decide on a trainer that ended.

        Args:
            code: its exit code; minus the signal's number if a signal ended it.
            step: the policy's last reported step when it ended.
        """
        self.failures_in_a_row = 1 if step > self.step else self.failures_in_a_row + 1
        self.step = max(step, self.step)
        if code in self.spec.fatal_exit_codes:
            return GiveUp(f"exit code {code} is final")
        if code < 0:
            self.num_disruptions += 1
            if self.num_disruptions > self.spec.max_disruptions:
                return GiveUp(f"more than maxDisruptions = {self.spec.max_disruptions} signals ended it")
        elif code != ExitCode.STEP_FAILED or self.failures_in_a_row > FREE_STEP_FAILURES:
            self.num_restarts += 1
            if self.num_restarts > self.spec.max_restarts:
                return GiveUp(f"it failed more than maxRestarts = {self.spec.max_restarts} times")
        return Restart(self._backoff())

    def _backoff(self) -> float:
        if self.failures_in_a_row < 2:
            return 0.0
        doublings = min(self.failures_in_a_row - 2, 31)  # 2**31 seconds are above any bound
        return min(self.spec.backoff_seconds * 2.0**doublings, self.spec.max_backoff_seconds)


@dataclass
class ContainerBackoff:
    """Restarts a process, with ever longer delays while it keeps ending.

    Args:
        max_failures: how often in a row the process may end with an exit code; None: without limit.
    """

    max_failures: int | None = None
    num_failures: int = field(default=0, init=False)
    """The number of exit codes in a row. A process that lived for long, or was killed, can evidently start,
    so it begins to count anew."""
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
