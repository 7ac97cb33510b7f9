"""No page of the docs is left out where a reader looks for it; what they show as YAML is YAML."""

import re
from collections.abc import Iterator
from typing import Any

from ruamel.yaml import YAML

from support.paths import ROOT

DOCS = ROOT / "docs"


def pages_in(nav: Any) -> Iterator[str]:
    """Yield the pages of the site's navigation."""
    if isinstance(nav, str):
        yield nav
    else:
        for each in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_in(each)


def pages() -> set[str]:
    return {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    config = YAML(typ="safe").load(ROOT / "mkdocs.yml")
    named = set(pages_in(config["nav"]))
    assert {page for page in named if not page.startswith("repository/")} == pages()
    assert all((ROOT / page.removeprefix("repository/")).exists() for page in named - pages())


def test_every_page_is_in_the_index_and_every_decision_in_theirs() -> None:
    index, decisions = (DOCS / "README.md").read_text(), (DOCS / "decisions" / "README.md").read_text()
    for page in pages() - {"README.md", "decisions/README.md"}:
        folder, _, name = page.rpartition("/")
        assert f"]({name})" in (decisions if folder else index), page


def test_a_decision_says_why_and_what_it_costs() -> None:
    for path in (DOCS / "decisions").glob("0*.md"):
        headings = re.findall(r"^## (.+)$", path.read_text(), re.MULTILINE)
        assert headings == ["Context", "Decision", "What decided", "Consequences"], path.name


def test_yaml_in_the_docs_is_yaml() -> None:
    blocks = [
        (path.name, block)
        for path in [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
        for block in re.findall(r"^```yaml\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    ]
    assert blocks
    for page, block in blocks:
        assert YAML(typ="safe").load(block) is not None, page
