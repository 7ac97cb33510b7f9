"""Rows that a data set may hold, and those that it may not, told by their number."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_runtime.trainer.dataset import load_rows
from support.messages.samples import make_job

made_rows: list[dict[Any, Any]] = []


def factory(split: str, seed: int) -> Iterable[dict[Any, Any]]:
    return made_rows


def training_rows(source: str) -> tuple[dict[str, Any], ...]:
    return load_rows(make_job(f"dataset.source={source}").spec).training


def test_rows_come_from_a_file_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"question": "1+1"}\n\n  \n{"question": "ü", "answer": [1, 1.5, null]}', encoding="utf-8"
    )
    assert training_rows(f"file://{path}") == (
        {"question": "1+1"},
        {"question": "ü", "answer": [1, 1.5, None]},
    )


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_a_line_does_not_end_within_a_string(tmp_path: Path, separator: str) -> None:
    """Python takes these for the end of a line; JSON allows them in a string as they are."""
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"question": "a{separator}b"}}\r\n{{"question": "c"}}\n', encoding="utf-8")
    assert [row["question"] for row in training_rows(f"file://{path}")] == [f"a{separator}b", "c"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "split 'train' has no rows"),
        (b"\n \n", "split 'train' has no rows"),
        (b'{"question": "a"}\n{"question"', "line 2 is not JSON: "),
        (b"\n[1]\n", "line 2 is list; must be an object"),
        (b'{"question": "\xff"}\n', "is not UTF-8: "),
        (b'{"question": "a"}\n{"prompt": "b"}', "row 2: field 'question' is missing; the row has prompt"),
        (b'{"question": 5}', "row 1: field 'question' is int; must be text or a list of messages"),
        (b'{"question": "a", "answer": 1180591620717411303424}', "row 1: can't serialize ints"),
        (b'{"question": "\\ud800"}', "row 1: 'utf-8' codec can't encode character"),
    ],
)
def test_what_a_file_may_not_hold_is_unusable_and_says_where(
    tmp_path: Path, data: bytes, message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    with pytest.raises(ExitError) as refused:
        training_rows(f"file://{path}")
    assert refused.value.code == ExitCode.UNUSABLE
    assert str(refused.value).startswith(f"spec.dataset.source: file://{path}: {message}")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "answer": object()}, "row 2: Encoding objects of type object is unsupported"),
        ({"question": "a", 7: "b"}, "row 2: Expected `str`, got `int`"),
    ],
)
def test_a_row_that_would_not_reach_a_worker_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch, row: dict[Any, Any], message: str
) -> None:
    monkeypatch.setattr(f"{__name__}.made_rows", [{"question": "1+1"}, row])
    with pytest.raises(ExitError) as refused:
        training_rows(f"{__name__}:factory")
    assert refused.value.code == ExitCode.UNUSABLE
    assert f"factory: {message}" in str(refused.value)
