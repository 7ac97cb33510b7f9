"""The version is written in one place, and in the chart and the changelog, which cannot read it there."""

import re
from importlib.metadata import version

from asyncrl_api import __version__
from support.paths import CHART, ROOT, files_of_the_checkout

WRITTEN = {"crds/asyncrl_api/__init__.py", "charts/asyncrl/Chart.yaml", "CHANGELOG.md"}
OF_OTHERS = {"constraints.txt", "images/sglang-cpu/requirements.txt"}
"""Versions of other packages may happen to be the same."""


def test_the_chart_has_the_version_of_the_code() -> None:
    about = (CHART / "Chart.yaml").read_text()
    assert re.findall(r"^(?:version|appVersion): (.*)$", about, re.MULTILINE) == [__version__] * 2


def test_the_changelog_has_a_section_for_it() -> None:
    assert f"\n## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_what_is_installed_says_so() -> None:
    assert version("asyncrl") == __version__


def test_it_stands_nowhere_else() -> None:
    number = re.compile(rf"(?<![\d.]){re.escape(__version__)}(?![\d.])")
    found = {
        path for path in files_of_the_checkout() if number.search((ROOT / path).read_text(errors="replace"))
    }
    assert found - OF_OTHERS == WRITTEN
