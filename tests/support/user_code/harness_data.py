"""Rows and a reward for jobs under test, imported by their processes by name."""

from collections.abc import Iterable, Mapping
from typing import Any


def rows(*, split: str, seed: int, size: int = 40) -> Iterable[dict[str, Any]]:
    first = 0 if split == "train" else 1000
    return [{"question": f"{first + n} + 1 =", "answer": str(first + n + 1)} for n in range(size)]


def reward(prompt: str, response: str, row: Mapping[str, Any]) -> float:
    """Return a reward that varies within a group, and that a random model can improve."""
    return float(sum(character.isdigit() for character in response)) / 4
