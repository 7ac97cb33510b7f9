"""ledger.jsonl: what was begun, line by line, so that the surviving history is known whatever dies.

Each line is flushed to disk before what it announces begins:

    {"attempt": a, "uid": u}                      an attempt claims the ledger, before it reads it
    {"attempt": a, "began": v, "frozen": {...}}   it has caught up and begins new steps at version v
    {"attempt": a, "version": v, "tickets": [...], "discards": {"reason": [...]}, "live": {...}}
                                                  the step from version v to v + 1
    {"attempt": a, "version": v, "skipped": [m], "tickets": [...]}
                                                  the recorded step v did not update the policy from these
                                                  minibatches, whose gradient was not finite; the line is
                                                  absent if the trainer died before it
    {"attempt": a, "failed": v, "cause": "...", "tickets": [...], "out_of_memory_at": n}
                                                  the recorded step v raised an exception of its own: in the
                                                  micro-batch of these tickets, if one is known; with n tokens
                                                  per micro-batch, if memory ran out
    {"attempt": a, "cut": v, "discards": {...}}   recorded steps from version v on are given up: these tickets
                                                  are discarded, and the others are open again
    {"attempt": a, "issued": n, "discards": {...}}  the end: n tickets were issued, and these were left over
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec


class LedgerLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Any line; the fields that are set tell which kind it is. With `skipped` it is a note to a step."""

    attempt: int
    uid: str | None = None
    began: int | None = None
    frozen: dict[str, Any] | None = None
    version: int | None = None
    tickets: tuple[int, ...] | None = None
    discards: dict[str, tuple[int, ...]] | None = None
    live: dict[str, Any] | None = None
    skipped: tuple[int, ...] | None = None
    failed: int | None = None
    cause: str | None = None
    out_of_memory_at: int | None = None
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
    """The values, in that attempt, of the fields marked R that decide what is trained."""
    skipped: tuple[int, ...] = ()
    """The minibatches whose update was not applied, since its gradient was not finite."""
    without_effect: tuple[int, ...] = ()
    """The tickets of these minibatches."""


class StepFailure(NamedTuple):
    """A recorded step raised an exception of its own: not a kill, a lost peer, a disk, or a stop."""

    version: int
    cause: str
    tickets: tuple[int, ...]
    """The tickets of the micro-batch that raised it; empty if that is not known."""
    out_of_memory_at: int | None
    """The tokens per micro-batch with which memory ran out; None for other causes."""


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
    failures: list[StepFailure] = field(default_factory=list)
    """The failures of surviving steps, in their order."""
    in_a_row: list[StepFailure] = field(default_factory=list)
    """Those since the last step was recorded; whoever records a step has trained all before it."""
    num_issued: int | None = None
    """The number of tickets that were issued, set by the end line: the job is over."""
    left_over: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Tickets that are discarded, by reason, and that no step lists: those of the end line, or of a cut. The
    next step to be recorded lists them."""

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
        LedgerError: a line does not parse, steps do not follow one another, or a line is about a step that
            was not recorded; names the line.
    """
    history = History()
    for number, text in enumerate(lines, start=1):
        try:
            line = decode_line(text)
        except (ValueError, RecursionError) as error:  # DecodeError is a ValueError, as is foreign text
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
        _cut(history, line.cut, line.discards or {})
    elif line.skipped is not None or line.failed is not None:
        _note(history, line, where)
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
        history.in_a_row.clear()
        history.num_issued, history.left_over = None, {}  # a finished job whose maxSteps was raised, or a cut
    elif line.issued is not None:
        history.num_issued, history.left_over = line.issued, dict(line.discards or {})


def _cut(history: History, version: int, discards: Mapping[str, tuple[int, ...]]) -> None:
    """Give up the steps from `version` on. What an earlier cut has discarded stays discarded."""
    del history.steps[version:]
    history.failures = [failure for failure in history.failures if failure.version < version]
    history.in_a_row = [failure for failure in history.in_a_row if failure.version < version]
    kept = {} if history.num_issued is not None else history.left_over
    reasons = {**kept, **discards}
    history.num_issued = None
    history.left_over = {reason: kept.get(reason, ()) + discards.get(reason, ()) for reason in reasons}


def _note(history: History, line: LedgerLine, where: str) -> None:
    """Take over what a line says about a step that was recorded before it.

    Raises:
        LedgerError: there is no such step.
    """
    version = line.version if line.failed is None else line.failed
    if version is None or not 0 <= version < history.version:
        raise LedgerError(f"{where}: about a step from version {version}, but {history.version} are recorded")
    if line.failed is not None:
        failure = StepFailure(version, line.cause or "", line.tickets or (), line.out_of_memory_at)
        history.failures.append(failure)
        history.in_a_row.append(failure)
        return
    history.steps[version] = replace(
        history.steps[version], skipped=line.skipped or (), without_effect=line.tickets or ()
    )


def complete_lines(path: Path) -> list[str]:
    """Return the lines of a ledger without a torn last one; none if there is no file."""
    if not path.exists():
        return []
    data = path.read_bytes()  # a torn last line may end within a character
    # Only our line ends count: a text within a line may hold those of other alphabets.
    return data[: data.rfind(b"\n") + 1].decode(errors="surrogateescape").split("\n")[:-1]


def decode_line(text: str | bytes) -> LedgerLine:
    """Return the line of the ledger that `text` holds.

    Raises:
        msgspec.DecodeError: `text` is not such a line.
    """
    return _decoder.decode(text)


_decoder = msgspec.json.Decoder(LedgerLine)
