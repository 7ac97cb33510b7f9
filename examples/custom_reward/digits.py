"""Your own reward: partial credit for a sum. It runs in a process of its own and may be slow or fail."""

from collections.abc import Mapping
from typing import Any


def score(prompt: str, response: str, row: Mapping[str, Any]) -> float:
    """Return the share of digits that are right, counted from the last one; only the right sum gets 1."""
    answer = str(row["answer"])
    pairs = zip(reversed(answer), reversed(response), strict=False)
    right = sum(expected == given for expected, given in pairs)
    return right / max(len(answer), len(response))
