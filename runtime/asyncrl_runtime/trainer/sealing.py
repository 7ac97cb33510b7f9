"""Flushes files to disk piece by piece, so that a slow disk is seen to move."""

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

PIECE_BYTES = 64 * 2**20
_WAIT_WRITE_WAIT = 1 | 2 | 4
"""SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE and _WAIT_AFTER: the call returns when the piece has been written."""
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EOPNOTSUPP)

Sealed = Callable[[int], None]
"""Is told of every piece that has reached the disk, in bytes."""


def seal_folder(folder: Path, sealed: Sealed) -> None:
    """Flush every file below a folder, then the folders, so that a power cut takes nothing from it.

    Raises:
        OSError: the disk has failed; what was written may be lost.
    """
    paths = sorted(folder.rglob("*"))
    for path in paths:
        if path.is_file():
            seal(path, sealed)
    for path in (*(path for path in paths if path.is_dir()), folder):
        sync(path)


def seal(path: Path, sealed: Sealed) -> None:
    """Flush one file. It is written piece by piece first: one fsync of it all would say nothing for long."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        for start in range(0, size, PIECE_BYTES):
            _write_out(descriptor, start, min(PIECE_BYTES, size - start))
            sealed(min(PIECE_BYTES, size - start))
        os.fsync(descriptor)  # sync_file_range flushes neither the size nor the disk's own cache
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Flush a file or a folder at once; for small ones."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_out(descriptor: int, start: int, length: int) -> None:
    """Have the kernel write a piece of a file to disk, where the file system can; fsync does it otherwise."""
    if _sync_file_range is None:
        return
    if _sync_file_range(descriptor, ctypes.c_int64(start), ctypes.c_int64(length), _WAIT_WRITE_WAIT) == 0:
        return
    if (number := ctypes.get_errno()) not in _UNSUPPORTED:
        raise OSError(number, os.strerror(number))


_sync_file_range = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
"""Linux has it; other systems do not."""
