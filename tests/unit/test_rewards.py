"""The parts of the rewards that are functions of their arguments."""

import math
import re
import signal
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from asyncrl_api.job import RewardSpec
from asyncrl_api.protocols import Score
from asyncrl_runtime.rollout.rewards.frames import Scored
from asyncrl_runtime.rollout.rewards.pool import describe_end
from asyncrl_runtime.rollout.rewards.process import describe, parse_result
from asyncrl_runtime.rollout.rewards.programs import build_cases, extract_program
from asyncrl_runtime.rollout.rewards.reward_types import REWARD_TYPES, ProcessReward, process_reward
from asyncrl_runtime.rollout.rewards.sandbox import explain
from asyncrl_runtime.rollout.rewards.verifiers import as_latex
from support.manifests.api_values import values_of


@pytest.mark.parametrize(
    ("result", "score"),
    [
        (0.5, Score(0.5)),
        (1, Score(1.0)),
        (True, Score(1.0)),
        (Fraction(1, 4), Score(0.25)),
        (np.float32(0.5), Score(0.5)),
        (Score(0.5, "close"), Score(0.5, "close")),
        ((0, "far"), Score(0.0, "far")),
    ],
)
def test_a_reward_may_return_a_number_or_a_number_and_a_text(result: object, score: Score) -> None:
    assert parse_result(result) == score


@pytest.mark.parametrize(
    "result", [None, "1.0", [1.0], (1.0,), (1.0, None), (1.0, "a", "b"), ("a", 1.0), 1j, Decimal(1)]
)
def test_anything_else_is_an_error_that_shows_it(result: object) -> None:
    with pytest.raises(TypeError, match="not a number"):
        parse_result(result)


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf, 1e39])
def test_a_reward_that_is_not_finite_cannot_be_sent(reward: float) -> None:
    with pytest.raises(ValueError, match=re.escape(str(reward))):
        Scored(reward, "")


def test_an_error_is_described_in_one_line_with_its_place() -> None:
    def fail() -> None:
        raise ValueError("first line\nsecond line")

    with pytest.raises(ValueError) as caught:
        fail()
    text = describe(caught.value)
    assert text.startswith("ValueError: first line second line (")
    assert text.endswith(f"test_rewards.py:{caught.traceback[-1].lineno + 1})")


def test_an_error_whose_text_cannot_be_had_or_sent_is_described_all_the_same() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert "Mute" in describe(Mute())
    assert describe(ValueError("\udc80")) == "ValueError: ?"


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (3, "ended with status 3"),
        (128 + signal.SIGSEGV, "was killed by signal 11 (Segmentation fault)"),
        (255, "ended with status 255"),
        (-9, "ended with status -9"),
    ],
)
def test_the_end_of_a_process_is_told_in_words(status: int, text: str) -> None:
    assert describe_end(status) == text


def test_every_reward_of_the_api_is_registered() -> None:
    assert set(REWARD_TYPES) == values_of(RewardSpec, "type")


def test_only_a_users_function_sees_the_variables_of_the_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    in_processes = {name: each for name, each in REWARD_TYPES.items() if isinstance(each, ProcessReward)}
    seen = {name for name, each in in_processes.items() if "HF_TOKEN" in each.environment()}
    assert len(in_processes) > 1 and seen == {"Function"}


def test_a_reward_that_limits_its_programs_itself_gets_time_around_them() -> None:
    assert process_reward("Code").spare_seconds > 0
    assert process_reward("Function").spare_seconds == 0


def test_a_reward_that_no_process_holds_is_refused_by_its_name() -> None:
    for name in ("Service", "Maths"):
        with pytest.raises(ValueError, match=f"reward.type {name} is not one"):
            process_reward(name)


@pytest.mark.parametrize(
    ("answer", "latex"),
    [
        (42, "$42$"),
        (0.5, "$0.5$"),
        (1e-7, "$0.0000001$"),
        ("1,234.5", "$1234.5$"),
        ("-3", "$-3$"),
        ("She sold 48/2 = 24.\n#### 72", "$72$"),
        ("#### 1,000", "$1000$"),
        (r"2\sqrt{3}", r"$2\sqrt{3}$"),
        ("(1, 2)", "$(1, 2)$"),
        (r"$\frac{1}{2}$", r"$\frac{1}{2}$"),
        (r"so \boxed{7}", r"so \boxed{7}"),
        (r"\(x+1\)", r"\(x+1\)"),
    ],
)
def test_a_reference_answer_is_read_as_a_whole(answer: object, latex: str) -> None:
    assert as_latex(answer) == latex


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("x = 1", "x = 1"),
        ("Like so:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```py\nx = 1\n```\nBetter:\n```Python3\nx = 2\n```\n", "x = 2\n"),
        ("```python\nx = 1\n```\nIt prints\n```\n1\n```", "x = 1\n"),
        ("```python\nx = 1\ny =", "x = 1\ny ="),
        ("```\nx = 1\n```", "```\nx = 1\n```"),
    ],
)
def test_the_program_is_the_last_python_block(response: str, program: str) -> None:
    assert extract_program(response) == program


def test_assertions_run_behind_the_program_and_pass_only_if_their_end_is_reached() -> None:
    (case,) = build_cases("def f(): return 1", "assert f() == 1")
    assert case.program.startswith("def f(): return 1\n\nassert f() == 1\n\nprint(")
    printed = case.program.partition("print('")[2].partition("'")[0]
    assert case.accepts(f"noise {printed}\n")
    assert not case.accepts("")


def test_outputs_are_compared_word_by_word() -> None:
    tests = [{"input": "1 2", "output": "3 4\n5\n"}, {"input": "", "output": ""}]
    first, second = build_cases("", tests)
    assert first.stdin == "1 2"
    assert first.accepts("3  4\n5")
    assert not first.accepts("3 45")
    assert second.accepts(" \n")
    assert not second.accepts("0")


@pytest.mark.parametrize("tests", ["", []])
def test_a_row_without_tests_is_an_error_not_a_pass(tests: str | list[dict[str, str]]) -> None:
    with pytest.raises(ValueError, match="empty"):
        build_cases("x = 1", tests)


@pytest.mark.parametrize(
    ("code", "errors", "text"),
    [
        (0, "a warning", ""),
        (1, "Traceback\n  ...\nNameError: x\n", "exit status 1: NameError: x"),
        (3, "", "exit status 3"),
        (-9, "", "killed by signal 9 (Killed)"),
    ],
)
def test_a_program_that_failed_is_told_by_signal_or_last_words(code: int, errors: str, text: str) -> None:
    assert explain(code, errors) == text
