"""Whether a step is finished when the trainer is told to stop, and what is announced before that."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from asyncrl_api.run_config import DISRUPTION_FILE

LEAVE_SECONDS = 5.0
"""What is left of the grace for everything that is neither step nor checkpoint."""
RECENT_STEPS = 8


def fits_into_grace(left: float, step_seconds: float | None, checkpoint_seconds: float) -> bool:
    """Return whether the rest of a step, and a checkpoint after it, are done in time.

    Args:
        left: seconds until the trainer is killed.
        step_seconds: what the step still needs; None if no step has been measured, and then none is risked.
        checkpoint_seconds: how long the last checkpoint took.
    """
    return step_seconds is not None and step_seconds + checkpoint_seconds + LEAVE_SECONDS <= left


class StepTimes:
    """How long steps take, by the longest of the last ones.

    Args:
        clock: monotonic time, in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._began: float | None = None

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Measure the step in the body, if it comes to its end."""
        self._began = self._clock()
        yield
        self._recent.append(self._clock() - self._began)

    def left(self) -> float | None:
        """Return how long the step that began last still takes; None if none has been measured."""
        if not self._recent or self._began is None:
            return None
        return max(0.0, self._began + max(self._recent) - self._clock())


def announced_disruption(live_file: Path) -> str:
    """Return what is announced to end the trainer's pod; empty if nothing is, as always on one machine."""
    try:
        return live_file.with_name(DISRUPTION_FILE).read_text().strip()
    except (OSError, ValueError):
        return ""
