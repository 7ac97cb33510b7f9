"""README names one page or file to open first for each question of a newcomer, and the answer is there."""

import re

import pytest

from support.paths import ROOT

ANSWERS = {
    "staleness": ["def assess", "max_versions"],
    "a reward": [
        "### A reward",
        "### A loss",
        "### An engine",
        "### A data source",
        "### A field of the spec",
    ],
    "an engine dies": ["rollout/engine_monitor.py", "transport/resume_points.py"],
    "the trainer dies": ["decide/attempts.py", "history/ledger_writer.py"],
    "a node dies": ["decide/rolling.py"],
    "field of the spec reach": ["run_config.py", "render/manifests.py", "trainer/assemble.py"],
}
"""A word of each question, and what the page or file that its answer's first link leads to must contain."""


def first_links() -> dict[str, str]:
    """Return question -> target of the first link in its answer."""
    table = (ROOT / "README.md").read_text().partition("| question | open first |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ([^|]+\?) \| ([^|]+) \|$", table, re.MULTILINE)
    return {question: re.findall(r"\]\(([^)]+)\)", answer)[0] for question, answer in rows}


def text_at(link: str) -> str:
    """Return the file that a link leads to; with an anchor, what stands under that heading."""
    path, _, anchor = link.partition("#")
    text = (ROOT / path).read_text()
    if not anchor:
        return text
    heading = next(
        match
        for match in re.finditer(r"^(#+) (.+)$", text, re.MULTILINE)
        if re.sub(r"[^\w\- ]", "", match[2].lower()).replace(" ", "-") == anchor
    )
    end = re.search(rf"^#{{1,{len(heading[1])}}} ", text[heading.end() :], re.MULTILINE)
    return text[heading.end() :][: end.start() if end else None]


@pytest.mark.parametrize("word", ANSWERS)
def test_a_question_is_answered_where_the_table_says(word: str) -> None:
    [link] = [link for question, link in first_links().items() if word in question]
    section = text_at(link)
    assert [needed for needed in ANSWERS[word] if needed not in section] == []


def test_every_question_names_something_to_open() -> None:
    assert len(first_links()) == 9
