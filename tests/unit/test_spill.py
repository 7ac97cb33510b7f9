"""The file beside a checkpoint that keeps what the stream no longer has."""

from pathlib import Path

import msgspec
import pytest

from asyncrl_runtime.contract.broker import StreamMessage
from asyncrl_runtime.trainer.books.spill import FILE_NAME, Spill, read_spill

MESSAGES = [StreamMessage(n, f"rl.j.traj.{n}", bytes([n]) * n, f"id{n}") for n in range(1, 12)]


def test_what_is_spilled_is_read_back_in_order(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    for message in MESSAGES:
        spill.add(message)
    assert list(read_spill(tmp_path)) == []
    spill.seal()
    spill.discard()
    assert list(read_spill(tmp_path)) == MESSAGES
    assert spill.num_bytes == (tmp_path / FILE_NAME).stat().st_size


@pytest.mark.parametrize("num_bytes", [1, 8, 20])
def test_a_damaged_file_says_so(tmp_path: Path, num_bytes: int) -> None:
    spill = Spill(tmp_path)
    spill.add(MESSAGES[0])
    spill.add(MESSAGES[1])
    spill.seal()
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:-num_bytes])
    with pytest.raises(msgspec.DecodeError):
        list(read_spill(tmp_path))


def test_what_is_there_already_stays(tmp_path: Path) -> None:
    """After a restart from this checkpoint, the stream no longer has it."""
    for messages in (MESSAGES[:4], MESSAGES[4:]):
        spill = Spill(tmp_path)
        assert spill.last_sequence == messages[0].sequence - 1
        for message in messages:
            spill.add(message)
        spill.seal()
    assert list(read_spill(tmp_path)) == MESSAGES
