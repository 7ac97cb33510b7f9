"""The ranks wait for a slow disk as long as it moves, and not for one that is stuck."""

import threading
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from asyncrl_runtime.trainer.sealing import Sealed
from asyncrl_runtime.trainer.update import together
from asyncrl_runtime.trainer.update.ranks import make_commands_group
from asyncrl_runtime.trainer.update.together import (
    STALLED_SECONDS,
    WorkFailed,
    WorkStalled,
    work_together,
)


@pytest.fixture
def group(process_group: None, monkeypatch: pytest.MonkeyPatch) -> dist.ProcessGroup:
    """A group of one rank that exchanges as if there were others."""
    made = make_commands_group()
    monkeypatch.setattr(together, "LONGEST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(together, "_raise_together", lambda part, group: part.result())
    return made


class Time:
    """A clock that moves by a quarter of what is borne whenever it is looked at."""

    def __init__(self) -> None:
        self.now = 0.0
        self.was_read = threading.Semaphore(0)

    def __call__(self) -> float:
        self.now += STALLED_SECONDS / 4
        self.was_read.release()
        return self.now


def nothing() -> None:
    pass


def test_a_disk_that_moves_is_waited_for_whatever_it_takes(group: dist.ProcessGroup) -> None:
    time, moves = Time(), list[None]()

    def write(sealed: Sealed) -> None:
        for _ in range(20):
            sealed(1)
            for _ in range(3):  # looks at the clock
                assert time.was_read.acquire(timeout=10)

    work_together(write, group, lambda: moves.append(None), clock=time)
    assert time.now > 10 * STALLED_SECONDS and len(moves) >= 20


def test_a_measure_beside_the_thread_counts_too(group: dist.ProcessGroup) -> None:
    time = Time()
    amounts: Iterator[int] = iter(range(1000))

    def write(sealed: Sealed) -> None:
        for _ in range(40):
            assert time.was_read.acquire(timeout=10)

    work_together(write, group, nothing, lambda: next(amounts), clock=time)
    assert time.now > 5 * STALLED_SECONDS


def test_one_that_is_stuck_ends_it_for_all(group: dist.ProcessGroup) -> None:
    may_end = threading.Event()

    def hang(sealed: Sealed) -> None:
        may_end.wait(10)

    with pytest.raises(WorkStalled, match=r"no rank has read or written anything for 600 s"):
        work_together(hang, group, nothing, clock=Time())
    may_end.set()


@pytest.mark.parametrize("has_others", [False, True])
def test_what_a_disk_refuses_is_told_in_a_line(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch, has_others: bool
) -> None:
    if not has_others:
        monkeypatch.setattr(dist, "get_world_size", lambda: 1)

    def refuse(sealed: Sealed) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos\nframe #0")

    with pytest.raises(WorkFailed, match=r"^\[enforce fail at inline_container.cc:672\] unexpected pos$"):
        work_together(refuse, group, nothing)


def test_a_fault_that_is_no_disks_is_not_called_one(group: dist.ProcessGroup) -> None:
    def fail(sealed: Sealed) -> None:
        raise KeyError("layout")

    with pytest.raises(KeyError):
        work_together(fail, group, nothing)
