"""`Math` and `ReasoningGym`: the libraries themselves, in reward processes."""

import asyncio
import json
import sys
from typing import Any

import pytest

from asyncrl_api.protocols import Score
from asyncrl_runtime.rollout.rewards.backend import RewardFailure
from asyncrl_runtime.rollout.rewards.frames import ScoreRequest, Setup
from asyncrl_runtime.rollout.rewards.pool import RewardPool
from asyncrl_runtime.rollout.rewards.verifiers import MathAnswer

NO_ANSWER = Score(0.0, "The response holds no answer.")


def pool(kind: str, timeout_seconds: float = 30) -> RewardPool:
    setup = Setup(
        type=kind, function="", answer_field="gold", timeout_seconds=timeout_seconds, import_paths=[]
    )
    return RewardPool(setup, num_processes=1)


@pytest.fixture(scope="module")
def math_answer() -> MathAnswer:
    return MathAnswer("gold")


@pytest.mark.parametrize(
    ("gold", "response", "reward"),
    [
        (42, "The answer is 42.", 1.0),
        (42, "The answer is 43.", 0.0),
        ("42", r"Thus \boxed{42}.", 1.0),
        ("42", r"Not 42 but \boxed{41}.", 0.0),
        (0.5, r"It is $\frac{1}{2}$.", 1.0),
        ("1,000", "It costs $1000.", 1.0),
        ("He earns 9 * 2 = 18.\n#### 18", "16 - 3 - 4 = 9, and 9 * 2 = 18.\n#### 18", 1.0),
        ("He earns 9 * 2 = 18.\n#### 18", "#### 2", 0.0),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", 1.0),
        (r"2\sqrt{3}", r"\boxed{2}", 0.0),
        (r"\frac{3}{4}", r"$0.75$", 1.0),
        ("(1, 2)", r"\boxed{(1,2)}", 1.0),
        ("1e-5", "0.00001", 1.0),
    ],
)
def test_an_answer_counts_if_it_equals_the_reference(
    math_answer: MathAnswer, gold: object, response: str, reward: float
) -> None:
    assert math_answer("", response, {"gold": gold}) == reward


def test_a_response_without_an_answer_is_wrong(math_answer: MathAnswer) -> None:
    assert math_answer("", "I do not know.", {"gold": 42}) == NO_ANSWER


async def test_math_is_scored_in_a_process_and_errors_lie_with_the_row() -> None:
    rows: list[dict[str, Any]] = [{"gold": "#### 42"}, {"answer": "42"}, {"gold": ""}, {"gold": "41"}]
    async with pool("Math") as math:
        outcomes = await math.attempt([ScoreRequest("", "It is 42.", row) for row in rows])
    right, missing, empty, wrong = outcomes
    assert (right, wrong) == (Score(1.0), Score(0.0))
    assert isinstance(missing, RewardFailure)
    assert missing.message.startswith("KeyError: 'gold'")
    assert isinstance(empty, RewardFailure)
    assert empty.message.startswith("ValueError: no answer in the row's gold: ''")


async def test_an_answer_that_takes_too_long_to_compare_is_a_timeout_not_a_zero() -> None:
    requests = [ScoreRequest("", response, {"gold": 1}) for response in (r"\boxed{9^{9^{9^9}}}", "1")]
    async with pool("Math", timeout_seconds=1) as math:
        assert await math.attempt(requests) == [
            RewardFailure("reward_timeout", "no answer in 1 s"),
            Score(1.0),
        ]


MAKE_ITEMS = """
import json, sys
from reasoning_gym import create_dataset
items = [create_dataset(name, size=1, seed=3)[0] for name in ("chain_sum", "spell_backward")]
items.append(create_dataset("decimal_arithmetic", size=1, seed=3, max_num_decimal_places=2)[0])
print(json.dumps(items))
"""


MAKE_ROWS = """
import json
from reasoning_gym import create_dataset
rows = [create_dataset(name, size=1, seed=3)[0] for name in ("chain_sum", "spell_backward")]
lengths = {"min_word_length": 3, "max_word_length": 3}
ladder = create_dataset("word_ladder", size=1, seed=3, **lengths)[0]
ladder["metadata"]["dataset_parameters"] = lengths  # it looks at them when it scores
print(json.dumps([*rows, ladder]))
"""


async def test_reasoning_gym_scores_by_the_data_set_of_the_row() -> None:
    command = [sys.executable, "-c", MAKE_ROWS]
    maker = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    made, _ = await maker.communicate()
    rows: list[dict[str, Any]] = json.loads(made)
    requests = [
        *(ScoreRequest("", f"Well.\n<answer> {row['answer']} </answer> So.", row) for row in rows),
        *(ScoreRequest("", f" {row['answer']}\n", row) for row in rows),
        *(ScoreRequest("", "<answer>1</answer>", row) for row in rows),
        ScoreRequest("", "1", {"answer": "1", "metadata": {"source_dataset": "nowhere"}}),
    ]
    async with pool("ReasoningGym") as gym:
        *outcomes, unknown = await gym.attempt(requests)
    scores = [outcome.reward for outcome in outcomes if isinstance(outcome, Score)]
    assert scores[:6] == [1.0] * 6
    assert scores[6:] == [0.0] * 3
    assert isinstance(unknown, RewardFailure)
    assert unknown.message.startswith("ValueError: Dataset 'nowhere' not registered")
