"""Scores responses with the manifest's reward; this is the only place that repeats what failed.

It is used like this:

    async with make_scorer(spec, answer_field="answer", import_paths=[], num_processes=4) as scorer:
        outcomes = await scorer.score([ScoreRequest(prompt, response, row), ...])
"""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from asyncrl_api.job import RewardSpec
from asyncrl_api.protocols import Score
from asyncrl_runtime.rollout.rewards.backend import Backend, RewardFailure
from asyncrl_runtime.rollout.rewards.frames import ScoreRequest, Setup
from asyncrl_runtime.rollout.rewards.pool import RewardPool
from asyncrl_runtime.rollout.rewards.reward_types import REWARD_TYPES, ProcessReward, RemoteReward

MAX_BACKOFF_SECONDS = 30.0

logger = logging.getLogger(__name__)


class Scorer:
    """Scores lists of responses, several lists at a time. Leaving it ends everything that it has started.

    What fails is tried again, together with the other failures of its list, after a pause that doubles each
    time.
    """

    def __init__(self, backend: Backend, *, max_attempts: int, backoff_seconds: float = 0.5) -> None:
        self._backend = backend
        self._max_attempts = max_attempts
        self._backoff_seconds = backoff_seconds

    async def __aenter__(self) -> Self:
        """Get ready to score.

        Raises:
            RewardNotLoaded: the reward cannot be loaded at all, so there is nothing to wait for.
        """
        await self._backend.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._backend.__aexit__(kind, error, trace)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Score | RewardFailure]:
        """Return the score of each response, in order, or the reason why its last attempt failed."""
        outcomes: dict[int, Score | RewardFailure] = {}
        pending = list(range(len(requests)))
        for attempt in range(1, self._max_attempts + 1):
            results = await self._backend.attempt([requests[i] for i in pending])
            outcomes |= zip(pending, results, strict=True)
            failures = {i: o for i, o in zip(pending, results, strict=True) if isinstance(o, RewardFailure)}
            for failure in failures.values():
                logger.warning("reward attempt %d of %d: %s: %s", attempt, self._max_attempts, *failure)
            pending = list(failures)
            if not pending:
                break
            if attempt < self._max_attempts:
                await asyncio.sleep(min(self._backoff_seconds * 2 ** (attempt - 1), MAX_BACKOFF_SECONDS))
        return [outcomes[i] for i in range(len(requests))]


def make_scorer(
    spec: RewardSpec, *, answer_field: str, import_paths: Sequence[Path], num_processes: int
) -> Scorer:
    """Return the scorer of `spec`, which must be entered.

    Args:
        answer_field: the field of a row that holds the reference answer, `spec.dataset.answerField`.
        import_paths: folders with the user's code, such as mounted ConfigMaps.
        num_processes: the number of responses that a reward in processes of this machine scores at a time.
    """
    match REWARD_TYPES[spec.type]:
        case RemoteReward(connect):
            backend = connect(spec)
        case ProcessReward():
            setup = Setup(
                type=spec.type,
                function=spec.function or "",
                answer_field=answer_field,
                timeout_seconds=spec.timeout_seconds,
                import_paths=[str(path.absolute()) for path in import_paths],
            )
            backend = RewardPool(setup, num_processes=num_processes)
    return Scorer(backend, max_attempts=spec.max_attempts)
