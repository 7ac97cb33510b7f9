"""Whatever file a comment, a docstring or a page of the docs names is there; so is what a page links to."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from support.paths import ROOT, files_of_the_checkout

FILES = files_of_the_checkout()
OF_THE_PAST = {"docs/renames.md", "CHANGELOG.md"}
"""Pages that name files as they were."""
NAMED = re.compile(r"(?<![\w/])(?:[\w.-]+/)*[\w-]+\.(?:py|md)\b")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PAGES = [path for path in FILES if path.endswith(".md")]
SOURCES = [
    path
    for path in FILES
    if path.endswith((".py", ".yaml", ".lua", ".tpl", "Makefile", "Dockerfile", "pyproject.toml", ".ci/run"))
]


ENDS = {path[start:] for path in FILES for start in [0, *(m.end() for m in re.finditer("/", path))]}
"""Every path, and every part of it that begins after a slash."""


def is_there(name: str) -> bool:
    """Whether there is a file whose path is this or ends with this."""
    return re.sub(r"^(\.\.?/)+", "", name) in ENDS


def prose(source: str) -> Iterator[str]:
    """Yield the comments of a module and every string that stands alone, as docstrings do."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield str(node.value.value)


def missing(path: str) -> list[str]:
    """Return the files that the prose of `path` names and that are not there."""
    text = (ROOT / path).read_text()
    if path.endswith(".py") and NAMED.search(text):
        text = "\n".join(prose(text))
    return sorted({name for name in NAMED.findall(text) if not is_there(name)})


def test_a_file_that_is_not_there_would_be_noticed(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('"""See train.py."""\n\nX = "no_file.py"\n"""As gone.py says."""\n# lost/away.md\n')
    assert missing(str(module)) == ["gone.py", "lost/away.md"]


def test_what_is_named_is_there() -> None:
    pages = [page for page in PAGES if page not in OF_THE_PAST]
    assert len(SOURCES) > 200 and len(pages) > 15
    assert {path: found for path in (*SOURCES, *pages) if (found := missing(path))} == {}


def test_new_names_of_what_was_renamed_are_there() -> None:
    rows = re.findall(r"^\| `[^`]+` .*\| (`.*) \|$", (ROOT / "docs" / "renames.md").read_text(), re.MULTILINE)
    assert len(rows) > 100
    assert [name for row in rows for name in NAMED.findall(row) if not is_there(name)] == []


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(path: str) -> list[str]:
    """Return the links of a page that lead to no file, folder or heading."""
    page, broken = ROOT / path, []
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        found = (page.parent / target).resolve() if target else page
        if not found.exists() or (anchor and anchor not in anchors(found)):
            broken.append(link)
    return broken


def test_links_lead_somewhere() -> None:
    assert {path: found for path in PAGES if (found := broken_links(path))} == {}


def test_a_link_that_leads_nowhere_would_be_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A title\n\n[1](page.md) [2](#a-title) [3](gone.md) [4](page.md#gone) [5](https://x.org)\n"
    )
    assert broken_links(str(page)) == ["gone.md", "page.md#gone"]
