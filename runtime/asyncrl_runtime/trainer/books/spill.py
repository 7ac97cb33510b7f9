"""Trajectories that only the older of two checkpoints needs, in a file beside it.

The stream can then be purged behind the newer one, and both stay restorable: whoever restores the older one
takes what is in the file, and reads the stream from there.
"""

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from asyncrl_runtime.contract.broker import StreamMessage
from asyncrl_runtime.trainer.sealing import sync

FILE_NAME = "trajectories.msgpack"
_LENGTH = struct.Struct("<Q")


class Spill:
    """Writes one file of messages: complete under its name, or not at all.

    It begins with what is there already: after a restart from this checkpoint, the stream no longer has that.

    Args:
        folder: the checkpoint's.

    Raises (in every method):
        OSError: the disk does not take it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE_NAME
        self._scratch = self._path.with_suffix(".tmp")
        self._file: BinaryIO = self._scratch.open("wb")
        self.num_bytes = self.last_sequence = 0
        with contextlib.suppress(msgspec.DecodeError):  # what is damaged is lost already
            for message in read_spill(folder):
                self.add(message)

    def add(self, message: StreamMessage) -> None:
        """Append a message; the last one that a reader can need is the one of the newer checkpoint."""
        data = msgspec.msgpack.encode(message)
        self._file.write(_LENGTH.pack(len(data)) + data)
        self.num_bytes += _LENGTH.size + len(data)
        self.last_sequence = message.sequence

    def seal(self) -> None:
        """Flush the file to the disk and give it its name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._scratch.replace(self._path)
        sync(self._path.parent)

    def discard(self) -> None:
        """Remove what is not sealed; does nothing to what is."""
        self._file.close()
        self._scratch.unlink(missing_ok=True)


def read_spill(folder: Path) -> Iterator[StreamMessage]:
    """Yield the messages beside a checkpoint in the order of the stream; none if there is no file.

    Raises:
        OSError: the file cannot be read.
        msgspec.DecodeError: it is damaged.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return
    with path.open("rb") as file:
        while head := file.read(_LENGTH.size):
            if len(head) < _LENGTH.size:
                raise msgspec.DecodeError(f"{path} ends in the middle of a message")
            yield msgspec.msgpack.decode(file.read(_LENGTH.unpack(head)[0]), type=StreamMessage)
