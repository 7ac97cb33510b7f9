"""Work that takes as long as a disk takes, while the ranks stay in touch and none waits unheard."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from asyncrl_runtime.trainer.sealing import Sealed
from asyncrl_runtime.trainer.turn_clock import Measure

STALLED_SECONDS = 600.0
"""How long no rank may get on with its part. Only this ends the work: how long it takes has no limit."""
LONGEST_PAUSE_SECONDS = 5.0
"""The longest time between two exchanges, far below the time that a rank waits for the others."""

DiskWork = Callable[[Sealed], None]
"""One rank's part. It calls its argument with what has been done, in bytes, where reads and writes of its own
thread do not show it."""


class WorkFailed(OSError):
    """A rank could not do its part, because a disk is full for example; all ranks raise this together."""


class WorkStalled(Exception):
    """No rank has got on for STALLED_SECONDS; all ranks raise this together, and none can go on."""


def work_together(
    work: DiskWork,
    group: dist.ProcessGroup,
    moved: Callable[[], None],
    measure: Measure = lambda: 0,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Do this rank's part of some work, and return when all ranks have done theirs; collective.

    The part runs in a thread of its own. Meanwhile this one tells the other ranks every few seconds whether
    it still runs and has got on.

    Args:
        moved: called whenever a rank has got on.
        measure: a measure of the progress beside the thread's own reads and writes.

    Raises:
        WorkFailed: the disk of some rank does not take, or give, what it should.
        WorkStalled: no rank has got on for too long.
    """
    part = _Part(work, measure, moved)
    if dist.get_world_size() == 1:
        part.run()
        part.result()
        return
    part.thread.start()
    pause, moved_at, before = 0.01, clock(), 0
    while True:
        part.thread.join(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        runs = part.thread.is_alive()  # before the measure: what is done at the end counts
        amount = part.measure() if runs else before
        gave_up = clock() - moved_at > STALLED_SECONDS
        state = [runs, part.error is not None, amount != before, gave_up]
        num_running, num_failed, num_moved, num_gave_up = _sum(state, group)
        before = amount
        if num_running == 0:
            break
        if num_moved:
            moved_at = clock()
            moved()
        elif num_gave_up:
            raise WorkStalled(f"no rank has read or written anything for {STALLED_SECONDS:.0f} s")
    if num_failed:
        _raise_together(part, group)


def _sum(state: list[bool], group: dist.ProcessGroup) -> list[int]:
    """Return how many ranks say so of each."""
    votes = torch.tensor(state, dtype=torch.int64)
    dist.all_reduce(votes, group=group)
    return [int(vote) for vote in votes]


def _raise_together(part: "_Part", group: dist.ProcessGroup) -> None:
    said: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, None if part.error is None else _first_line(part.error), group=group)
    part.result()
    rank, error = next((rank, each) for rank, each in enumerate(said) if each)
    raise WorkFailed(f"rank {rank}: {error}")


class _Part:
    """One rank's part of the work, and the thread that does it."""

    def __init__(self, work: DiskWork, measure: Measure, moved: Callable[[], None]) -> None:
        self.thread = threading.Thread(target=self.run, name="disk", daemon=True)
        self.error: BaseException | None = None
        self._work = work
        self._others = measure
        self._moved = moved
        self._told = 0
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def run(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)  # each thread has a current device of its own
        try:
            self._work(self._sealed)
        except BaseException as error:  # whoever waits for the part raises it
            self.error = error

    def result(self) -> None:
        """Raise what the part has raised, if it has."""
        if isinstance(self.error, OSError | RuntimeError | SafetensorError):
            raise WorkFailed(_first_line(self.error)) from self.error
        if self.error is not None:
            raise self.error

    def measure(self) -> int:
        """Return a number that changes while the part gets on."""
        return self._told + _thread_bytes(self.thread.native_id) + self._others()

    def _sealed(self, num_bytes: int) -> None:
        self._told += num_bytes
        self._moved()


def _thread_bytes(number: int | None) -> int:
    """Return what a thread of this process has read and written; 0 if the kernel does not say."""
    try:
        lines = Path(f"/proc/self/task/{number}/io").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split(": ")[1]) for line in lines)


def _first_line(error: BaseException) -> str:
    """Return what an error says in a line; torch hides a full disk under pages of frames."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
