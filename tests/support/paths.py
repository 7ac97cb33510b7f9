"""The paths of things in the checkout."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "asyncrl"
EXAMPLES = ROOT / "examples"
USER_CODE = ROOT / "tests" / "support" / "user_code"
"""A folder on the import path of jobs under test, just as the folder of a manifest is."""
FAULTS = ROOT / "tests" / "support" / "faults"
"""A folder that puts faults into the Python processes that start with it on their path."""


def files_of_the_checkout() -> list[str]:
    """Return the paths, below ROOT, of all files that git has or would take, in order."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted(path for path in done.stdout.splitlines() if (ROOT / path).exists())
