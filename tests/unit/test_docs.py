"""What docs/kubernetes.md says of reasons is what the operator gives."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NO_FAULT = {"Complete", "Running", "Suspended", "Suspending", "ConfigChanged", "Resized"}
"""What a job comes to by itself or by an edit."""
IN_TWO_STEPS = {"ImagePull", "PodsRefused"}
"""Reasons that the code chooses before it says them."""


def reasons_given() -> set[str]:
    code = "\n".join(path.read_text() for path in (ROOT / "operator" / "asyncrl_operator").rglob("*.py"))
    found = re.findall(r'\b(?:Problem|Ended|_disruption)\(\s*"([A-Z]\w+)"', code)
    found += re.findall(r'\bStanding\(\s*"\w+", "([A-Z]\w+)"', code)
    assert all(f'"{reason}"' in code for reason in IN_TWO_STEPS)
    return {*found, *IN_TWO_STEPS} - NO_FAULT


def test_each_reason_has_its_remedy() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    told = {reason for row in rows for reason in re.findall(r"`([A-Z]\w+)`", row.split("|")[1])}
    conditions = {"Ready", "Reconciling", "Stalled", "Running", "Degraded", "Suspended", "Complete", "Failed"}
    assert told - conditions - {"Finished"} == reasons_given()
