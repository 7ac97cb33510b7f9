"""Calls made at the same time go out as one, and each caller gets its own answer."""

import asyncio
from collections.abc import Sequence

import pytest

from asyncrl_runtime.rollout.coalesce import Coalescer


class Doubler:
    """Doubles numbers, and remembers which came together."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.release: asyncio.Event | None = None

    async def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.calls.append(list(numbers))
        if self.release is not None:
            await self.release.wait()
        return [2 * number for number in numbers]


async def test_what_is_asked_at_the_same_moment_is_one_call() -> None:
    doubler = Doubler()
    together: Coalescer[int, int] = Coalescer(doubler)
    assert await asyncio.gather(*map(together, [3, 1, 2])) == [6, 2, 4]
    assert await together(5) == 10
    assert doubler.calls == [[3, 1, 2], [5]]


async def test_who_comes_later_does_not_wait_for_those_before() -> None:
    doubler, held = Doubler(), asyncio.Event()
    doubler.release = held
    together: Coalescer[int, int] = Coalescer(doubler)
    first = asyncio.create_task(together(1))
    while not doubler.calls:
        await asyncio.sleep(0)
    doubler.release = None
    assert await together(2) == 4
    assert not first.done()
    held.set()
    assert await first == 2 and doubler.calls == [[1], [2]]


async def test_everyone_gets_the_error_of_the_common_call_and_the_next_call_is_a_new_one() -> None:
    failures = [OSError("gone")]

    async def call(numbers: Sequence[int]) -> list[int]:
        if failures:
            raise failures.pop()
        return list(numbers)

    together: Coalescer[int, int] = Coalescer(call)
    results = await asyncio.gather(together(1), together(2), return_exceptions=True)
    assert [str(result) for result in results] == ["gone", "gone"]
    assert await together(3) == 3


async def test_one_who_leaves_takes_nothing_from_the_others() -> None:
    doubler = Doubler()
    doubler.release = asyncio.Event()
    together: Coalescer[int, int] = Coalescer(doubler)
    tasks = [asyncio.create_task(together(number)) for number in (1, 2, 3)]
    while not doubler.calls:
        await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.wait({tasks[1]})
    doubler.release.set()
    assert [await tasks[0], await tasks[2]] == [2, 6] and tasks[1].cancelled()


@pytest.mark.parametrize("answers", [[1], [1, 2, 3, 4]])
async def test_a_wrong_number_of_answers_is_an_error_and_nobody_waits_for_good(answers: list[int]) -> None:
    async def call(numbers: Sequence[int]) -> list[int]:
        return answers

    together: Coalescer[int, int] = Coalescer(call)
    async with asyncio.timeout(5):
        results = await asyncio.gather(*map(together, [1, 2, 3]), return_exceptions=True)
    assert {str(result) for result in results} == {f"3 were asked together, but {len(answers)} answers came"}
