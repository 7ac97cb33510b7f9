"""An emulated engine: the versions that it attests, its gate, what it has when it is broken off."""

import asyncio

import pytest

from asyncrl_runtime.emulation.device import DeviceModel, load_device_model
from asyncrl_runtime.emulation.emulated_server import EmulatedAnswer, EmulatedRequest, EmulatedServer, Pace
from asyncrl_runtime.simulation.virtual_time import run_virtually

MODEL = load_device_model("areal-1.5b")
PROMPT = (2, 3, 4, 5)
LONG = 100_000


def make_server(model: DeviceModel = MODEL, token_scale: int = 1) -> EmulatedServer:
    clock = asyncio.get_running_loop().time
    return EmulatedServer(model, Pace(clock, token_scale=token_scale), vocabulary_size=1000)


async def sampled(
    server: EmulatedServer, seed: int, bound: int = LONG, earned: tuple[int, ...] = ()
) -> EmulatedAnswer:
    return await server.sample(EmulatedRequest((*PROMPT, *earned), bound, seed))


def test_the_same_seed_gives_the_same_response_alone_and_in_company() -> None:
    async def check() -> None:
        alone = await sampled(make_server(), 1)
        server = make_server()
        together = await asyncio.gather(*(sampled(server, seed) for seed in range(1, 9)))
        assert together[0].output_ids == alone.output_ids
        assert len(alone.output_ids) == MODEL.responses.length(1)
        assert {answer.finish_reason for answer in together} == {"stop"}
        assert len({tuple(answer.output_ids) for answer in together}) == 8
        assert min(alone.output_ids) >= 8, "special ids are left out"

    run_virtually(check())


def test_a_bound_cuts_the_response() -> None:
    async def check() -> None:
        whole, cut = await sampled(make_server(), 1), await sampled(make_server(), 1, bound=20)
        assert cut.output_ids == whole.output_ids[:20]
        assert cut.finish_reason == "length"

    run_virtually(check())


def test_a_response_that_was_broken_off_goes_on_where_it_was() -> None:
    async def check() -> None:
        whole, server = await sampled(make_server(), 1), make_server()
        task = asyncio.create_task(sampled(server, 1))
        await asyncio.sleep(5)
        server.abort_all()
        broken = await task
        assert broken.finish_reason == "abort"
        assert broken.output_ids == whole.output_ids[: len(broken.output_ids)] != []
        rest = await sampled(make_server(), 1, earned=tuple(broken.output_ids))
        assert [*broken.output_ids, *rest.output_ids] == whole.output_ids

    run_virtually(check())


def test_tokens_carry_the_label_under_which_they_were_sampled() -> None:
    async def check() -> None:
        server = make_server()
        server.set_label("1.0")
        task = asyncio.create_task(sampled(server, 1))
        await asyncio.sleep(5)
        server.pause(retract=True)
        await asyncio.sleep(60)
        server.set_label("1.1")
        server.resume()
        answer = await task
        (first, end_of_first), (second, end) = answer.spans
        assert (first, second, end) == ("1.0", "1.1", len(answer.output_ids))
        step = MODEL.engine.step_seconds
        assert 0 < end_of_first <= 5 / step, "nothing is sampled in the pause"
        assert end_of_first == pytest.approx(5 / step, rel=0.05)

    run_virtually(check())


def test_a_request_waits_at_the_gate_of_a_paused_engine() -> None:
    async def check() -> None:
        server = make_server()
        server.pause(retract=True)
        task = asyncio.create_task(sampled(server, 1, bound=10))
        await asyncio.sleep(100)
        assert not task.done()
        assert server.num_running == server.num_queued == 0
        server.resume()
        assert len((await task).output_ids) == 10

    run_virtually(check())


def test_whoever_leaves_takes_his_request_with_him() -> None:
    async def check() -> None:
        server = make_server()
        task = asyncio.create_task(sampled(server, 1))
        await asyncio.sleep(1)
        assert server.num_running == 1
        task.cancel()
        await asyncio.wait([task])
        assert server.num_running == 0
        assert server.num_used_tokens == 0

    run_virtually(check())


def test_a_token_that_stands_for_several_takes_as_long_as_they_do() -> None:
    async def check(scale: int) -> tuple[float, int]:
        loop = asyncio.get_running_loop()
        server = make_server(token_scale=scale)
        answer = await server.sample(EmulatedRequest(PROMPT[: 4 // scale], LONG, 1))
        return loop.time(), len(answer.output_ids)

    whole_time, whole = run_virtually(check(1))
    time, count = run_virtually(check(4))
    assert count == -(-whole // 4)
    assert time == pytest.approx(whole_time, rel=0.01)
