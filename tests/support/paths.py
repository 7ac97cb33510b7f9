"""Where things are in the checkout."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "asyncrl"
EXAMPLES = ROOT / "examples"
USER_CODE = ROOT / "tests" / "support" / "user_code"
"""On the import path of jobs under test, as what lies beside a manifest is."""
