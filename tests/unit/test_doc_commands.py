"""Each block of commands in the docs says which test runs it, or that none does and why."""

import re
from pathlib import Path

import pytest

from support import doc_commands
from support.doc_commands import blocks_of
from support.paths import ROOT

PAGES = [
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "charts/asyncrl/README.md"),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]
BY_NAME = {"transcript": "run by tests/cluster/test_readme.py"}
"""Marks that stand for others: README's transcript also has what each command prints."""


def fault(page: str, mark: str) -> str:
    """Return what is wrong with the mark of a block; empty if it is right."""
    mark = BY_NAME.get(mark, mark)
    if re.fullmatch(r"not run: \S.*", mark):
        return ""
    runner = re.fullmatch(r"run by (\S+\.py)", mark)
    if runner is None:
        return f"{mark!r} is neither `run by FILE` nor `not run: WHY`"
    path = ROOT / runner[1]
    return (
        "" if path.exists() and Path(page).name in path.read_text() else f"{runner[1]} does not read {page}"
    )


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_who_runs_it(page: str) -> None:
    assert [found for block in blocks_of(page) if (found := fault(page, block.mark))] == []


@pytest.mark.parametrize("page", PAGES)
def test_no_commands_hide_in_an_indented_block(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.M | re.S)
    assert re.findall(r"(?<=\n\n)    \S.*", text) == []


def test_a_block_without_a_mark_and_a_false_one_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doc_commands, "ROOT", tmp_path)
    block = "```console\n$ ls\n$ cat <<END\nsome\nEND\n```\n"
    (tmp_path / "page.md").write_text(f"Text\n\n{block}\n<!-- run by tests/unit/test_docs.py -->\n{block}")
    blocks = blocks_of("page.md")
    assert [block.commands for block in blocks] == [("ls\n", "cat <<END\nsome\nEND\n")] * 2
    assert [fault("page.md", block.mark) for block in blocks] == [
        "'' is neither `run by FILE` nor `not run: WHY`",
        "tests/unit/test_docs.py does not read page.md",
    ]
