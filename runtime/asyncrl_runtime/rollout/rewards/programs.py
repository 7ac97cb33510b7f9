"""The `Code` reward: the program in a response is run against the tests in its row."""

import re
import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from asyncrl_api.protocols import Row, Score
from asyncrl_runtime.rollout.rewards.sandbox import Sandbox

_PYTHON_BLOCK = re.compile(r"```(?:python3?|py)[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


class Case(NamedTuple):
    """One run of a program, which must exit with status 0 and print what `accepts` accepts."""

    program: str
    stdin: str
    accepts: Callable[[str], bool]


class ProgramTests:
    """The reward `Code`: 1 if the program passes all tests, else 0.

    A program that fails, is killed or takes too long has failed its test; there is no reward only if the
    sandbox itself fails. The feedback names the first test that failed, but neither what it checks nor what
    it expects: a policy that knew would write that down instead of a program.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self.sandbox = Sandbox.strongest()
        self._timeout_seconds = timeout_seconds

    def __call__(self, prompt: str, response: str, row: Row, /) -> Score:
        cases = build_cases(extract_program(response), row["tests"])
        deadline = time.monotonic() + self._timeout_seconds  # for all tests together
        for number, case in enumerate(cases, start=1):
            left = max(deadline - time.monotonic(), 0.001)
            run = self.sandbox.run(case.program, case.stdin, timeout_seconds=left)
            failure = run.failure or ("" if case.accepts(run.output) else "wrong output")
            if failure:
                return Score(0.0, f"Test {number} of {len(cases)} failed: {failure}")
        return Score(1.0, f"All tests passed ({len(cases)}).")


def extract_program(response: str) -> str:
    """Return the last Python block of a response, closed or cut off; the whole response if it has none."""
    blocks: list[str] = _PYTHON_BLOCK.findall(response)
    return blocks[-1] if blocks else response


def build_cases(program: str, tests: str | list[dict[str, Any]]) -> list[Case]:
    """Return the runs that `tests`, the row's field of that name, ask for.

    Args:
        tests: assertions, which are run after the program; or inputs with the outputs that they should give,
            as `[{"input": str, "output": str}]`, which are compared word by word.

    Raises:
        ValueError: there are no tests.
    """
    if not tests:
        raise ValueError("the row's tests are empty")
    if isinstance(tests, str):
        # A program that ends early has not passed. One that looks for the token in its own file could print
        # it: assertions share a process with what they check; inputs and outputs do not.
        token = secrets.token_hex(16)
        return [Case(f"{program}\n\n{tests}\n\nprint({token!r})\n", "", lambda output: token in output)]
    return [Case(program, test["input"], partial(has_same_words, test["output"])) for test in tests]


def has_same_words(expected: str, output: str) -> bool:
    return expected.split() == output.split()
