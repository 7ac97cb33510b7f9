"""Your own data set: functions that the policy must write, each with the tests that its program must pass."""

import random
from collections.abc import Iterable
from typing import Any

from asyncrl_examples.quickstart import is_held_out


def rows(*, split: str, seed: int) -> Iterable[dict[str, Any]]:
    """Return `f(x) = a * x + b` for all digits a and b; a tenth of them is held out."""
    chosen = [(a, b) for a in range(10) for b in range(10) if is_held_out(a, b) == (split != "train")]
    random.Random(seed).shuffle(chosen)
    return [{"question": f"f(x) = {a} * x + {b}", "tests": _tests(a, b)} for a, b in chosen]


def _tests(a: int, b: int) -> str:
    return "\n".join(f"assert f({x}) == {a * x + b}" for x in (0, 1, 7))
