"""The `Service` reward: an HTTP service scores the responses."""

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import httpx
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
        limits = httpx.Limits(max_connections=MAX_CONCURRENT_REQUESTS)
        self._client = httpx.AsyncClient(timeout=None, limits=limits)  # noqa: S113  # `_score` has the deadline

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.__aexit__(kind, error, trace)

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
        try:
            async with self._turns, asyncio.timeout(self._timeout_seconds):
                answer = await self._client.post(
                    self._url, content=body, headers={"Content-Type": "application/json"}
                )
        except TimeoutError:
            return RewardFailure(
                "reward_timeout", f"no answer in {self._timeout_seconds:g} s from {self._url}"
            )
        except httpx.HTTPError as error:
            return RewardFailure("reward_error", f"{self._url}: {type(error).__name__}: {error}")
        if answer.status_code != 200:
            return RewardFailure(
                "reward_error", f"{self._url} answered {answer.status_code}: {answer.text:.200}"
            )
        try:
            score = parse_score(answer.content)
        except ValueError as error:
            return RewardFailure("reward_error", f"{self._url} sent no reward: {error}: {answer.text:.200}")
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
