"""ledger.jsonl: what was begun, line by line, so that the surviving history is known whatever dies.

Each line is flushed to disk before what it announces begins:

    {"attempt": a, "uid": u}                      an attempt claims the ledger, before it reads it
    {"attempt": a, "began": v, "frozen": {...}}   it has caught up and begins new steps at version v
    {"attempt": a, "version": v, "tickets": [...], "discards": {"reason": [...]}, "live": {...}}
                                                  the step from version v to v + 1
    {"attempt": a, "cut": v}                      recorded steps from version v on cannot be repeated
    {"attempt": a, "issued": n, "discards": {...}}  the end: n tickets were issued, and these were left over
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec


class LedgerLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Any line; the fields that are set tell which kind it is."""

    attempt: int
    uid: str | None = None
    began: int | None = None
    frozen: dict[str, Any] | None = None
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
    """Tickets that were closed since the step before, by reason."""
    live: Mapping[str, Any]
    """The values, at that time, of the live fields that decide what is trained."""
    began: Mapping[int, int]
    """The version at which each attempt began (attempt -> version), as known when the step was recorded."""
    frozen: Mapping[str, Any] = field(default_factory=dict)
    """The values, in that attempt, of fields marked R that decide what is trained; none in older ledgers."""


@dataclass
class History:
    """The surviving history, as the ledger's lines add up to it."""

    uid: str | None = None
    attempt: int = 0
    """The highest attempt that has claimed the ledger."""
    steps: list[RecordedStep] = field(default_factory=list)
    """The recorded steps, from versions 0, 1, 2 and so on without a gap."""
    began: dict[int, int] = field(default_factory=dict)
    frozen: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    """What the `began` line of each attempt says about the fields marked R."""
    num_issued: int | None = None
    """The number of tickets that were issued, set by the end line: the job is over."""
    left_over: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """The version that the last recorded step leads to."""
        return len(self.steps)


class LedgerError(Exception):
    """The file holds something that no crash explains; what it means is not guessed."""


def read_ledger(path: Path) -> History:
    """Return the history without claiming anything, for the audit and for other readers than the trainer.

    Raises:
        LedgerError: as for `read_history`.
    """
    return read_history(complete_lines(path), str(path))


def read_history(lines: Iterable[str], source: str = "ledger") -> History:
    """Return the history that complete lines add up to. Lines of a lower attempt after a higher one are void.

    Raises:
        LedgerError: a line does not parse, or steps do not follow one another; names the line.
    """
    history = History()
    for number, text in enumerate(lines, start=1):
        try:
            line = decode_line(text)
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
        history.frozen[line.attempt] = line.frozen or {}
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
                frozen=history.frozen.get(line.attempt, {}),
            )
        )
        history.num_issued, history.left_over = None, {}  # a finished job whose maxSteps was raised
    elif line.issued is not None:
        history.num_issued, history.left_over = line.issued, dict(line.discards or {})


def complete_lines(path: Path) -> list[str]:
    """Return the lines of a ledger without a torn last one; none if there is no file."""
    if not path.exists():
        return []
    data = path.read_bytes()  # a torn last line may end within a character
    return data[: data.rfind(b"\n") + 1].decode().splitlines()


def decode_line(text: str | bytes) -> LedgerLine:
    """Return the line of the ledger that `text` holds.

    Raises:
        msgspec.DecodeError: `text` is not such a line.
    """
    return _decoder.decode(text)


_decoder = msgspec.json.Decoder(LedgerLine)
