"""It is the trainer's turn while the ranks carry out a command, and only then."""

import asyncio
import threading
from pathlib import Path
from typing import Any, cast

from asyncrl_runtime.trainer.sealing import Sealed
from asyncrl_runtime.trainer.turn_clock import TurnClock
from asyncrl_runtime.trainer.update.ranks import Export, Ranks, Save, make_commands_group
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

    def bucket(self, names: tuple[str, ...]) -> str:
        assert self.may_end.wait(10)
        return "bucket"


class Scene:
    def __init__(self) -> None:
        self.now = 100.0
        self.policy = HeldUpPolicy()
        self.clock = TurnClock(lambda: self.now)
        self.ranks = Ranks(cast(Any, self.policy), make_commands_group(), None, self.clock)

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


async def test_a_bucket_is_the_trainers_turn_and_what_engines_do_with_it_is_not(process_group: None) -> None:
    scene = Scene()
    asked = asyncio.create_task(scene.ranks.bucket(("weight",)))
    await asyncio.sleep(0)
    assert scene.after(30) == 30
    scene.policy.may_end.set()
    await asked
    assert scene.after(30) == 0
