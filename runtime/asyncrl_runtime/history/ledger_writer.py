"""Writes ledger.jsonl, one attempt at a time; its lines and their reader are in `asyncrl_api.ledger`."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from asyncrl_api.ledger import History, LedgerLine, decode_line, read_ledger

log = logging.getLogger(__name__)


class Superseded(Exception):
    """A later attempt has claimed the ledger, so this one must end."""


class Ledger:
    """The file of the ledger, which one attempt at a time writes."""

    def __init__(self, path: Path, attempt: int) -> None:
        self._path = path
        self._attempt = attempt
        self._read_to = 0

    def claim(self, uid: str) -> History:
        """Drop a torn last line, append this attempt, and return the history so far.

        Raises:
            Superseded: the ledger has seen this attempt or a later one.
        """
        _drop_torn_line(self._path)
        before = read_ledger(self._path)
        if before.attempt >= self._attempt:
            raise Superseded(f"{self._path} was claimed by attempt {before.attempt}; this is {self._attempt}")
        self._read_to = self._path.stat().st_size if self._path.exists() else 0
        self._append(LedgerLine(attempt=self._attempt, uid=uid))
        return read_ledger(self._path)

    def begin(self, version: int, frozen: Mapping[str, Any]) -> None:
        """Announce that this attempt forms new steps from `version` on, under these values of R fields."""
        self._append(LedgerLine(attempt=self._attempt, began=version, frozen=dict(frozen)))

    def record_step(
        self,
        version: int,
        tickets: Sequence[int],
        discards: Mapping[str, Sequence[int]],
        live: Mapping[str, Any],
    ) -> None:
        """Announce the step from `version`; after this line the step is history."""
        self._append(
            LedgerLine(
                attempt=self._attempt,
                version=version,
                tickets=tuple(tickets),
                discards={reason: tuple(numbers) for reason, numbers in discards.items()},
                live=dict(live),
            )
        )

    def cut(self, version: int) -> None:
        """Give up the recorded steps from `version` on, whose trajectories are lost."""
        self._append(LedgerLine(attempt=self._attempt, cut=version))

    def end(self, num_issued: int, left_over: Mapping[str, Sequence[int]]) -> None:
        discards = {reason: tuple(numbers) for reason, numbers in left_over.items()}
        self._append(LedgerLine(attempt=self._attempt, issued=num_issued, discards=discards))

    def _append(self, line: LedgerLine) -> None:
        """Write one line and flush it to disk.

        Raises:
            Superseded: a later attempt has written since.
            OSError: the disk is full, for example; the line is then torn, and the next claim drops it.
        """
        with self._path.open("ab+") as file:
            file.seek(self._read_to)
            for text in file.read().decode().splitlines():
                if (attempt := decode_line(text).attempt) > self._attempt:
                    raise Superseded(f"attempt {attempt} has claimed {self._path}; this is {self._attempt}")
            file.write(_encoder.encode(line) + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._read_to = file.tell()


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    data = path.read_bytes()
    if (complete := data.rfind(b"\n") + 1) < len(data):
        log.warning("%s: dropping a torn last line: %r", path, data[complete:][:80])
        os.truncate(path, complete)


_encoder = msgspec.json.Encoder()
