"""How long the trainer has made no progress although it is its turn: the time that `hangSeconds` limits.

It is the trainer's turn while its ranks carry out a command, and while it starts. Between commands rank 0
waits for groups, answers or engines, which have conditions of their own, and the clock rests. Whether its
event loop still runs is another question: a trainer whose loop is stuck reports nothing.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

Measure = Callable[[], int]
"""Returns a number that changes as long as something makes progress, such as a number of bytes."""


class TurnClock:
    """The clock of the trainer's turn.

    Turns may overlap: commands queue for the one thread of the ranks, and the clock runs from the first of
    them on. Its methods may be called from any thread.

    Args:
        clock: monotonic time, in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # a start is reported by a thread of its own
        self._num_turns = 0
        self._moved_at = 0.0
        self._measures: dict[Measure, int] = {}

    @contextlib.contextmanager
    def turn(self, measure: Measure | None = None) -> Iterator[None]:
        """Let the clock run during the body, whose end counts as progress.

        Args:
            measure: a measure of what the body does. It is taken whenever the clock is read, and a change
                counts as progress.
        """
        amount = measure() if measure is not None else 0
        with self._lock:
            if self._num_turns == 0:
                self.moved()
            self._num_turns += 1
            if measure is not None:
                self._measures[measure] = amount
        try:
            yield
        finally:
            with self._lock:
                self._num_turns -= 1
                if measure is not None:
                    del self._measures[measure]
                self.moved()

    def moved(self) -> None:
        """Start the clock again from zero, because there has been progress."""
        self._moved_at = self._clock()

    def seconds_without_progress(self) -> float:
        """Return how long there has been no progress in this turn; 0 if it is not the trainer's turn."""
        with self._lock:
            if self._num_turns == 0:
                return 0.0
            measured = dict(self._measures)
        for measure, before in measured.items():
            if (now := measure()) != before:  # without the lock, since a disk may hold up the measure
                self.moved()
                with self._lock:
                    if measure in self._measures:
                        self._measures[measure] = now
        return self._clock() - self._moved_at


def folder_bytes(folder: Path) -> Measure:
    """Return a measure of what all ranks together have written to a folder, which need not exist yet."""

    def measure() -> int:
        total = 0
        for parent, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # it has been renamed since
                    total += os.stat(os.path.join(parent, name)).st_size  # noqa: PTH116, PTH118
        return total

    return measure


def disk_bytes() -> int:
    """Return the bytes that this process, except this thread, has read from disks and written to them.

    Pages that a mapped file is read into count; what comes from the kernel's cache does not. The result is 0
    if the kernel does not say.
    """
    return _disk_bytes(Path("/proc/self/io")) - _disk_bytes(Path("/proc/thread-self/io"))


def _disk_bytes(path: Path) -> int:
    try:
        values = dict(line.split(": ") for line in path.read_text().splitlines())
    except OSError:
        return 0
    return int(values.get("read_bytes", 0)) + int(values.get("write_bytes", 0))
