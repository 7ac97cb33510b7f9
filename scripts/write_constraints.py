"""Writes constraints.txt, the versions that the tests run with, from pip's own resolution; names no host.

pip install --dry-run --ignore-installed --report REPORT --editable '.[local,dev,docs,hub]'
python scripts/write_constraints.py REPORT > constraints.txt
"""

import json
import sys
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet

HEADER = """\
# The versions that the tests ran with, on Python 3.11 and Linux; pyproject.toml has the floors.
# `make constraints` writes this file anew. SGLang's environment has pins of its own: images/sglang-cpu."""
OURS = "asyncrl"
# The oldest Python that must be able to install them: Debian 12 has it.
OLDEST_PYTHON = "3.11.2"


def constraint_lines(report: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return `name==version` for each distribution, without a local version (`+cpu`), which names a build.

    Raises:
        SystemExit: one of them refuses `OLDEST_PYTHON`; pip would then find no version that fits.
    """
    metadata = [each["metadata"] for each in report["install"]]
    for each in metadata:
        if OLDEST_PYTHON not in SpecifierSet(each.get("requires_python", "")):
            raise SystemExit(
                f"{each['name']} {each['version']} needs Python {each['requires_python']}, and all must be "
                f"installable on {OLDEST_PYTHON}: set an upper bound for it in pyproject.toml"
            )
    found = {each["name"]: each["version"] for each in metadata}
    return sorted(f"{name}=={version.partition('+')[0]}" for name, version in found.items() if name != OURS)


if __name__ == "__main__":
    print(HEADER, *constraint_lines(json.loads(Path(sys.argv[1]).read_text())), sep="\n")
