"""The operator killed after each of its writes: the next one comes to the same end, nothing is done twice.

The operator dies after the API server has carried out a write and before it has read the answer. Another one
without any memory then goes on. tests/cluster does the same on a real control plane.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from asyncrl_operator.resources import Json
from asyncrl_runtime.simulation.virtual_time import run_virtually
from support.cluster.api_calls import Request
from support.cluster.memory_api_client import MemoryResponse, Send
from support.cluster.whole_operator import World, running_world

MAX_WRITES = 80


@dataclass
class Death:
    """The death of an operator after a number of writes."""

    after: int
    num_writes: int = 0

    def __post_init__(self) -> None:
        self.has_come = asyncio.Event()

    async def on_the_way(self, request: Request, send: Send) -> MemoryResponse:
        if self.has_come.is_set():
            await asyncio.Event().wait()  # nothing that the dead one began goes on
        response = await send(request)
        self.num_writes += request.verb != "GET"
        if self.num_writes == self.after:
            self.has_come.set()
            await asyncio.Event().wait()
        return response


async def mortal(world: World, after: int, act: Callable[[World], Awaitable[None]]) -> bool:
    """Let something happen while the operator dies after a number of writes; return whether it did die."""
    on_the_way, death = world.on_the_way, Death(after)

    async def kill() -> None:
        await death.has_come.wait()
        world.on_the_way = on_the_way
        await world.restart()

    killer = asyncio.create_task(kill())
    world.on_the_way = death.on_the_way
    await act(world)
    if not death.has_come.is_set():
        killer.cancel()
    await asyncio.gather(killer, return_exceptions=True)
    world.on_the_way = on_the_way
    return death.has_come.is_set()


async def comes_up(world: World) -> None:
    world.create_job()
    await world.until(lambda: world.is_up and world.condition("Running") == "True/Running")


async def suspends_and_resumes(world: World) -> None:
    world.edit_job(suspend=True)
    await world.until(lambda: world.condition("Suspended") == "True/Suspended")
    world.edit_job(suspend=False)
    await world.until(lambda: world.is_up and world.condition("Running") == "True/Running")


def test_a_kill_after_any_write_changes_nothing_in_the_end() -> None:
    async def one(after: int) -> tuple[Json, bool]:
        async with running_world() as world:
            was_killed = await mortal(world, after, comes_up)
            return world.outcome(), was_killed

    async def every_kill() -> int:
        expected, _ = await one(MAX_WRITES)
        for after in range(1, MAX_WRITES):
            found, was_killed = await one(after)
            assert found == expected, f"killed after write {after}"
            if not was_killed:
                return after - 1
        raise AssertionError("it never stops writing")

    assert 20 < run_virtually(every_kill()) < 40


def test_nor_does_one_while_a_job_is_suspended_and_resumes() -> None:
    """This is repeated in one world, with one more write before each kill."""

    async def every_kill() -> int:
        async with running_world() as world:
            await comes_up(world)
            before = world.outcome()
            for after in range(1, MAX_WRITES):
                made = len(world.made())
                was_killed = await mortal(world, after, suspends_and_resumes)
                what, found = f"killed after write {after}", world.outcome()
                attempt = before["attempt"] | {"number": after + 1}
                assert found["attempt"] == attempt, what
                assert (found["phase"], found["groups"]) == (before["phase"], before["groups"]), what
                assert len(world.made()) == made + 5, f"{what}: a Job and four pods, each once"
                if not was_killed:
                    return after - 1
            raise AssertionError("it never stops writing")

    assert run_virtually(every_kill()) > 15
