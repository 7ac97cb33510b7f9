"""When checkpoints are made, and what a disk that fails does to them."""

import asyncio
import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from asyncrl_runtime.contract.broker import StreamMessage, TransportError
from asyncrl_runtime.trainer.attempt import Attempt
from asyncrl_runtime.trainer.books.books import Books
from asyncrl_runtime.trainer.books.checkpoints import CheckpointFailed, Checkpoints
from asyncrl_runtime.trainer.books.spill import Spill, read_spill
from asyncrl_runtime.trainer.checkpointing import FAILING_SECONDS, Checkpointing
from asyncrl_runtime.trainer.patience import Patience
from asyncrl_runtime.trainer.update.ranks import Command, Export, Save
from support.fakes import FakeRanks, FakeStreams, FakeWeights, run_in_virtual_time
from support.jobs.attempt_parts import make_attempt_parts
from support.messages.samples import make_job


class Rig:
    """A job whose steps only count, at one step each `seconds`."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.clock: Callable[[], float] = asyncio.get_running_loop().time
        self.fault: OSError | None = None
        self.announced = ""
        self.folder = folder
        spec = make_job("checkpoint.everySteps=50", *overrides).spec
        self.books = Books(spec)
        parts = make_attempt_parts(
            folder,
            spec,
            self.books,
            FakeStreams(),
            FakeRanks(self.carry_out),
            FakeWeights(),
            None,
            self.clock,
        )
        self.parts = replace(parts, disruption=lambda: self.announced)
        self.stopping = asyncio.Event()
        patience = Patience(self.say, self.stopping, self.clock)
        self.checkpointing = Checkpointing(self.parts, None, patience)

    def say(self, message: str) -> None:
        self.parts.metrics.update(disk_fault=message)

    def carry_out(self, command: Command) -> Any:
        if isinstance(command, Save | Export):
            command.folder.mkdir(parents=True)
            (command.folder / "shard").write_bytes(b"x")
            if self.fault is not None:
                raise self.fault
        return None

    async def steps(self, num: int, seconds: float) -> None:
        for _ in range(num):
            await asyncio.sleep(seconds)
            self.books._version += 1
            await self.checkpointing.save_if_due()

    @property
    def saved(self) -> list[int]:
        found = Checkpoints(self.folder, "uid").restorable()
        return sorted(each.position.version for each in found)

    @property
    def fault_told(self) -> str:
        return self.parts.metrics.report.disk_fault


def test_a_checkpoint_is_made_when_its_step_or_its_time_comes_whichever_is_first(tmp_path: Path) -> None:
    async def check() -> None:
        rig = Rig(tmp_path / "slow", "checkpoint.everySeconds=600", "checkpoint.keep=9")
        await rig.steps(9, seconds=250)
        assert rig.saved == [3, 6, 9]
        rig = Rig(tmp_path / "fast", "checkpoint.everySteps=4", "checkpoint.keep=9")
        await rig.steps(9, seconds=1)
        assert rig.saved == [4, 8]

    (tmp_path / "slow").mkdir()
    (tmp_path / "fast").mkdir()
    run_in_virtual_time(check())


def test_after_each_step_while_a_disruption_is_announced(tmp_path: Path) -> None:
    async def check() -> None:
        rig = Rig(tmp_path, "checkpoint.keep=9")
        await rig.steps(2, seconds=1)
        rig.announced = "node n1: taint karpenter.sh/disrupted"
        await rig.steps(2, seconds=1)
        rig.announced = ""
        await rig.steps(2, seconds=1)
        assert rig.saved == [3, 4]

    run_in_virtual_time(check())


def test_a_disk_that_fails_for_a_while_is_told_and_tried_again(tmp_path: Path) -> None:
    async def check() -> None:
        rig = Rig(tmp_path, "checkpoint.everySteps=10")
        rig.fault = OSError(errno.ENOSPC, "No space left on device")
        await rig.steps(40, seconds=10)
        assert rig.saved == [] and "No space left on device" in rig.fault_told
        rig.fault = None
        await rig.steps(3, seconds=10)
        assert rig.saved == [43] and rig.fault_told == ""
        assert rig.parts.ranks.commands.count(Save(tmp_path / "checkpoints/step-000043.tmp/policy")) == 1  # type: ignore[attr-defined]

    run_in_virtual_time(check())


def test_one_that_fails_for_long_ends_the_attempt(tmp_path: Path) -> None:
    async def check() -> None:
        rig = Rig(tmp_path, "checkpoint.everySteps=1")
        rig.fault = OSError(errno.EIO, "Input/output error")
        await rig.steps(int(FAILING_SECONDS) - 2, seconds=1)
        with pytest.raises(CheckpointFailed, match="Input/output error"):
            await rig.steps(9, seconds=1)
        assert rig.clock() == pytest.approx(FAILING_SECONDS, abs=5)

    run_in_virtual_time(check())


def test_an_export_on_the_way_that_fails_ends_nothing(tmp_path: Path) -> None:
    async def check() -> None:
        rig = Rig(tmp_path, "checkpoint.exportEverySteps=2", "checkpoint.everySteps=100")
        rig.fault = OSError(errno.ENOSPC, "No space left on device")
        await rig.steps(3, seconds=1)
        assert rig.fault_told.startswith("the export of step 2 failed: [Errno 28] No space left")
        assert not list((tmp_path / "export").iterdir())
        rig.fault = None
        await rig.steps(1, seconds=1)
        assert (tmp_path / "export" / "step-000004" / "shard").exists()
        await rig.steps(1, seconds=600)
        assert rig.fault_told == "", "a checkpoint was made"

    run_in_virtual_time(check())


def test_the_export_of_a_trained_policy_waits_for_the_disk(tmp_path: Path) -> None:
    async def check() -> None:
        rig = Rig(tmp_path)
        rig.fault = OSError(errno.ENOSPC, "No space left on device")
        exporting = asyncio.create_task(rig.checkpointing.export_last())
        await asyncio.sleep(200)
        assert not exporting.done() and rig.fault_told.startswith("the export of the trained policy: ")
        rig.fault = None
        assert (await exporting / "shard").exists() and rig.fault_told == ""

    run_in_virtual_time(check())


def test_lines_that_the_disk_has_not_taken_hold_a_checkpoint_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer that dies then would train none of these steps again, and their lines would be lost."""

    async def check() -> None:
        rig = Rig(tmp_path, "checkpoint.everySteps=1")

        def refuse() -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(rig.parts.metrics, "flush", refuse)
            await rig.steps(1, seconds=1)
        assert rig.saved == []
        await rig.steps(1, seconds=40)
        assert rig.saved == [2]

    run_in_virtual_time(check())


def test_a_stop_saves_or_says_that_it_did_not(tmp_path: Path) -> None:
    async def check() -> None:
        rig = Rig(tmp_path)
        rig.fault = OSError(errno.EROFS, "Read-only file system")
        attempt = Attempt(rig.parts, None)
        rig.books._version = 3
        attempt.request_stop()
        assert await attempt.stop() == "stopped at step 3, without a checkpoint: the disk failed"
        rig.fault = None
        assert await attempt.stop() == "stopped at step 3, after a checkpoint"
        assert rig.saved == [3]

    run_in_virtual_time(check())


# -- a stream that fills up

MESSAGES = [StreamMessage(n, f"rl.j.traj.{n}", bytes([n]) * n, f"id{n}") for n in range(1, 12)]


class Filling:
    """A rig with checkpoints of versions 1 and 2, between which messages 4 to 8 were dealt with."""

    def __init__(self, folder: Path) -> None:
        self.rig = Rig(folder)
        self.streams = cast(FakeStreams, self.rig.parts.streams)
        self.streams.messages = list(MESSAGES)

    async def saves(self) -> None:
        for version, sequence in ((1, 3), (2, 8)):
            self.rig.books._version = version
            self.rig.books.inbox.pass_over(sequence)
            await self.rig.checkpointing.save()
        assert self.streams.purged_behind == [3, 3]

    @property
    def older(self) -> Path:
        return self.rig.parts.checkpoints.folder_of(1)


def test_the_older_checkpoint_keeps_what_is_purged(tmp_path: Path) -> None:
    async def run() -> None:
        filling = Filling(tmp_path)
        await filling.saves()
        filling.rig.books._version = 3
        filling.streams.is_nearly_full = True
        await filling.rig.checkpointing.save_if_due()
        assert filling.streams.purged_behind == [3, 3, 8]
        assert list(read_spill(filling.older)) == MESSAGES[3:8]
        assert filling.rig.saved == [1, 2], "no third checkpoint was needed"
        await filling.rig.checkpointing.save_if_due()
        assert filling.rig.saved == [1, 2, 3], "what is left is before this step"

    run_in_virtual_time(run())


def test_nothing_is_purged_that_could_not_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full is waited for."""
    put, tries = Spill.add, 0

    def add(self: Spill, message: StreamMessage) -> None:
        nonlocal tries
        tries += 1
        if tries < 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, message)

    monkeypatch.setattr(Spill, "add", add)

    async def run() -> None:
        filling = Filling(tmp_path)
        await filling.saves()
        filling.streams.is_nearly_full = True
        making = asyncio.create_task(filling.rig.checkpointing.make_room())
        await asyncio.sleep(3)  # two tries have failed
        assert (
            filling.streams.purged_behind == [3, 3]
            and "No space" in filling.rig.parts.metrics.report.disk_fault
        )
        await making
        assert filling.streams.purged_behind == [3, 3, 8]
        assert list(read_spill(filling.older)) == MESSAGES[3:8]

    run_in_virtual_time(run())


def test_a_broker_that_does_not_answer_leaves_everything_as_it_was(tmp_path: Path) -> None:
    async def run() -> None:
        filling = Filling(tmp_path)
        await filling.saves()
        filling.streams.is_nearly_full = True
        filling.streams.fault = TransportError("away")
        await filling.rig.checkpointing.make_room()
        assert filling.streams.purged_behind == [3, 3]
        assert list(filling.older.glob("trajectories*")) == []

    run_in_virtual_time(run())
