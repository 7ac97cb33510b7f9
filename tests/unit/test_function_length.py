"""A function fits a screen."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST_LINES = 60
FOLDERS = ("charts", "crds", "examples", "operator", "runtime", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def too_long(source: str) -> Iterator[str]:
    """Name the functions of more than MOST_LINES lines, signature, docstring and inner functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            if lines > MOST_LINES:
                yield f"{node.name} (line {node.lineno}) has {lines} lines"


@pytest.mark.parametrize("keyword", ["def", "async def"])
def test_one_line_too_many_is_noticed(keyword: str) -> None:
    body = "    pass\n" * (MOST_LINES - 1)
    assert list(too_long(f"class Some:\n  {keyword} fits(self):\n{body}")) == []
    assert list(too_long(f"class Some:\n  {keyword} does_not(self):\n{body}    pass\n")) == [
        "does_not (line 2) has 61 lines"
    ]


def test_no_function_is_longer_than_a_screen() -> None:
    assert len(FILES) > 100, "the folders are not where this test looks for them"
    offenders = [f"{path.relative_to(ROOT)}: {each}" for path in FILES for each in too_long(path.read_text())]
    assert offenders == []
