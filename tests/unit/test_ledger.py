"""The ledger's lines, what they amount to, and the audit of them."""

import errno
import os
from pathlib import Path

import pytest

from asyncrl_api.ledger import LedgerError, read_history, read_ledger
from asyncrl_runtime.history.audit import audit, render
from asyncrl_runtime.history.ledger_writer import Ledger, Superseded


def record(ledger: Ledger, version: int, tickets: list[int], **discards: list[int]) -> None:
    ledger.record_step(version, tickets, discards, {"training": {"maxSteps": 9}})


def test_history_of_two_attempts(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    first = Ledger(path, 1)
    assert first.claim("uid").steps == []
    first.begin(0)
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
    again.begin(1)
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
