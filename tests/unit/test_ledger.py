"""The ledger's lines, what they amount to, and the audit of them."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asyncrl_api.ledger import LedgerError, StepFailure, read_history, read_ledger
from asyncrl_runtime.history.audit import audit, render
from asyncrl_runtime.history.ledger_writer import Ledger, Superseded


def record(ledger: Ledger, version: int, tickets: list[int], **discards: list[int]) -> None:
    ledger.record_step(version, tickets, discards, {"training": {"maxSteps": 9}})


def test_history_of_two_attempts(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    first = Ledger(path, 1)
    assert first.claim("uid").steps == []
    first.begin(0, {"training.minibatches": 4})
    record(first, 0, [1, 2])
    record(first, 1, [3, 5], uniform=[4])
    history = Ledger(path, 2).claim("uid")
    assert (history.uid, history.attempt, history.version, history.began) == ("uid", 2, 2, {1: 0})
    assert history.steps[1].tickets == (3, 5) and history.steps[1].discards == {"uniform": (4,)}
    assert history.steps[1].began == {1: 0} and history.steps[1].live["training"] == {"maxSteps": 9}


def test_lines_of_a_lower_attempt_after_a_higher_are_void(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    old = Ledger(path, 1)
    old.claim("u")
    record(old, 0, [1])
    Ledger(path, 2).claim("u")
    with pytest.raises(Superseded, match="attempt 2"):
        record(old, 1, [2])
    with path.open("a") as file:  # a zombie that did not look
        file.write('{"attempt":1,"version":1,"tickets":[2]}\n')
    assert read_ledger(path).version == 1


def test_an_attempt_is_claimed_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path, 3).claim("u")
    with pytest.raises(Superseded, match="claimed by attempt 3; this is 2"):
        Ledger(path, 2).claim("u")
    with pytest.raises(Superseded):
        Ledger(path, 3).claim("u")


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    first = Ledger(path, 1)
    first.claim("u")
    record(first, 0, [1])
    with path.open("a") as file:
        file.write('{"attempt":1,"version":1,"tick')
    assert read_ledger(path).version == 1
    second = Ledger(path, 2)
    assert second.claim("u").version == 1
    record(second, 1, [2])
    assert read_ledger(path).version == 2


def test_a_broken_line_in_the_middle_is_not_guessed_at(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"attempt":1,"uid":"u"}\n{"attempt":1,"vers\n{"attempt":1,"version":0,"tickets":[1]}\n')
    with pytest.raises(LedgerError, match="line 2"):
        read_ledger(path)
    with pytest.raises(LedgerError, match="step from version 1, but 0 is next"):
        read_history(['{"attempt":1,"version":1,"tickets":[1]}'])


def test_a_cut_takes_steps_back(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, 1)
    ledger.claim("u")
    for version in range(3):
        record(ledger, version, [version + 1])
    again = Ledger(path, 2)
    again.claim("u")
    again.cut(1)
    again.begin(1, {})
    record(again, 1, [3])
    history = read_ledger(path)
    assert [step.tickets for step in history.steps] == [(1,), (3,)]
    assert history.began == {2: 1}


def test_audit_of_a_finished_job_counts_everything() -> None:
    lines = [
        '{"attempt":1,"uid":"u"}',
        '{"attempt":1,"version":0,"tickets":[1,2],"discards":{"stale":[3]}}',
        '{"attempt":1,"version":1,"tickets":[4,6]}',
        '{"attempt":1,"issued":8,"discards":{"leftover":[7,8]}}',
    ]
    result = audit(read_history(lines))
    assert (result.num_trained, dict(result.discarded)) == (4, {"stale": 1, "leftover": 2})
    assert result.missing == (5,) and result.twice == () and not result.is_clean
    assert render(result).startswith("trained 4  discarded 3  missing 1  twice 0")
    lines[2] = '{"attempt":1,"version":1,"tickets":[2,5,4,6]}'
    result = audit(read_history(lines))
    assert result.missing == () and result.twice == (2,)


def test_audit_of_a_job_that_goes_on_has_open_tickets_instead_of_missing_ones() -> None:
    result = audit(read_history(['{"attempt":1,"uid":"u"}', '{"attempt":1,"version":0,"tickets":[1,4]}']))
    assert result.is_clean and result.num_open == 2 and not result.is_finished


def test_a_finished_job_that_goes_on_counts_its_left_over_once() -> None:
    lines = [
        '{"attempt":1,"uid":"u"}',
        '{"attempt":1,"version":0,"tickets":[1]}',
        '{"attempt":1,"issued":2,"discards":{"leftover":[2]}}',
        '{"attempt":2,"uid":"u"}',
        '{"attempt":2,"version":1,"tickets":[3],"discards":{"leftover":[2]}}',
        '{"attempt":2,"issued":3,"discards":{}}',
    ]
    assert audit(read_history(lines)).is_clean


# -- updates that were not applied, and steps that failed


def test_a_skipped_update_is_a_note_to_its_step_and_the_last_note_counts(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, 1)
    ledger.claim("u")
    for version in range(3):
        record(ledger, version, [2 * version + 1, 2 * version + 2])
    ledger.skip(1, [0], [3])
    ledger.skip(1, [0, 1], [3, 4])  # it was repeated
    history = read_ledger(path)
    assert [step.skipped for step in history.steps] == [(), (0, 1), ()]
    result = audit(history)
    assert (result.num_trained, result.num_without_effect, result.is_clean) == (6, 2, True)
    assert "  trained without effect: 2, since the gradient of their update was not finite" in render(result)
    ledger.cut(1)
    assert audit(read_ledger(path)).num_without_effect == 0


def test_a_failure_is_about_its_step_until_a_later_one_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, 1)
    ledger.claim("u")
    record(ledger, 0, [1, 2])
    first = StepFailure(0, "IndexError: index out of range", (2,), None)
    second = StepFailure(0, "OutOfMemoryError", (), 512)
    ledger.fail(first)
    ledger.fail(second)
    assert read_ledger(path).failures == read_ledger(path).in_a_row == [first, second]
    record(ledger, 1, [3, 4])
    history = read_ledger(path)
    assert history.failures == [first, second] and history.in_a_row == []
    ledger.cut(0)
    assert read_ledger(path).failures == []


def test_what_a_cut_discards_is_closed_until_the_next_step_lists_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, 1)
    ledger.claim("u")
    record(ledger, 0, [1, 2])
    record(ledger, 1, [3, 4])
    ledger.cut(1, {"step_failed": [4]})
    ledger.cut(0)  # the streams were lost as well
    result = audit(read_ledger(path))
    assert (dict(result.discarded), result.num_open, result.is_clean) == ({"step_failed": 1}, 3, True)
    record(ledger, 0, [1, 3], step_failed=[4])
    result = audit(read_ledger(path))
    assert (dict(result.discarded), result.num_open, result.is_clean) == ({"step_failed": 1}, 1, True)


@pytest.mark.parametrize(
    "line",
    ['{"attempt":1,"version":1,"skipped":[0]}', '{"attempt":1,"failed":1}', '{"attempt":1,"failed":-1}'],
)
def test_a_note_to_a_step_that_was_not_recorded_is_not_guessed_at(line: str) -> None:
    with pytest.raises(
        LedgerError, match=r"ledger, line 2: about a step from version -?1, but 1 are recorded"
    ):
        read_history(['{"attempt":1,"version":0,"tickets":[1]}', line])


OPTIONAL_TICKETS = st.none() | st.lists(st.integers(1, 20), max_size=3).map(sorted)
NOTES = st.fixed_dictionaries(
    {"kind": st.sampled_from(["uid", "began", "step", "step", "skipped", "failed", "cut", "issued"])},
    optional={
        "at": st.floats(0, 1, exclude_max=True),
        "is_new_attempt": st.booleans(),
        "tickets": OPTIONAL_TICKETS,
        "memory": st.integers(1, 9),
    },
)


def as_lines(notes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines as a trainer may write them: steps follow one another, notes are about recorded steps."""
    lines: list[dict[str, Any]] = []
    attempt, version, ticket = 1, 0, 0
    for note in notes:
        attempt += note.get("is_new_attempt", False)
        place = int(note.get("at", 0) * version)
        line: dict[str, Any] = {"attempt": attempt}
        match note["kind"]:
            case "uid":
                line |= {"uid": "u"}
            case "began":
                line |= {"began": version}
            case "step":
                line |= {"version": version, "tickets": [ticket + 1, ticket + 2]}
                version, ticket = version + 1, ticket + 2
            case "skipped" if version:
                line |= {"version": place, "skipped": [0], "tickets": note.get("tickets") or []}
            case "failed" if version:
                line |= {"failed": place, "cause": "c", "out_of_memory_at": note.get("memory")}
            case "cut":
                version = place
                line |= {"cut": place, "discards": {"step_failed": note.get("tickets") or []}}
            case "issued":
                line |= {"issued": ticket}
        lines.append({key: value for key, value in line.items() if value is not None})
    return lines


@given(st.lists(NOTES, max_size=25))
@example([{"kind": "step"}, {"kind": "failed"}, {"kind": "failed"}, {"kind": "cut"}, {"kind": "step"}])
def test_notes_change_nothing_about_which_steps_survive(notes: list[dict[str, Any]]) -> None:
    lines = as_lines(notes)
    history = read_history(map(json.dumps, lines))
    is_note = [line.keys() & {"skipped", "failed"} for line in lines]
    without = read_history(json.dumps(line) for line, note in zip(lines, is_note, strict=True) if not note)
    assert [(step.version, step.tickets) for step in history.steps] == [
        (step.version, step.tickets) for step in without.steps
    ]
    assert (history.num_issued, history.left_over) == (without.num_issued, without.left_over)
    assert all(failure.version < history.version for failure in history.failures)
    assert set(history.in_a_row) <= set(history.failures)
    for place in range(len(lines)):  # whatever the trainer dies of, what it has written can be read
        read_history(map(json.dumps, lines[:place]))
    audit(history)


# -- disks


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_line_that_the_disk_does_not_take_leaves_none_and_may_be_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, 1)
    ledger.claim("u")
    record(ledger, 0, [1])
    before = path.read_bytes()

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        for _ in range(2):
            with pytest.raises(OSError, match=os.strerror(number)):
                record(ledger, 1, [2])
    assert path.read_bytes() == before
    record(ledger, 1, [2])
    assert [step.tickets for step in read_ledger(path).steps] == [(1,), (2,)]
