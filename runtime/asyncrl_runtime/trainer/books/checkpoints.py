"""Atomic checkpoints: the policy, the books, and how far the trajectory stream has been dealt with.

    checkpoints/step-000050/position.json    the books (Position)
    checkpoints/step-000050/policy/          weights, optimizer, random state
    checkpoints/step-000050/files.json       every file with its size, written last
    checkpoints/step-000050/trajectories.msgpack   added later: what it alone needs of a stream that fills up

A checkpoint is written beside its final place, flushed to disk, and renamed into it. The two newest
can be restored: the stream is purged behind the older of them, or what only that one needs lies beside it.
"""

import asyncio
import contextlib
import json
import logging
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_runtime.trainer.books.tickets import BookRecord, RewardRange
from asyncrl_runtime.trainer.sealing import sync

log = logging.getLogger(__name__)

CallApart = Callable[..., Awaitable[Any]]
"""Calls a function with arguments."""
FOLDER = "checkpoints"


class Position(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything in a checkpoint that is not the policy."""

    uid: str
    """The uid of the job; a checkpoint of another object is never restored."""
    version: int
    began: dict[int, int]
    """The version at which each attempt began new steps (attempt -> version)."""
    book: BookRecord
    stream_sequence: int
    """The place in the trajectory stream up to which everything is closed."""
    trajectory_stream: str
    """The identity of the stream that `stream_sequence` belongs to."""
    origin: dict[str, Any]
    """The immutable fields that the policy and the tickets come from."""
    first_evaluation: dict[str, Any] | None = None
    rewards: RewardRange | None = None
    """The range of rewards that the job has seen; a checkpoint of an older version does not know it."""


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    position: Position

    @property
    def policy_folder(self) -> Path:
        return self.folder / "policy"

    @property
    def has_policy(self) -> bool:
        """Whether it holds a policy; not at version 0, whose policy is the model's source."""
        return self.policy_folder.exists()


class CheckpointFailed(OSError):
    """A checkpoint could not be written. Earlier ones are untouched; it says what is wrong with the disk."""


class Checkpoints:
    """The checkpoints of one job in one folder."""

    def __init__(self, job_folder: Path, uid: str, run: CallApart = asyncio.to_thread) -> None:
        """Args:
        run: calls a function that waits for the disk, apart from the event loop.
        """
        self._job_folder = job_folder
        self._run = run
        self._uid = uid
        self.folder = job_folder / FOLDER

    def folder_of(self, version: int) -> Path:
        return self.folder / f"step-{version:06d}"

    def restorable(self) -> list[Checkpoint]:
        """Return the whole checkpoints of this job, newest first, and log which ones are not whole.

        Raises:
            ExitError: one was written by another version of this program.
        """
        found = []
        for folder in self.folder.glob("step-*[0-9]"):
            if (fault := _fault(folder)) is not None:
                log.warning("checkpoint %s is not used: %s", folder, fault)
                continue
            position = _read_position(folder)
            if position.uid == self._uid:
                found.append(Checkpoint(folder, position))
        return sorted(found, key=lambda checkpoint: checkpoint.position.version, reverse=True)

    async def save(
        self, position: Position, save_policy: Callable[[Path], Awaitable[None]] | None
    ) -> Checkpoint:
        """Write one checkpoint.

        Args:
            save_policy: writes the policy into a folder and flushes it; None where the policy is the model's
                source.

        Raises:
            CheckpointFailed: it could not be written; nothing has changed on disk.
        """
        place = self.folder_of(position.version)
        scratch, replaced = place.with_suffix(".tmp"), place.with_suffix(".old")
        try:
            await self._run(_begin, scratch)
            if save_policy is not None:
                await save_policy(scratch / "policy")
            await self._run(_put_in_place, scratch, place, replaced, position)
        except (OSError, RuntimeError) as error:  # torch hides a full disk in a RuntimeError
            free = await self._run(_give_up, self._job_folder, scratch, place, replaced)
            raise CheckpointFailed(
                f"checkpoint {place}: {_disk_error(error)}; {free}. Earlier checkpoints are untouched; free "
                "some space, or enlarge the volume"
            ) from error
        await self._run(_delete, replaced)
        return Checkpoint(place, position)

    async def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` checkpoints, two at least, and what a crash has left."""
        await self._run(self._prune, keep)

    def _prune(self, keep: int) -> None:
        for checkpoint in self.restorable()[max(2, keep) :]:
            shutil.rmtree(checkpoint.folder, ignore_errors=True)
        for leftover in (*self.folder.glob("*.tmp"), *self.folder.glob("*.old")):
            shutil.rmtree(leftover, ignore_errors=True)

    def drop_after(self, version: int) -> None:
        """Delete checkpoints of a history that was cut at `version`."""
        for checkpoint in self.restorable():
            if checkpoint.position.version > version:
                shutil.rmtree(checkpoint.folder, ignore_errors=True)


def set_aside_strangers(job_folder: Path, uid: str, ledger_uid: str | None) -> Path | None:
    """Move what another object of this name has left out of the way, unread and whole.

    Returns:
        The folder where it is now; None if there was nothing.
    """
    uids = {_uid_of(path) for path in job_folder.glob(f"{FOLDER}/*/position.json")}
    strangers = {*uids, ledger_uid} - {uid, None}
    if not strangers:
        return None
    number = 1 + len(list(job_folder.glob("set-aside-*")))
    aside = job_folder / f"set-aside-{number}-{min(filter(None, strangers))[:8]}"
    aside.mkdir()
    for name in (FOLDER, "ledger.jsonl", "metrics.jsonl", "evaluations.jsonl", "export"):
        if (job_folder / name).exists():
            (job_folder / name).rename(aside / name)
    log.warning("%s holds another object's checkpoints; they are now in %s", job_folder, aside)
    return aside


def _uid_of(path: Path) -> str | None:
    """Return the uid in a position.json; None for one that a crash has left half written."""
    try:
        return str(json.loads(path.read_bytes())["uid"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _begin(scratch: Path) -> None:
    _delete(scratch)
    scratch.mkdir(parents=True)


def _put_in_place(scratch: Path, place: Path, replaced: Path, position: Position) -> None:
    """Add the books to the policy, list every file with its size, and rename the folder to its place.

    Whoever wrote the policy has flushed it; here only the books and the folders are.
    """
    books = scratch / "position.json"
    books.write_bytes(msgspec.json.encode(position))
    files = [path for path in sorted(scratch.rglob("*")) if path.is_file()]
    sizes = {str(path.relative_to(scratch)): path.stat().st_size for path in files}
    listing = scratch / "files.json"
    listing.write_text(json.dumps(sizes))
    for path in (books, listing, *(p for p in scratch.rglob("*") if p.is_dir()), scratch):
        sync(path)
    _delete(replaced)  # left by a crash at this very place
    if place.exists():  # made by an attempt whose history was cut there
        place.rename(replaced)
    scratch.rename(place)
    sync(place.parent)


def _give_up(job_folder: Path, scratch: Path, place: Path, replaced: Path) -> str:
    """Leave everything as it was before; return how much space there was."""
    free = _free_space(job_folder)  # asked before what was written is deleted
    _delete(scratch)
    if replaced.exists() and not place.exists():
        with contextlib.suppress(OSError):  # the disk is read-only now; the next checkpoint goes elsewhere
            replaced.rename(place)
    return free


def _delete(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _read_position(folder: Path) -> Position:
    try:
        return msgspec.json.decode((folder / "position.json").read_bytes(), type=Position)
    except msgspec.ValidationError as error:  # not skipped: training would begin anew beside it
        raise ExitError(
            ExitCode.REFUSED,
            f"checkpoint {folder} was written by another version of asyncrl (position.json: {error}); "
            "go on with that version, or begin in another folder",
        ) from error


def _fault(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None."""
    try:
        sizes = msgspec.json.decode((folder / "files.json").read_bytes(), type=dict[str, int])
        msgspec.json.decode((folder / "position.json").read_bytes())
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return f"its books cannot be read: {error}"
    try:
        for name, size in sizes.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
    except OSError as error:  # a name that can be none, for one
        return f"its files cannot be looked at: {error}"
    return None


def _disk_error(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _free_space(folder: Path) -> str:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"nor does the disk say how much is free: {_disk_error(error)}"
    return f"{free / 2**20:.0f} MB were free there"
