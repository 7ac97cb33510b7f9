"""The interface of every kind of reward to the scorer: one attempt at each response."""

from collections.abc import Sequence
from types import TracebackType
from typing import Literal, NamedTuple, Protocol, Self

from asyncrl_api.protocols import Score
from asyncrl_runtime.rollout.rewards.frames import ScoreRequest


class RewardFailure(NamedTuple):
    """Why a response got no reward."""

    reason: Literal["reward_timeout", "reward_error"]
    message: str


class Backend(Protocol):
    """Something that scores: entering it makes it ready, leaving it ends everything that it has started."""

    async def attempt(self, requests: Sequence[ScoreRequest]) -> list[Score | RewardFailure]:
        """Score each response once, in order."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
