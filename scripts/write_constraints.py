"""Writes constraints.txt, the versions that the tests run with, from pip's own resolution; names no host.

pip install --dry-run --ignore-installed --report REPORT --editable '.[local,dev,docs,hub]'
python scripts/write_constraints.py REPORT > constraints.txt
"""

import json
import sys
from pathlib import Path

HEADER = """\
# The versions that the tests ran with, on Python 3.11 and Linux; pyproject.toml has the floors.
# `make constraints` writes this file anew. SGLang's environment has pins of its own: images/sglang-cpu."""
OURS = "asyncrl"


def constraint_lines(report: dict[str, list[dict[str, dict[str, str]]]]) -> list[str]:
    """Return `name==version` for each distribution, without a local version (`+cpu`), which names a build."""
    found = {each["metadata"]["name"]: each["metadata"]["version"] for each in report["install"]}
    return sorted(f"{name}=={version.partition('+')[0]}" for name, version in found.items() if name != OURS)


if __name__ == "__main__":
    print(HEADER, *constraint_lines(json.loads(Path(sys.argv[1]).read_text())), sep="\n")
