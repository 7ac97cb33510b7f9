"""Writes ledger.jsonl, one attempt at a time; its lines and their reader are in `asyncrl_api.ledger`."""

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from asyncrl_api.ledger import History, LedgerError, LedgerLine, StepFailure, decode_line, read_ledger

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

    def skip(self, version: int, minibatches: Sequence[int], tickets: Sequence[int]) -> None:
        """Note which updates of the recorded step were not applied, and whose tickets they are."""
        self._append(
            LedgerLine(
                attempt=self._attempt, version=version, skipped=tuple(minibatches), tickets=tuple(tickets)
            )
        )

    def fail(self, failure: StepFailure) -> None:
        """Note that a recorded step raised an exception of its own."""
        self._append(
            LedgerLine(
                attempt=self._attempt,
                failed=failure.version,
                cause=failure.cause,
                tickets=failure.tickets or None,
                out_of_memory_at=failure.out_of_memory_at,
            )
        )

    def cut(self, version: int, discards: Mapping[str, Sequence[int]] | None = None) -> None:
        """Give up the recorded steps from `version` on, which cannot be repeated.

        Args:
            discards: the tickets of these steps that are discarded, by reason; the others are open again.
        """
        listed = {reason: tuple(tickets) for reason, tickets in (discards or {}).items()}
        self._append(LedgerLine(attempt=self._attempt, cut=version, discards=listed or None))

    def end(self, num_issued: int, left_over: Mapping[str, Sequence[int]]) -> None:
        discards = {reason: tuple(numbers) for reason, numbers in left_over.items()}
        self._append(LedgerLine(attempt=self._attempt, issued=num_issued, discards=discards))

    def _append(self, line: LedgerLine) -> None:
        """Write one line and flush it to disk.

        Raises:
            Superseded: a later attempt has written since.
            OSError: the disk is full, for example. The file is as it was before, so this may be tried again.
                Only if the disk has turned read-only half way, the line is torn, and the next claim drops it.
        """
        with self._path.open("ab+") as file:
            file.seek(self._read_to)
            for text in filter(None, file.read().split(b"\n")):
                if (attempt := _attempt_of(text, self._path)) > self._attempt:
                    raise Superseded(f"attempt {attempt} has claimed {self._path}; this is {self._attempt}")
            end = file.seek(0, os.SEEK_END)
        data = _encoder.encode(line) + b"\n"
        append_whole(self._path, data, is_flushed=True)
        self._read_to = end + len(data)


def append_whole(path: Path, data: bytes, *, is_flushed: bool = False) -> None:
    """Append to a file all of `data` or nothing.

    Args:
        is_flushed: whether it must have reached the disk.

    Raises:
        OSError: the disk does not take it.
    """
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(data):
                written += file.write(data[written:])
            if is_flushed:
                os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def _attempt_of(text: bytes, path: Path) -> int:
    try:
        return decode_line(text).attempt
    except (ValueError, RecursionError) as error:
        raise LedgerError(f"{path}: somebody else has written into it: {error}: {text[:80]!r}") from error


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    data = path.read_bytes()
    if (complete := data.rfind(b"\n") + 1) < len(data):
        log.warning("%s: dropping a torn last line: %r", path, data[complete:][:80])
        os.truncate(path, complete)


_encoder = msgspec.json.Encoder()
