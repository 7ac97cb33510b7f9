"""What a simulation has in the place of a data set, a tokenizer and a verifier."""

import asyncio
import random
import zlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from asyncrl_api.protocols import Score
from asyncrl_runtime.rollout.rewards.backend import RewardFailure
from asyncrl_runtime.rollout.rewards.frames import ScoreRequest

NUM_ROWS = 100_000
VOCABULARY_SIZE = 32_000
NUM_SPECIAL_IDS = 8
"""The ids that prompts are made of, and that no response holds."""


def make_rows(prompt_field: str, answer_field: str) -> tuple[dict[str, Any], ...]:
    """Return the rows of a data set of prompts that all differ."""
    return tuple({prompt_field: f"prompt {number}", answer_field: ""} for number in range(NUM_ROWS))


class EmulatedTokenizer:
    """Makes prompts of one length, and no text of responses."""

    eos_token_id = 1
    chat_template = None

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens

    def __len__(self) -> int:
        return VOCABULARY_SIZE

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        noise = random.Random(zlib.crc32(text.encode()))
        return [noise.randrange(2, NUM_SPECIAL_IDS) for _ in range(self._prompt_tokens)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return f"response {zlib.crc32(repr(list(ids)).encode())}"


class EmulatedReward:
    """A verifier that takes its time. Prompts are solved between never and always, all shares alike."""

    def __init__(self, seconds: float, seed: int) -> None:
        self._seconds = seconds
        self._seed = seed

    async def attempt(self, requests: Sequence[ScoreRequest]) -> list[Score | RewardFailure]:
        await asyncio.sleep(self._seconds)
        return [Score(self._reward(request)) for request in requests]

    def _reward(self, request: ScoreRequest) -> float:
        solved = random.Random(f"{self._seed}/{request.prompt}").random()
        return float(random.Random(f"{self._seed}/{request.prompt}/{request.response}").random() < solved)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass
