"""The `Service` reward against a real HTTP server on loopback."""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from asyncrl_api.protocols import Score
from asyncrl_runtime.rollout.rewards.backend import RewardFailure
from asyncrl_runtime.rollout.rewards.frames import ScoreRequest
from asyncrl_runtime.rollout.rewards.scorer import Scorer
from asyncrl_runtime.rollout.rewards.service import RewardService
from support.jobs.job_harness import until
from support.jobs.json_service import JsonService, serving

ANSWERS: dict[str, tuple[int, str]] = {
    "number": (200, '{"reward": 1}'),
    "feedback": (200, '{"reward": 0.5, "feedback": "close", "more": [1, 2]}'),
    "error": (500, "out of order"),
    "created": (201, '{"reward": 1}'),
    "text": (200, '{"reward": "1"}'),
    "null": (200, '{"reward": null}'),
    "nan": (200, '{"reward": NaN}'),
    "infinite": (200, '{"reward": 1e999}'),
    "beyond float32": (200, '{"reward": -1e39}'),
    "missing": (200, '{"score": 1}'),
    "broken": (200, '{"reward": 1'),
    "empty": (200, ""),
}


class Service(JsonService):
    """Answers as `row.answer` says, and keeps what it was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.received: list[dict[str, Any]] = []
        self.is_over = threading.Event()

    def answer(self, body: Any) -> tuple[int, str] | None:
        self.received.append(body)
        wanted = body["row"]["answer"]
        if wanted == "slow":
            self.is_over.wait()
        return None if wanted == "hangs up" else ANSWERS.get(wanted, (200, "{}"))

    def num_calls(self) -> Counter[str]:
        return Counter(body["response"] for body in self.received)


@pytest.fixture
def service() -> Iterator[Service]:
    with serving(Service()) as service:
        yield service
        service.is_over.set()


@pytest.fixture
async def scorer(service: Service) -> AsyncIterator[Scorer]:
    async with build_scorer(service, timeout_seconds=30) as scorer:
        yield scorer


def build_scorer(service: Service, timeout_seconds: float) -> Scorer:
    return Scorer(
        RewardService(service.url, timeout_seconds=timeout_seconds), max_attempts=3, backoff_seconds=0
    )


def request(answer: str, name: str = "a") -> ScoreRequest:
    return ScoreRequest("What?", name, {"answer": answer, "level": 3})


async def test_a_service_is_sent_prompt_response_and_row(service: Service, scorer: Scorer) -> None:
    assert await scorer.score([request("number")]) == [Score(1.0)]
    assert service.received == [{"prompt": "What?", "response": "a", "row": {"answer": "number", "level": 3}}]


async def test_a_service_may_give_feedback(scorer: Scorer) -> None:
    assert await scorer.score([request("feedback")]) == [Score(0.5, "close")]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("error", "answered 500: out of order"),
        ("created", "answered 201"),
        ("text", "sent no reward: Expected `float`, got `str` - at `$.reward`"),
        ("null", "sent no reward: Expected `float`, got `null`"),
        ("nan", "sent no reward: JSON is malformed"),
        ("infinite", "sent no reward: "),
        ("beyond float32", "sent no reward: the reward is -1e+39; it must be a finite number within float32"),
        ("missing", "missing required field `reward`"),
        ("broken", "sent no reward: Input data was truncated"),
        ("empty", "sent no reward: Input data was truncated"),
        ("hangs up", "RemoteProtocolError"),
    ],
)
async def test_a_wrong_answer_is_an_error_after_all_attempts(
    service: Service, scorer: Scorer, answer: str, message: str
) -> None:
    outcomes = await scorer.score([request("number", "b"), request(answer), request("number", "c")])
    failed = outcomes.pop(1)
    assert outcomes == [Score(1.0)] * 2
    assert isinstance(failed, RewardFailure)
    assert failed.reason == "reward_error"
    assert message in failed.message
    assert service.num_calls() == {"a": 3, "b": 1, "c": 1}


async def test_a_slow_answer_is_a_timeout_after_all_attempts(service: Service) -> None:
    async with build_scorer(service, timeout_seconds=1) as scorer:
        slow, quick = await scorer.score([request("slow"), request("number", "b")])
    assert slow == RewardFailure("reward_timeout", f"no answer in 1 s from {service.url}")
    assert quick == Score(1.0)
    # A busy server reads what a client that gave up has left behind.
    await until(lambda: service.num_calls() == {"a": 3, "b": 1})


async def test_a_service_that_is_not_there_is_an_error(unused_tcp_port: int) -> None:
    url = f"http://127.0.0.1:{unused_tcp_port}"
    async with Scorer(RewardService(url, timeout_seconds=5), max_attempts=2, backoff_seconds=0) as scorer:
        (failed,) = await scorer.score([request("number")])
    assert failed == RewardFailure("reward_error", f"{url}: ConnectError: All connection attempts failed")


async def test_more_groups_than_connections_are_scored(service: Service) -> None:
    async with RewardService(service.url, timeout_seconds=30) as backend:
        groups = await asyncio.gather(*(backend.attempt([request("number")] * 8) for _ in range(10)))
    assert groups == [[Score(1.0)] * 8] * 10
