"""Files reach the disk piece by piece, and what the disk says about it is passed on."""

import ctypes
import errno
import os
from pathlib import Path

import pytest

from asyncrl_runtime.trainer import sealing
from asyncrl_runtime.trainer.sealing import seal, seal_folder


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "PIECE_BYTES", 4096)


def test_each_piece_is_told_when_it_is_written(tmp_path: Path) -> None:
    path, told = tmp_path / "shard", list[int]()
    path.write_bytes(b"x" * 10_000)
    seal(path, told.append)
    assert told == [4096, 4096, 1808]


def test_a_folder_is_flushed_with_all_that_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "shard").write_bytes(b"x")
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(Path(f"/proc/self/fd/{fd}").readlink()))
    seal_folder(tmp_path, lambda num_bytes: None)
    assert set(flushed) == {tmp_path, tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "shard"}


@pytest.mark.parametrize(
    ("number", "is_error"), [(errno.EIO, True), (errno.ENOSPC, True), (errno.ENOSYS, False)]
)
def test_only_a_file_system_that_cannot_do_it_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_error: bool
) -> None:
    """fsync does the whole then."""
    path = tmp_path / "shard"
    path.write_bytes(b"x")
    monkeypatch.setattr(sealing, "_sync_file_range", lambda *arguments: -1)
    monkeypatch.setattr(ctypes, "get_errno", lambda: number)
    if not is_error:
        seal(path, lambda num_bytes: None)
        return
    with pytest.raises(OSError) as raised:
        seal(path, lambda num_bytes: None)
    assert raised.value.errno == number
