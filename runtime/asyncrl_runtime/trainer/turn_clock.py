"""Since when the trainer has made no progress though it is its turn: what `hangSeconds` is about.

It is the trainer's turn while its ranks carry out a command, and while it starts. Between commands rank 0
waits for groups, answers or engines, which have conditions of their own, and the clock rests. Whether its
event loop still turns is another question: a trainer whose loop does not turn reports nothing.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

Measure = Callable[[], int]
"""Returns a number that changes as long as something gets on: bytes, say."""


class TurnClock:
    """The clock of the trainer's turn.

    Turns may overlap: commands wait in line for the one thread of the ranks, and the clock runs from the
    first of them on. Its methods may be called from any thread.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # a start is reported by a thread of its own
        self._num_turns = 0
        self._moved_at = 0.0
        self._measures: dict[Measure, int] = {}

    @contextlib.contextmanager
    def turn(self, measure: Measure | None = None) -> Iterator[None]:
        """Have the clock run during the body, whose end is progress.

        Args:
            measure: what the body moves. It is looked at when the clock is read, and a change is progress.
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
        """Something was done: the clock begins again."""
        self._moved_at = self._clock()

    def seconds_without_progress(self) -> float:
        """Return for how long there has been no progress in this turn; 0 while it is nobody's."""
        with self._lock:
            if self._num_turns == 0:
                return 0.0
            measured = dict(self._measures)
        for measure, before in measured.items():
            if (now := measure()) != before:  # not under the lock: a disk may hold it up
                self.moved()
                with self._lock:
                    if measure in self._measures:
                        self._measures[measure] = now
        return self._clock() - self._moved_at


def folder_bytes(folder: Path) -> Measure:
    """Return a measure of what all ranks together have written into a folder, which need not be there yet."""

    def measure() -> int:
        total = 0
        for parent, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                    total += os.stat(os.path.join(parent, name)).st_size  # noqa: PTH116, PTH118
        return total

    return measure


def disk_bytes() -> int:
    """Return the bytes that this process has read from disks and written to them, but for this thread's.

    Pages that a mapped file is read into are counted, what comes from the kernel's cache is not. 0 where the
    kernel does not say.
    """
    return _disk_bytes(Path("/proc/self/io")) - _disk_bytes(Path("/proc/thread-self/io"))


def _disk_bytes(path: Path) -> int:
    try:
        values = dict(line.split(": ") for line in path.read_text().splitlines())
    except OSError:
        return 0
    return int(values.get("read_bytes", 0)) + int(values.get("write_bytes", 0))
