"""Whatever file a comment, a docstring or a page of the docs names is there; so is what a page links to."""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.paths import ROOT

FILES = sorted(
    subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
)
OF_THE_PAST = {"docs/renames.md", "CHANGELOG.md"}
"""Pages that name files as they were."""
COMING: set[str] = {
    "docs/kube-kit.md",
    "operator/asyncrl_operator/decide/reasons.py",
    "runtime/asyncrl_runtime/rollout/engine_api.py",
}
"""Named already, and written in the same release: an entry goes as soon as its file comes."""
NAMED = re.compile(r"(?<![\w/])(?:[\w.-]+/)*[\w-]+\.(?:py|md)\b")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PAGES = [path for path in FILES if path.endswith(".md")]
SOURCES = [path for path in FILES if path.endswith((".py", "Makefile", "Dockerfile", "pyproject.toml"))]


def is_there(name: str) -> bool:
    """Whether a file is called so, or one whose path ends so."""
    name = re.sub(r"^(\.\.?/)+", "", name)
    return any(path == name or path.endswith(f"/{name}") for path in (*FILES, *COMING))


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
    if path.endswith(".py"):
        text = "\n".join(prose(text))
    return sorted({name for name in NAMED.findall(text) if not is_there(name)})


def test_a_file_that_is_not_there_would_be_noticed(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('"""See train.py."""\n\nX = "no_file.py"\n"""As gone.py says."""\n# lost/away.md\n')
    assert missing(str(module)) == ["gone.py", "lost/away.md"]


@pytest.mark.parametrize("path", [*SOURCES, *(page for page in PAGES if page not in OF_THE_PAST)])
def test_what_is_named_is_there(path: str) -> None:
    assert missing(path) == []


def test_what_has_come_is_no_longer_coming() -> None:
    assert COMING.isdisjoint(FILES)


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
        is_coming = found.is_relative_to(ROOT) and str(found.relative_to(ROOT)) in COMING
        if not (found.exists() or is_coming) or (anchor and anchor not in anchors(found)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", PAGES)
def test_links_lead_somewhere(path: str) -> None:
    assert broken_links(path) == []
