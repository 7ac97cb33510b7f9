"""What becomes of the answers to held-out prompts."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from asyncrl_runtime.contract.messages import EvaluationResult, encode
from asyncrl_runtime.trainer.evaluation import Evaluator
from support.messages.samples import make_sample


class Questions:
    """Answers the one question with samples of these rewards."""

    def __init__(self, *rewards: float) -> None:
        samples = tuple(make_sample(index, reward=reward) for index, reward in enumerate(rewards))
        self._answer = encode(EvaluationResult(evaluation="1-1", outcomes=samples))

    async def ask(self, key: str, payload: bytes, message_id: str) -> None:
        """There is one question."""

    async def drop_questions(self) -> None:
        """There are no others."""

    async def take(self) -> bytes:
        return self._answer

    @asynccontextmanager
    async def answers(self) -> AsyncIterator["Questions"]:
        yield self


async def nothing() -> None:
    """Wait for nobody."""


@pytest.mark.parametrize("reward", [float("nan"), 1e39])
def test_a_reward_that_is_no_number_is_a_prompt_without_an_answer(reward: float) -> None:
    evaluator = Evaluator(Questions(1.0, reward), 1, [{}, {}], lambda: 1, lambda: 0.0)
    evaluated = asyncio.run(evaluator.run(3, 8, nothing))
    assert evaluated is not None
    assert (evaluated.report.accuracy, evaluated.report.num_prompts, len(evaluated.samples)) == (0.5, 2, 1)
