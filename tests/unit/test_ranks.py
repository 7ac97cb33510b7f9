"""It is the trainer's turn while the ranks carry out a command, and only then."""

import asyncio
import threading
from pathlib import Path
from typing import Any, cast

from asyncrl_runtime.trainer.sealing import Sealed
from asyncrl_runtime.trainer.turn_clock import TurnClock
from asyncrl_runtime.trainer.update.ranks import CopyWeights, Export, Ranks, Save, make_commands_group
from asyncrl_runtime.trainer.update.together import DiskWork


class HeldUpPolicy:
    """A policy that writes piece by piece, when it is told to."""

    is_sharded = False

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.folders: list[Path] = []

    def save(self, folder: Path) -> DiskWork:
        def write(sealed: Sealed) -> None:
            folder.mkdir()
            self.folders.append(folder)
            assert self.may_end.wait(10)

        return write

    def export(self, folder: Path, tokenizer: Any) -> DiskWork:
        return self.save(folder)


class HeldUpCopy:
    """A copy that is taken, and read, when it is told to."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.num_taken = 0
        self.is_read = threading.Event()

    def take(self) -> None:
        assert self.may_end.wait(10)
        self.num_taken += 1

    def gather(self, name: str) -> str:
        self.is_read.set()
        assert self.may_end.wait(10)
        return f"{name}, taken {self.num_taken} times"

    def serve(self) -> None:
        """There is one rank."""

    def close(self) -> None:
        """There is one rank."""


class Scene:
    def __init__(self) -> None:
        self.now = 100.0
        self.policy = HeldUpPolicy()
        self.clock = TurnClock(lambda: self.now)
        self.copy = HeldUpCopy()
        self.ranks = Ranks(cast(Any, self.policy), make_commands_group(), None, self.copy, self.clock)

    def after(self, seconds: float) -> float:
        self.now += seconds
        return self.clock.seconds_without_progress()


async def test_a_command_that_writes_gets_on_by_its_bytes(process_group: None, tmp_path: Path) -> None:
    scene = Scene()
    assert scene.after(100) == 0
    for command in (Save(tmp_path / "checkpoint"), Export(tmp_path / "export")):
        running = asyncio.create_task(scene.ranks.run(command))
        while command.folder not in scene.policy.folders:
            await asyncio.sleep(0.01)
        assert scene.after(30) == 30
        (command.folder / "shard").write_bytes(b"abc")  # by any rank
        assert scene.after(30) == 0
        assert scene.after(30) == 30, "a disk that is stuck"
        scene.policy.may_end.set()
        await running
        assert scene.after(100) == 0
        scene.policy.may_end.clear()


async def test_a_copy_is_the_trainers_turn_and_what_engines_do_with_it_is_not(process_group: None) -> None:
    scene = Scene()
    copying = asyncio.create_task(scene.ranks.run(CopyWeights()))
    while scene.clock.seconds_without_progress() == 0:
        await asyncio.sleep(0)
        scene.now += 30
    scene.copy.may_end.set()
    await copying
    scene.copy.may_end.clear()
    reading = asyncio.create_task(scene.ranks.read_copy(scene.copy.gather, "weight"))
    await asyncio.to_thread(scene.copy.is_read.wait, 10)
    assert scene.after(30) == 0
    scene.copy.may_end.set()
    assert await reading == "weight, taken 1 times"


async def test_the_next_copy_waits_for_whoever_still_reads_the_last_though_he_has_given_it_up(
    process_group: None,
) -> None:
    scene = Scene()
    reading = asyncio.create_task(scene.ranks.read_copy(scene.copy.gather, "weight"))
    await asyncio.to_thread(scene.copy.is_read.wait, 10)
    reading.cancel()
    copying = asyncio.create_task(scene.ranks.run(CopyWeights()))
    for _ in range(20):
        await asyncio.sleep(0)
    assert scene.copy.num_taken == 0 and scene.clock.seconds_without_progress() == 0
    scene.copy.may_end.set()
    await copying
    assert scene.copy.num_taken == 1
