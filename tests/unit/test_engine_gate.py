"""The gate: generations pass together, updates alone or in a pause."""

import asyncio
from collections.abc import Awaitable

import pytest

from asyncrl_runtime.engine.gate import Gate


async def is_blocked(awaitable: "asyncio.Future[None]") -> bool:
    """Whether it is still waiting after everything that can run has run."""
    for _ in range(5):
        await asyncio.sleep(0)
    return not awaitable.done()


def start(awaitable: Awaitable[None]) -> "asyncio.Future[None]":
    return asyncio.ensure_future(awaitable)


async def write(gate: Gate, until: asyncio.Event) -> None:
    async with gate.writing():
        await until.wait()


async def test_a_writer_waits_for_readers_and_holds_up_new_ones() -> None:
    gate, done = Gate(), asyncio.Event()
    await gate.enter()
    writer = start(write(gate, done))
    assert await is_blocked(writer)
    late = start(gate.enter())
    assert await is_blocked(late)
    gate.leave()
    done.set()
    await writer
    await late
    assert gate.num_readers == 1


async def test_writers_follow_one_another() -> None:
    gate, first, second = Gate(), asyncio.Event(), asyncio.Event()
    one, two = start(write(gate, first)), start(write(gate, second))
    second.set()
    assert await is_blocked(two)
    first.set()
    await one
    await two


async def test_a_pause_holds_readers_and_lets_writers_pass() -> None:
    gate, done = Gate(), asyncio.Event()
    await gate.enter()
    gate.pause()
    held = start(gate.enter())
    assert await is_blocked(held)
    done.set()
    await write(gate, done)
    gate.resume()
    await held
    assert gate.num_readers == 2


async def test_whoever_gives_up_waiting_leaves_no_trace() -> None:
    gate, done = Gate(), asyncio.Event()
    gate.pause()
    held = start(gate.enter())
    assert await is_blocked(held)
    held.cancel()
    gate.resume()
    await gate.enter()
    writer = start(write(gate, done))
    assert await is_blocked(writer)
    writer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writer
    await gate.enter()
    assert gate.num_readers == 2


async def test_waiting_for_readers() -> None:
    gate = Gate()
    await gate.enter()
    waiting = start(gate.wait_for_readers())
    assert await is_blocked(waiting)
    gate.leave()
    await waiting
