"""Whatever calls of the operator fail, and whatever watches break or expire, a job comes to the same end."""

import asyncio
from collections import Counter
from typing import Any

import pytest

from asyncrl_operator.resources import ASYNCRL_JOBS, SERVICES, STATEFUL_SETS
from asyncrl_runtime.simulation.virtual_time import run_virtually
from support.cluster.api_calls import RefusalError, Request
from support.cluster.memory_api_client import MemoryResponse, Send, broken_connection, pass_on
from support.cluster.whole_operator import NAME, NAMESPACE, OnTheWay, World, running_world

ROLLOUT = f"{NAME}-rollout"
MAX_WRITES = 80


async def brought_up(on_the_way: OnTheWay) -> dict[str, Any]:
    """Return what a job comes to that is created while calls fail."""
    async with running_world(on_the_way) as world:
        world.create_job()
        await world.until(lambda: world.is_up and world.condition("Running") == "True/Running")
        return world.outcome()


class EachFailsOnce:
    """Fails every call that has not been made before: it does not arrive, or its answer is lost."""

    def __init__(self, fails: str) -> None:
        self.calls: Counter[str] = Counter()
        self._fails = fails

    async def on_the_way(self, request: Request, send: Send) -> MemoryResponse:
        call = f"{request.verb} {request.path} {request.is_watch}"
        self.calls[call] += 1
        if self.calls[call] > 1:
            return await send(request)
        if self._fails == "refused":
            return MemoryResponse.of(RefusalError(500, "InternalError", "etcdserver: leader changed"))
        if self._fails == "answer lost":
            await send(request)
        raise broken_connection()


@pytest.mark.parametrize("fails", ["not arrived", "answer lost", "refused"])
def test_calls_that_all_fail_the_first_time_change_nothing_in_the_end(fails: str) -> None:
    each = EachFailsOnce(fails)
    assert run_virtually(brought_up(each.on_the_way)) == run_virtually(brought_up(pass_on))
    assert len(each.calls) > 40


async def losing_an_answer(number: int) -> tuple[dict[str, Any], str]:
    """Return what a job comes to if the answer to one write is lost, and the write."""
    writes: list[str] = []

    async def on_the_way(request: Request, send: Send) -> MemoryResponse:
        response = await send(request)
        if request.verb != "GET":
            writes.append(f"{request.verb} {request.path}")
            if len(writes) == number:
                raise broken_connection()
        return response

    outcome = await brought_up(on_the_way)
    return outcome, writes[number - 1] if len(writes) >= number else ""


def test_an_answer_that_is_lost_after_any_write_changes_nothing_in_the_end() -> None:
    async def every_answer() -> int:
        expected = await brought_up(pass_on)
        for number in range(1, MAX_WRITES):
            found, write = await losing_an_answer(number)
            assert found == expected, f"the answer to write {number} was lost: {write}"
            if not write:
                return number - 1
        raise AssertionError("it never stops writing")

    assert run_virtually(every_answer()) > 20


async def running_job(world: World) -> None:
    world.create_job()
    await world.until(lambda: world.is_up)
    await world.until_quiet()


@pytest.mark.parametrize("how", ["broken", "expired", "expired under way"])
def test_what_happens_while_no_watch_is_there_is_seen_afterwards(how: str) -> None:
    async def play() -> None:
        async with running_world() as world:
            await running_job(world)
            lists = world.num_lists
            if how == "expired under way":  # as when the server has compacted what a watch was to go on from
                on_the_way, world.on_the_way = world.on_the_way, refuse_watches
                world.server.end_watches()
                await asyncio.sleep(10)
                world.on_the_way = on_the_way
            else:
                world.server.end_watches()
            world.edit(STATEFUL_SETS, ROLLOUT, {"spec": {"replicas": 5}})
            world.delete(SERVICES, ROLLOUT)
            if how != "broken":
                world.server.forget()
            await world.until(lambda: world.get(SERVICES, ROLLOUT), "it is made again")
            await world.until(lambda: world.get(STATEFUL_SETS, ROLLOUT)["spec"]["replicas"] == 2)
            await world.until_quiet()
            assert (world.num_lists > lists) == (how != "broken"), "all is listed anew only if it must be"
            assert world.is_up

    run_virtually(play())


async def refuse_watches(request: Request, send: Send) -> MemoryResponse:
    if request.is_watch:
        raise broken_connection()
    return await send(request)


def test_a_job_that_was_deleted_while_no_watch_was_there_is_forgotten_at_the_next_list() -> None:
    """kopf does not report this."""

    async def play() -> None:
        async with running_world() as world:
            await running_job(world)
            held = world.operator.cluster.jobs
            assert held.get(NAMESPACE, NAME) is not None
            on_the_way, world.on_the_way = world.on_the_way, refuse_watches
            world.server.end_watches()
            world.delete(ASYNCRL_JOBS, NAME)
            await asyncio.sleep(1)
            world.on_the_way = on_the_way
            await world.until(lambda: held.get(NAMESPACE, NAME) is None, "it is listed", 700)

    run_virtually(play())


def test_the_api_server_is_away_for_a_while_and_nothing_is_made_twice() -> None:
    async def play() -> None:
        async with running_world() as world:
            await running_job(world)
            before = world.outcome()

            async def nobody(request: Request, send: Send) -> MemoryResponse:
                raise broken_connection()

            on_the_way, world.on_the_way = world.on_the_way, nobody
            world.server.end_watches()
            await asyncio.sleep(120)
            world.on_the_way = on_the_way
            await world.until_quiet()
            assert world.outcome() == before and world.condition("Ready") == "True/Running"

    run_virtually(play())
