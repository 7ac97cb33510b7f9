"""A checkpoint is either whole or absent, whatever fails while it is written, even if the disk is full."""

import contextlib
import json
import os
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import torch

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_runtime.trainer.books.checkpoints import (
    CheckpointFailed,
    Checkpoints,
    Position,
    set_aside_strangers,
)
from asyncrl_runtime.trainer.books.tickets import BookRecord

SavePolicy = Callable[[Path], Awaitable[None]]


def position(version: int, uid: str = "mine") -> Position:
    return Position(
        uid=uid,
        version=version,
        began={1: 0, 2: version},
        book=BookRecord(num_trained=8 * version, low=8 * version, trained_above=(99,)),
        stream_sequence=8 * version,
        trajectory_stream="created at noon",
        origin={"model": {"source": "hf://org/name"}},
        first_evaluation={"accuracy": 0.25},
    )


def policy(content: bytes = b"weights") -> SavePolicy:
    async def save(folder: Path) -> None:
        (folder / "zero").mkdir(parents=True)
        (folder / "weights.pt").write_bytes(content)
        (folder / "zero" / "rank_0.pt").write_bytes(content[::-1])

    return save


def failing(error: Exception) -> SavePolicy:
    async def save(folder: Path) -> None:
        await policy()(folder)
        raise error

    return save


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path, "mine")


async def save_all(checkpoints: Checkpoints, *versions: int) -> None:
    for version in versions:
        await checkpoints.save(position(version), policy())


def versions(checkpoints: Checkpoints) -> list[int]:
    return [checkpoint.position.version for checkpoint in checkpoints.restorable()]


def names(checkpoints: Checkpoints) -> list[str]:
    return entries(checkpoints.folder)


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- what is saved


async def test_a_checkpoint_holds_the_policy_and_the_books(checkpoints: Checkpoints) -> None:
    saved = await checkpoints.save(position(50), policy())
    [found] = checkpoints.restorable()
    assert found == saved and found.position == position(50) and found.has_policy
    assert found.folder.name == "step-000050"
    assert (found.policy_folder / "zero" / "rank_0.pt").read_bytes() == b"sthgiew"
    assert json.loads((found.folder / "files.json").read_text()) == {
        "policy/weights.pt": 7,
        "policy/zero/rank_0.pt": 7,
        "position.json": (found.folder / "position.json").stat().st_size,
    }


async def test_the_first_one_holds_the_books_alone(checkpoints: Checkpoints) -> None:
    await checkpoints.save(position(0), None)
    [found] = checkpoints.restorable()
    assert not found.has_policy


async def test_the_newest_comes_first_whatever_the_number_of_digits(checkpoints: Checkpoints) -> None:
    await save_all(checkpoints, 2, 10, 999_999, 1_000_000)
    assert versions(checkpoints) == [1_000_000, 999_999, 10, 2]


async def test_a_folder_without_checkpoints_has_none(checkpoints: Checkpoints) -> None:
    assert checkpoints.restorable() == []
    await checkpoints.prune(2)
    checkpoints.drop_after(0)


# -- what fails


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos\nframe #0"),
    ],
)
@pytest.mark.parametrize("version", [4, 2])
async def test_a_policy_that_cannot_be_written_leaves_the_earlier_ones_and_no_scratch(
    checkpoints: Checkpoints, error: Exception, version: int
) -> None:
    await save_all(checkpoints, 0, 2)
    with pytest.raises(CheckpointFailed) as failed:
        await checkpoints.save(position(version), failing(error))
    first_line = str(error).splitlines()[0]
    assert f"step-{version:06d}: {first_line}; " in str(failed.value)
    assert "MB were free there. Earlier checkpoints are untouched" in str(failed.value)
    assert "\n" not in str(failed.value)
    assert names(checkpoints) == ["step-000000", "step-000002"] and versions(checkpoints) == [2, 0]


async def test_an_error_without_a_word_is_told_by_its_kind(checkpoints: Checkpoints) -> None:
    with pytest.raises(CheckpointFailed, match="step-000002: RuntimeError; "):
        await checkpoints.save(position(2), failing(RuntimeError("\n")))


async def test_one_that_cannot_be_put_in_place_leaves_what_was_there(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    await checkpoints.save(position(2), policy(b"older"))
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(CheckpointFailed):
        patch.setattr(Path, "rename", refuse)
        await checkpoints.save(position(2), policy(b"newer"))
    [found] = checkpoints.restorable()
    assert (found.policy_folder / "weights.pt").read_bytes() == b"older"
    assert names(checkpoints) == ["step-000002"]


async def test_a_checkpoint_of_a_history_that_was_cut_is_replaced(checkpoints: Checkpoints) -> None:
    await checkpoints.save(position(2), policy(b"older"))
    await checkpoints.save(position(2), policy(b"newer"))
    [found] = checkpoints.restorable()
    assert (found.policy_folder / "weights.pt").read_bytes() == b"newer"
    assert names(checkpoints) == ["step-000002"]


async def test_what_a_crash_has_left_is_in_nobodys_way(checkpoints: Checkpoints) -> None:
    await save_all(checkpoints, 2)
    for leftover in ("step-000002.old", "step-000002.tmp", "step-000004.tmp"):
        (checkpoints.folder / leftover / "policy").mkdir(parents=True)
        (checkpoints.folder / leftover / "policy" / "half.pt").write_bytes(b"ha")
    assert versions(checkpoints) == [2]
    await save_all(checkpoints, 2, 4)
    assert versions(checkpoints) == [4, 2]
    assert names(checkpoints) == ["step-000002", "step-000004"]


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("policy/weights.pt", tear, "policy/weights.pt has 6 bytes instead of 7"),
        ("policy/zero/rank_0.pt", Path.unlink, "policy/zero/rank_0.pt is missing"),
        ("position.json", Path.unlink, "position.json is missing"),
        ("files.json", Path.unlink, "files.json is missing"),
        ("files.json", tear, "its books cannot be read: "),
        ("files.json", lambda path: path.write_text("[1]"), "its books cannot be read: "),
        ("position.json", lambda path: path.write_bytes(b"\0" * 9), "its books cannot be read: "),
    ],
)
async def test_a_checkpoint_that_is_not_whole_is_skipped_and_told(
    checkpoints: Checkpoints,
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: Callable[[Path], object],
    reason: str,
) -> None:
    await save_all(checkpoints, 2, 4)
    folder = checkpoints.folder / "step-000004"
    damage(folder / name)
    assert versions(checkpoints) == [2]
    [message] = caplog.messages
    assert message.startswith(f"checkpoint {folder} is not used: {reason}")


async def test_a_checkpoint_of_another_version_is_not_passed_over(checkpoints: Checkpoints) -> None:
    """If it were, training would begin anew beside it."""
    await save_all(checkpoints, 2)
    path = checkpoints.folder / "step-000002" / "position.json"
    path.write_bytes(json.dumps({**json.loads(path.read_bytes()), "colour": "red"}).encode())
    sizes = checkpoints.folder / "step-000002" / "files.json"
    sizes.write_text(json.dumps(json.loads(sizes.read_text()) | {"position.json": path.stat().st_size}))
    with pytest.raises(ExitError, match=r"written by another version of asyncrl .*`colour`") as refused:
        checkpoints.restorable()
    assert refused.value.code == ExitCode.REFUSED


# -- what is deleted


@pytest.mark.parametrize(("keep", "left"), [(0, [8, 6]), (1, [8, 6]), (3, [8, 6, 4]), (9, [8, 6, 4, 2, 0])])
async def test_the_newest_are_kept_and_two_at_least(
    checkpoints: Checkpoints, keep: int, left: list[int]
) -> None:
    await save_all(checkpoints, 0, 2, 4, 6, 8)
    (checkpoints.folder / "step-000009.tmp").mkdir()
    (checkpoints.folder / "step-000006.old").mkdir()
    await checkpoints.prune(keep)
    assert names(checkpoints) == sorted(f"step-{version:06d}" for version in left)
    assert versions(checkpoints) == left


async def test_one_that_is_not_whole_does_not_count_among_those_kept(checkpoints: Checkpoints) -> None:
    await save_all(checkpoints, 2, 4, 6)
    tear(checkpoints.folder / "step-000006" / "policy" / "weights.pt")
    await checkpoints.prune(2)
    assert versions(checkpoints) == [4, 2]


@pytest.mark.parametrize(("version", "left"), [(9, [6, 4, 0]), (4, [4, 0]), (5, [4, 0]), (-1, [])])
async def test_a_history_that_was_cut_loses_its_later_checkpoints(
    checkpoints: Checkpoints, version: int, left: list[int]
) -> None:
    await save_all(checkpoints, 0, 4, 6)
    checkpoints.drop_after(version)
    assert versions(checkpoints) == left


# -- other objects in the folder


async def test_another_objects_checkpoints_are_neither_used_nor_deleted(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    others = Checkpoints(tmp_path, "another")
    for version in (1, 3, 5):
        await others.save(position(version, uid="another"), policy())
    await save_all(checkpoints, 2, 4)
    assert versions(checkpoints) == [4, 2] and versions(others) == [5, 3, 1]
    await checkpoints.prune(2)
    checkpoints.drop_after(-1)
    assert versions(checkpoints) == [] and versions(others) == [5, 3, 1]


async def test_what_another_object_has_left_is_set_aside_whole(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    others = Checkpoints(tmp_path, "5f2a9c01-old")
    await others.save(position(3, uid="5f2a9c01-old"), policy())
    for name in ("ledger.jsonl", "metrics.jsonl", "evaluations.jsonl"):
        (tmp_path / name).write_text(name)
    (tmp_path / "export").mkdir()
    (tmp_path / "config.json").write_text("mine")

    aside = set_aside_strangers(tmp_path, "mine", "5f2a9c01-old")
    assert aside == tmp_path / "set-aside-1-5f2a9c01"
    moved = ["checkpoints", "evaluations.jsonl", "export", "ledger.jsonl", "metrics.jsonl"]
    assert entries(aside) == moved
    assert entries(tmp_path) == ["config.json", aside.name]
    assert versions(Checkpoints(aside, "5f2a9c01-old")) == [3]
    await save_all(checkpoints, 2)
    assert versions(checkpoints) == [2]
    assert set_aside_strangers(tmp_path, "mine", "mine") is None
    assert set_aside_strangers(tmp_path, "third", "mine") == tmp_path / "set-aside-2-mine"


@pytest.mark.parametrize("ledger_uid", [None, "mine"])
async def test_nothing_of_ones_own_is_set_aside(
    checkpoints: Checkpoints, tmp_path: Path, ledger_uid: str | None
) -> None:
    assert set_aside_strangers(tmp_path, "mine", ledger_uid) is None
    await save_all(checkpoints, 0, 2)
    assert set_aside_strangers(tmp_path, "mine", ledger_uid) is None
    assert versions(checkpoints) == [2, 0]


async def test_a_ledger_alone_is_a_strangers_as_well(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text("{}")
    assert set_aside_strangers(tmp_path, "mine", "another") == tmp_path / "set-aside-1-another"
    assert not (tmp_path / "ledger.jsonl").exists()


@pytest.mark.parametrize("half", [b"", b'{"uid": "mi', b"\0\0\0", b"[]", b"{}"])
async def test_books_half_written_by_a_crash_are_nobodys(
    checkpoints: Checkpoints, tmp_path: Path, half: bytes
) -> None:
    """A trainer that was killed while it wrote them must be able to start."""
    await save_all(checkpoints, 2)
    (checkpoints.folder / "step-000004.tmp").mkdir()
    (checkpoints.folder / "step-000004.tmp" / "position.json").write_bytes(half)
    assert set_aside_strangers(tmp_path, "mine", "mine") is None
    await save_all(checkpoints, 4)
    assert versions(checkpoints) == [4, 2]


# -- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def write_plain(folder: Path) -> None:
    folder.mkdir()
    (folder / "weights.bin").write_bytes(os.urandom(3 * 2**20))


def write_with_torch(folder: Path) -> None:
    folder.mkdir()
    torch.save(torch.zeros(3 * 2**18), folder / "weights.pt")


def leave_no_room_for_the_books(folder: Path) -> None:
    folder.mkdir()
    with (folder / "weights.bin").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"0" * 4096)


def write_to_a_full_device(folder: Path) -> None:
    folder.mkdir()
    Path("/dev/full").write_bytes(b"0")


def saving(write: Callable[[Path], None]) -> SavePolicy:
    async def save(folder: Path) -> None:
        write(folder)

    return save


async def failure_of(checkpoints: Checkpoints, save_policy: SavePolicy) -> str:
    """Return only the error's message, since the error itself would keep its files open."""
    try:
        await checkpoints.save(position(4), save_policy)
    except CheckpointFailed as error:
        return str(error)
    raise AssertionError("it was saved")


@pytest.mark.parametrize(
    ("write", "cause"),
    [
        (write_plain, "No space left on device"),
        (write_with_torch, "enforce fail"),  # torch's words; the free space says what they mean
        (leave_no_room_for_the_books, "No space left on device"),
    ],
)
async def test_a_full_disk_is_named_and_the_checkpoint_before_it_stays_good(
    small_disk: Path, write: Callable[[Path], None], cause: str
) -> None:
    checkpoints = Checkpoints(small_disk, "mine")
    await checkpoints.save(position(2), policy(b"w" * 2**18))
    before = contents(small_disk)
    for _ in range(2):
        message = await failure_of(checkpoints, saving(write))
        assert message.startswith(f"checkpoint {checkpoints.folder}/step-000004: ") and cause in message
        assert "; 0 MB were free there. Earlier checkpoints are untouched; free some space, " in message
    assert contents(small_disk) == before
    assert names(checkpoints) == ["step-000002"] and versions(checkpoints) == [2]

    await checkpoints.save(position(4), policy(b"w" * 2**18))  # a smaller one: its room was given back
    assert versions(checkpoints) == [4, 2]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def test_a_device_that_is_full_at_the_first_byte_fails_the_checkpoint(checkpoints: Checkpoints) -> None:
    """This test needs no right to mount anything."""
    await save_all(checkpoints, 2)
    message = await failure_of(checkpoints, saving(write_to_a_full_device))
    assert "step-000004: [Errno 28] No space left on device; " in message
    assert names(checkpoints) == ["step-000002"] and versions(checkpoints) == [2]
