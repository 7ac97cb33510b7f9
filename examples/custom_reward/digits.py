"""A reward of one's own: partial credit for a sum. It has a process to itself and may be slow or fail."""

from collections.abc import Mapping
from typing import Any


def score(prompt: str, response: str, row: Mapping[str, Any]) -> float:
    """Return the share of digits that are right, counted from the last one; 1 only for the right sum."""
    answer = str(row["answer"])
    pairs = zip(reversed(answer), reversed(response), strict=False)
    right = sum(expected == given for expected, given in pairs)
    return right / max(len(answer), len(response))
