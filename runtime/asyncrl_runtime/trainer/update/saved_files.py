"""The files of a policy's checkpoint: DeepSpeed's states, held back, and its universal format."""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from asyncrl_runtime.trainer.sealing import Sealed
from asyncrl_runtime.trainer.turn_clock import folder_bytes

CONVERSION_STALLED_SECONDS = 500.0
"""How long a conversion may neither read nor write anything; shorter than what the ranks bear of each other
(together.STALLED_SECONDS), so that the error is its own."""
LOOK_SECONDS = 1.0


def ignore(num_bytes: int) -> None:
    """Do nothing: for a caller that does not want to hear about progress."""


def nothing(sealed: Sealed) -> None:
    """Do nothing: the part of a rank that has none."""


class HeldBack:
    """DeepSpeed's way to write a checkpoint's files, which writes none: it keeps the states.

    DeepSpeed saves between collectives, and a rank that waits there for another one's disk gives up. What is
    kept here is written afterwards (`together.work_together`). The states refer to the live tensors.
    """

    def __init__(self) -> None:
        self.files: dict[Path, Mapping[str, Any]] = {}

    def save(self, state_dict: Mapping[str, Any], path: str) -> None:
        self.files[Path(path)] = state_dict

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make nothing yet."""

    def create(self, info: object) -> None:
        """There is nothing to begin."""

    def commit(self, info: object) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return False

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def preserves_storage_sharing(self) -> bool:
        return True


def make_universal(checkpoint: Path, target: Path, sealed: Sealed, *, is_sharded: bool) -> None:
    """Convert a ZeRO checkpoint into DeepSpeed's universal format, which any number of ranks can load.

    The conversion runs in a process of its own, because it starts workers, and prints. It may take as long
    as it reads or writes.

    Raises:
        OSError: the conversion failed, because the disk is full for example; has the last lines it printed.
    """
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += [] if is_sharded else ["--inject_missing_state"]
    command += ["--input_folder", str(checkpoint), "--output_folder", str(target)]
    what = f"checkpoint {checkpoint} was not converted for another number of ranks"
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
        code = watch(process, folder_bytes(target), sealed, time.monotonic)
        if code is None:
            raise OSError(f"{what}: it has neither read nor written for {CONVERSION_STALLED_SECONDS:.0f} s")
        if code != 0:
            printed.seek(0)
            raise OSError("\n".join([f"{what}:", *printed.read().splitlines()[-5:]]))


def watch(
    process: subprocess.Popen[bytes],
    written: Callable[[], int],
    sealed: Sealed,
    clock: Callable[[], float],
) -> int | None:
    """Wait for a process as long as it, or one that it has started, reads or writes.

    Args:
        written: a measure of what it has written.
        sealed: told of each progress.

    Returns:
        Its exit code; None if it has stopped moving, and has been killed with all that it had started.
    """
    before, moved_at = -1, clock()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(LOOK_SECONDS)
        if (amount := written() + _tree_bytes(process.pid)) != before:
            sealed(max(1, amount - before))
            before, moved_at = amount, clock()
        elif clock() - moved_at > CONVERSION_STALLED_SECONDS:
            for each in _tree(process.pid):
                with contextlib.suppress(psutil.Error):
                    each.kill()
            process.wait()
            return None


def _tree(number: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(number)
        return [process, *process.children(recursive=True)]
    return []


def _tree_bytes(number: int) -> int:
    """Return what a process and its children have read and written."""
    total = 0
    for process in _tree(number):
        with contextlib.suppress(psutil.Error, OSError):
            total += sum(process.io_counters()[:4])
    return total
