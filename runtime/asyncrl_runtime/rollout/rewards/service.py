"""The `Service` reward: an HTTP service scores the responses."""

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import aiohttp
import msgspec

from asyncrl_api.protocols import Score
from asyncrl_runtime.contract.numbers import is_usable
from asyncrl_runtime.rollout.rewards.backend import RewardFailure
from asyncrl_runtime.rollout.rewards.frames import ScoreRequest

MAX_CONCURRENT_REQUESTS = 64


class ServiceAnswer(msgspec.Struct, frozen=True):
    """The JSON that a service sends back."""

    reward: float
    feedback: str = ""

    def __post_init__(self) -> None:
        if not is_usable(self.reward):
            raise ValueError(f"the reward is {self.reward}; it must be a finite number within float32")


class RewardService:
    """POSTs `{prompt, response, row}` as JSON to `url`, once for each response, concurrently."""

    def __init__(self, url: str, *, timeout_seconds: float) -> None:
        self._url = url
        self._timeout_seconds = timeout_seconds
        # The time that a request waits for its turn is not the service's time.
        self._turns = asyncio.Semaphore(MAX_CONCURRENT_REQUESTS)

    async def __aenter__(self) -> Self:
        # `_score` has the deadline. A proxy of the environment is meant for services outside.
        self._client = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None), trust_env=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def attempt(self, requests: Sequence[ScoreRequest]) -> list[Score | RewardFailure]:
        """Score each response once, in order."""
        return await asyncio.gather(*map(self._score, requests))

    async def _score(self, request: ScoreRequest) -> Score | RewardFailure:
        try:
            body = msgspec.json.encode(
                {"prompt": request.prompt, "response": request.response, "row": request.row}
            )
        except (TypeError, ValueError) as error:
            return RewardFailure("reward_error", f"the row cannot be sent as JSON: {error}")
        headers = {"Content-Type": "application/json"}
        try:
            async with (
                self._turns,
                asyncio.timeout(self._timeout_seconds),
                self._client.post(self._url, data=body, headers=headers, allow_redirects=False) as answer,
            ):
                content = await answer.read()
        except TimeoutError:
            return RewardFailure(
                "reward_timeout", f"no answer in {self._timeout_seconds:g} s from {self._url}"
            )
        except (aiohttp.ClientError, OSError) as error:
            return RewardFailure("reward_error", f"{self._url}: {type(error).__name__}: {error}")
        said = content.decode(errors="replace")[:200]
        if answer.status != 200:
            return RewardFailure("reward_error", f"{self._url} answered {answer.status}: {said}")
        try:
            score = parse_score(content)
        except ValueError as error:
            return RewardFailure("reward_error", f"{self._url} sent no reward: {error}: {said}")
        return Score(score.reward, score.feedback)


def parse_score(content: bytes) -> ServiceAnswer:
    """Return what a service answered.

    Raises:
        ValueError: it is no score.
    """
    try:
        return msgspec.json.decode(content, type=ServiceAnswer)
    except RecursionError as error:
        raise ValueError(str(error)) from error
