"""A disk that fails for a while costs time and nothing else."""

import asyncio
import errno
from collections.abc import Callable

import pytest

from asyncrl_runtime.trainer.patience import PATIENCE_SECONDS, Patience
from support.fakes import run_in_virtual_time


class Disk:
    """A disk that takes what is written from a time on.

    Args:
        until: virtual time, in seconds.
    """

    def __init__(self, until: float) -> None:
        self.until = until
        self.said: list[str] = []
        self.tries: list[float] = []
        self.stopping = asyncio.Event()
        self.clock: Callable[[], float] = asyncio.get_running_loop().time

    async def write(self) -> str:
        self.tries.append(self.clock())
        if self.clock() < self.until:
            raise OSError(errno.EROFS, "Read-only file system")
        return "written"

    async def insist(self) -> str:
        return await Patience(self.said.append, self.stopping, self.clock).insist("the ledger", self.write)


def test_it_is_tried_again_with_growing_pauses_and_said_once_it_is_well(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def check() -> None:
        disk = Disk(until=100)
        assert await disk.insist() == "written"
        assert disk.tries == [0, 1, 3, 7, 15, 31, 61, 91, 121]
        assert disk.said[-1] == "" and len(disk.said) == 9
        assert disk.said[0] == (
            "the ledger: [Errno 30] Read-only file system; tried again in 1 s, for 600 s in all"
        )

    run_in_virtual_time(check())
    assert caplog.messages[0].endswith("for 600 s in all (1)")
    assert caplog.messages[-1] == "the ledger: written after 8 failures"


def test_it_is_given_up_in_the_end(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        disk = Disk(until=float("inf"))
        with pytest.raises(OSError, match="Read-only"):
            await disk.insist()
        assert PATIENCE_SECONDS <= disk.clock() < PATIENCE_SECONDS + 60

    run_in_virtual_time(check())
    assert "the ledger: given up after 25 tries" in caplog.messages[-1]


def test_a_trainer_that_is_to_stop_waits_for_no_disk() -> None:
    async def check() -> None:
        disk = Disk(until=float("inf"))
        writing = asyncio.create_task(disk.insist())
        await asyncio.sleep(20)
        disk.stopping.set()
        with pytest.raises(OSError, match="Read-only"):
            await writing
        assert disk.clock() == 20

    run_in_virtual_time(check())


def test_other_faults_are_not_the_disks() -> None:
    async def check() -> None:
        async def fail() -> None:
            raise ValueError("superseded")

        with pytest.raises(ValueError, match="superseded"):
            await Patience(lambda text: None, asyncio.Event()).insist("the ledger", fail)

    run_in_virtual_time(check())
