"""ledger.jsonl: what was begun, line by line, so that whatever dies the surviving history is known.

Lines, each flushed to disk before what it announces begins:

    {"attempt": a, "uid": u}                      an attempt claims the ledger, before it reads it
    {"attempt": a, "began": v}                    it has caught up and begins new steps at version v
    {"attempt": a, "version": v, "tickets": [...], "discards": {"reason": [...]}, "live": {...}}
                                                  the step from version v to v + 1
    {"attempt": a, "cut": v}                      recorded steps from version v on cannot be repeated
    {"attempt": a, "issued": n, "discards": {...}}  the end: n tickets were issued, these were left over
"""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

log = logging.getLogger(__name__)


class LedgerLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Any line; which fields are set says which kind it is."""

    attempt: int
    uid: str | None = None
    began: int | None = None
    version: int | None = None
    tickets: tuple[int, ...] | None = None
    discards: dict[str, tuple[int, ...]] | None = None
    live: dict[str, Any] | None = None
    cut: int | None = None
    issued: int | None = None


@dataclass(frozen=True)
class RecordedStep:
    """A step that was begun: it takes the policy from `version` to the next one."""

    attempt: int
    version: int
    tickets: tuple[int, ...]
    discards: Mapping[str, tuple[int, ...]]
    """Closed since the step before, by reason."""
    live: Mapping[str, Any]
    """The values of live fields that decide what is trained, as they were."""
    began: Mapping[int, int]
    """attempt -> version at which it began, as known when the step was recorded."""


@dataclass
class History:
    """The surviving history that the ledger's lines amount to."""

    uid: str | None = None
    attempt: int = 0
    """The highest that claimed the ledger."""
    steps: list[RecordedStep] = field(default_factory=list)
    """Of versions 0, 1, 2 ... without a gap."""
    began: dict[int, int] = field(default_factory=dict)
    num_issued: int | None = None
    """Set by the end line: the job is over."""
    left_over: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """Version behind the last recorded step."""
        return len(self.steps)


class LedgerError(Exception):
    """The file holds what no crash explains; it is not guessed at."""


class Superseded(Exception):
    """A later attempt has claimed the ledger; this one must end."""


def read_history(lines: Iterable[str], source: str = "ledger") -> History:
    """Return what complete lines amount to. Lines of a lower attempt after a higher one are void.

    Raises:
        LedgerError: a line does not parse, or steps do not follow one another; names the line.
    """
    history = History()
    for number, text in enumerate(lines, start=1):
        try:
            line = _decoder.decode(text)
        except msgspec.DecodeError as error:
            raise LedgerError(f"{source}, line {number}: {error}: {text[:80]!r}") from error
        if line.attempt < history.attempt:
            continue
        history.attempt = line.attempt
        _apply(history, line, f"{source}, line {number}")
    return history


def _apply(history: History, line: LedgerLine, where: str) -> None:
    if line.uid is not None:
        history.uid = line.uid
    elif line.began is not None:
        history.began = {**history.began, line.attempt: line.began}
    elif line.cut is not None:
        del history.steps[line.cut :]
        history.num_issued, history.left_over = None, {}
    elif line.version is not None:
        if line.version != history.version:
            raise LedgerError(f"{where}: step from version {line.version}, but {history.version} is next")
        history.steps.append(
            RecordedStep(
                attempt=line.attempt,
                version=line.version,
                tickets=line.tickets or (),
                discards=line.discards or {},
                live=line.live or {},
                began=history.began,
            )
        )
        history.num_issued, history.left_over = None, {}  # a finished job whose maxSteps was raised
    elif line.issued is not None:
        history.num_issued, history.left_over = line.issued, dict(line.discards or {})


class Ledger:
    """The ledger's file, written by one attempt at a time."""

    def __init__(self, path: Path, attempt: int) -> None:
        self._path = path
        self._attempt = attempt
        self._read_to = 0

    @staticmethod
    def peek(path: Path) -> History:
        """Return the history without claiming anything, for audit and for a reader beside the trainer."""
        return read_history(_complete_lines(path), str(path))

    def claim(self, uid: str) -> History:
        """Append this attempt, drop a torn last line, and return the history so far.

        Raises:
            Superseded: the ledger has seen this attempt or a later one.
        """
        _drop_torn_line(self._path)
        before = self.peek(self._path)
        if before.attempt >= self._attempt:
            raise Superseded(f"{self._path} was claimed by attempt {before.attempt}; this is {self._attempt}")
        self._read_to = self._path.stat().st_size if self._path.exists() else 0
        self._append(LedgerLine(attempt=self._attempt, uid=uid))
        return self.peek(self._path)

    def begin(self, version: int) -> None:
        self._append(LedgerLine(attempt=self._attempt, began=version))

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
        """Give up recorded steps from `version` on: their trajectories are lost."""
        self._append(LedgerLine(attempt=self._attempt, cut=version))

    def end(self, num_issued: int, left_over: Mapping[str, Sequence[int]]) -> None:
        discards = {reason: tuple(numbers) for reason, numbers in left_over.items()}
        self._append(LedgerLine(attempt=self._attempt, issued=num_issued, discards=discards))

    def _append(self, line: LedgerLine) -> None:
        """Write one line and flush it to disk.

        Raises:
            Superseded: a later attempt has written since.
            OSError: the disk is full, say; the line is then torn and dropped at the next claim.
        """
        with self._path.open("ab+") as file:
            file.seek(self._read_to)
            for text in file.read().decode().splitlines():
                if (attempt := _decoder.decode(text).attempt) > self._attempt:
                    raise Superseded(f"attempt {attempt} has claimed {self._path}; this is {self._attempt}")
            file.write(_encoder.encode(line) + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._read_to = file.tell()


def _complete_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    data = path.read_bytes()  # a torn last line may end within a character
    return data[: data.rfind(b"\n") + 1].decode().splitlines()


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    data = path.read_bytes()
    if (complete := data.rfind(b"\n") + 1) < len(data):
        log.warning("%s: dropping a torn last line: %r", path, data[complete:][:80])
        os.truncate(path, complete)


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(LedgerLine)
