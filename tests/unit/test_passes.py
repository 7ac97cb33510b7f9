"""When passes run: at once or together, one per job at a time, and again after a failure. In virtual time."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from prometheus_client import generate_latest

from asyncrl_operator.api_server.api import ApiError
from asyncrl_operator.passes import GATHER_SECONDS, LOUD_FAILURES, NUM_WORKERS, PASS_SECONDS, Passes
from asyncrl_operator.telemetry import Telemetry
from asyncrl_operator.workqueue import FIRST_RETRY_SECONDS, Key, WorkQueue
from asyncrl_runtime.simulation.virtual_time import run_virtually

ONE, OTHER = Key("team", "one"), Key("team", "other")


@dataclass
class Scene:
    """Passes, and when each began, in seconds from the start."""

    passes: Passes
    telemetry: Telemetry
    began: list[tuple[str, float]] = field(default_factory=list)
    outcome: Callable[[Key], Awaitable[float | None]] | None = None
    """What a pass does; None: nothing, and it need not be looked again."""

    async def reconcile(self, key: Key) -> float | None:
        self.began.append((key.name, round(asyncio.get_running_loop().time(), 3)))
        return await self.outcome(key) if self.outcome is not None else None

    def times(self, key: Key) -> list[float]:
        return [at for name, at in self.began if name == key.name]


def in_scene(play: Callable[[Scene], Awaitable[None]]) -> None:
    """Run passes for as long as something is played."""

    async def whole() -> None:
        telemetry = Telemetry()
        passes = Passes(WorkQueue(), telemetry, asyncio.get_running_loop().time)
        scene = Scene(passes, telemetry)
        running = asyncio.create_task(passes.run(scene.reconcile))
        try:
            await play(scene)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    run_virtually(whole())


def test_news_that_come_together_are_one_pass() -> None:
    async def play(scene: Scene) -> None:
        for _ in range(3):
            scene.passes.wake(ONE)
            await asyncio.sleep(GATHER_SECONDS / 4)
        await asyncio.sleep(10)
        assert scene.began == [("one", GATHER_SECONDS)]

    in_scene(play)


def test_a_job_that_its_user_has_changed_is_looked_at_at_once() -> None:
    async def play(scene: Scene) -> None:
        scene.passes.wake(ONE)
        scene.passes.wake(ONE, at_once=True)
        await asyncio.sleep(10)
        assert scene.began == [("one", 0.0)]

    in_scene(play)


def test_a_pass_says_when_to_look_again() -> None:
    async def play(scene: Scene) -> None:
        async def in_an_hour(key: Key) -> float | None:
            return 3600.0 if len(scene.began) == 1 else None

        scene.outcome = in_an_hour
        scene.passes.wake(ONE, at_once=True)
        await asyncio.sleep(7200)
        assert scene.times(ONE) == [0.0, 3600.0]

    in_scene(play)


def test_a_job_has_one_pass_at_a_time_and_news_during_it_bring_another() -> None:
    async def play(scene: Scene) -> None:
        async def slow(key: Key) -> None:
            await asyncio.sleep(5)

        scene.outcome = slow
        scene.passes.wake(ONE, at_once=True)
        await asyncio.sleep(1)
        scene.passes.wake(ONE, at_once=True)
        scene.passes.wake(OTHER, at_once=True)
        await asyncio.sleep(1)
        assert scene.passes.longest_pass_seconds() == 2.0
        await asyncio.sleep(18)
        assert scene.times(ONE) == [0.0, 5.0] and scene.times(OTHER) == [1.0]
        assert scene.passes.longest_pass_seconds() == 0.0

    in_scene(play)


def test_so_many_passes_run_at_once_and_no_more() -> None:
    async def play(scene: Scene) -> None:
        async def slow(key: Key) -> None:
            await asyncio.sleep(5)

        scene.outcome = slow
        for number in range(NUM_WORKERS + 1):
            scene.passes.wake(Key("team", f"job-{number}"), at_once=True)
        await asyncio.sleep(20)
        assert [at for _, at in scene.began] == [0.0] * NUM_WORKERS + [5.0]

    in_scene(play)


@pytest.mark.parametrize(
    ("error", "delay", "reason"),
    [
        (ApiError(409, "Conflict", "changed"), FIRST_RETRY_SECONDS, "Conflict"),
        (ApiError(503, "", "away"), FIRST_RETRY_SECONDS, "503"),
        (ApiError(429, "TooManyRequests", "later", retry_after_seconds=7), 7.0, "TooManyRequests"),
        (KeyError("a mistake of ours"), FIRST_RETRY_SECONDS, "KeyError"),
    ],
)
def test_a_pass_that_fails_is_tried_again_and_holds_up_no_other(
    error: Exception, delay: float, reason: str
) -> None:
    async def play(scene: Scene) -> None:
        async def fails_once(key: Key) -> None:
            if key == ONE and len(scene.times(ONE)) == 1:
                raise error

        scene.outcome = fails_once
        scene.passes.wake(ONE, at_once=True)
        scene.passes.wake(OTHER, at_once=True)
        await asyncio.sleep(60)
        assert scene.times(ONE) == [0.0, delay] and scene.times(OTHER) == [0.0]
        shown = generate_latest(scene.telemetry.registry).decode()
        assert f'asyncrl_reconcile_errors_total{{reason="{reason}"}} 1.0' in shown

    in_scene(play)


def test_a_pass_that_does_not_end_is_given_up() -> None:
    async def play(scene: Scene) -> None:
        async def hangs_once(key: Key) -> None:
            if len(scene.began) == 1:
                await asyncio.sleep(10_000)

        scene.outcome = hangs_once
        scene.passes.wake(ONE, at_once=True)
        await asyncio.sleep(300)
        assert scene.times(ONE) == [0.0, PASS_SECONDS + FIRST_RETRY_SECONDS]

    in_scene(play)


def test_failures_in_a_row_come_ever_more_seldom_and_get_loud(caplog: pytest.LogCaptureFixture) -> None:
    async def play(scene: Scene) -> None:
        async def fails(key: Key) -> None:
            raise ApiError(500, "InternalError", "no")

        scene.outcome = fails
        scene.passes.wake(ONE, at_once=True)
        await asyncio.sleep(9)
        scene.passes.wake(ONE, at_once=True)  # news do not shorten the wait of a pass that failed
        await asyncio.sleep(21)
        assert scene.times(ONE) == [0.0, 0.5, 1.5, 3.5, 7.5, 15.5]

    in_scene(play)
    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING"] * (LOUD_FAILURES - 1) + ["ERROR"] * 2
