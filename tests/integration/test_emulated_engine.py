"""Emulated engines behind HTTP, asked by the client that the worker has."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
import pytest
import uvicorn

from asyncrl_api.processes import bind
from asyncrl_runtime.contract.messages import BucketLayout, JoinGroup, PolicyVersion
from asyncrl_runtime.emulation.device import load_device_model
from asyncrl_runtime.emulation.emulated_server import Pace
from asyncrl_runtime.emulation.http import make_app
from asyncrl_runtime.rollout.engine_api import (
    EngineRefused,
    Generation,
    IncomingBucket,
    SamplingRequest,
)
from asyncrl_runtime.rollout.engine_client import EngineClient

SPEEDUP = 50
VOCABULARY = 300
MODEL = load_device_model("areal-1.5b")
RESPONSES = msgspec.structs.replace(MODEL.responses, median_tokens=300.0, longest_tokens=2_000)
WEIGHTS = msgspec.structs.replace(MODEL.weights, num_bytes=5_000_000_000)
SMALL = msgspec.structs.replace(MODEL, responses=RESPONSES, weights=WEIGHTS)
DEADLINE_SECONDS = 60


@asynccontextmanager
async def serving(count: int = 1) -> AsyncIterator[str]:
    """A server of emulated engines; its URL."""
    listener = bind("127.0.0.1", 0, "engine", "no port")
    listener.listen()
    pace = Pace(asyncio.get_running_loop().time, SPEEDUP)
    settings = uvicorn.Config(make_app(SMALL, pace, VOCABULARY, 4096, count), log_config=None, lifespan="off")
    server = uvicorn.Server(settings)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


@pytest.fixture
async def engine() -> AsyncIterator[EngineClient]:
    async with serving() as url:
        client = EngineClient(url, VOCABULARY)
        yield client
        await client.close()


def asking(seed: int = 1, bound: int = 10_000, earned: Sequence[int] = ()) -> SamplingRequest:
    return SamplingRequest([2, 3, 4, *earned], bound, 1.0, seed)


async def updated(engine: EngineClient, version: PolicyVersion, interrupt: str = "Retract") -> None:
    """Bring weights to an engine, as the worker does."""
    bucket = IncomingBucket(
        group="g",
        version=version,
        layout=BucketLayout(("w",), ("uint8",), ((1_000_000,),)),
        is_last=True,
        timeout_seconds=DEADLINE_SECONDS,
    )
    await engine.pause(interrupt)
    await engine.begin_update()
    await engine.receive_bucket(bucket, keeps_cache=interrupt == "InPlace")
    await engine.end_update()
    engine.weights.version = version
    await engine.resume()


async def joined(engine: EngineClient) -> None:
    join = JoinGroup(
        group="g",
        host="127.0.0.1",
        port=1,
        rank=1,
        world_size=2,
        backend="gloo",
        timeout_seconds=DEADLINE_SECONDS,
        layout=(),
    )
    await engine.join_group(join)
    await updated(engine, PolicyVersion(1, 0))


async def test_tokens_alone_and_together_are_a_function_of_the_seed(engine: EngineClient) -> None:
    await joined(engine)
    one = await engine.stream(asking(1))
    together = await engine.generate([asking(seed) for seed in (1, 2, 3)])
    assert together[0].output_ids == one.output_ids
    assert len(one.output_ids) == SMALL.responses.length(1)
    assert one.finish_reason == "stop"
    assert {span.policy_version for answer in together for span in answer.spans} == {PolicyVersion(1, 0)}
    [cut] = await engine.generate([asking(1, bound=7)])
    assert (cut.output_ids, cut.finish_reason) == (one.output_ids[:7], "length")


async def test_each_token_carries_the_version_that_sampled_it(engine: EngineClient) -> None:
    await joined(engine)
    longest = max(range(200), key=SMALL.responses.length)
    task = asyncio.create_task(engine.stream(asking(longest)))
    while (await engine.load()).num_used_tokens < 100:
        await asyncio.sleep(0.01)
    await updated(engine, PolicyVersion(1, 1))
    answer = await task
    assert [span.version for span in answer.spans] == [0, 1]
    assert 0 < answer.spans[0].end < answer.spans[1].end == len(answer.output_ids)


async def test_what_is_broken_off_goes_on_elsewhere(engine: EngineClient) -> None:
    await joined(engine)
    longest = max(range(200), key=SMALL.responses.length)
    task = asyncio.create_task(engine.stream(asking(longest)))
    while (await engine.load()).num_used_tokens < 100:
        await asyncio.sleep(0.01)
    await engine.abort_all()
    broken: Generation = await task
    assert broken.finish_reason == "abort"
    rest = await engine.stream(asking(longest, earned=broken.output_ids))
    assert rest.finish_reason == "stop"
    assert len(broken.output_ids) + len(rest.output_ids) == SMALL.responses.length(longest)


async def test_a_paused_engine_describes_itself_and_holds_requests(engine: EngineClient) -> None:
    await joined(engine)
    await engine.pause("Retract")
    task = asyncio.create_task(engine.stream(asking(1)))
    while engine.num_requests == 0:
        await asyncio.sleep(0.01)
    assert await engine.label() == "1.0"
    assert await engine.num_ranks() == 1
    load = await engine.load()
    assert (load.num_used_tokens, load.num_queued, load.num_generated_tokens) == (0, 0, 0)
    assert not task.done()
    await engine.resume()
    assert (await task).finish_reason == "stop"
    assert (await engine.load()).num_generated_tokens == SMALL.responses.length(1)


async def test_whoever_leaves_takes_his_request_with_him(engine: EngineClient) -> None:
    await joined(engine)
    task = asyncio.create_task(engine.stream(asking(max(range(200), key=SMALL.responses.length))))
    while (await engine.load()).num_used_tokens == 0:
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task])
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (await engine.load()).num_used_tokens:
            await asyncio.sleep(0.01)
    assert (await engine.load()).num_generated_tokens < 2_000


async def test_what_its_state_forbids_is_refused(engine: EngineClient) -> None:
    with pytest.raises(EngineRefused, match="no update"):
        await engine.end_update()
    with pytest.raises(EngineRefused, match="no group"):
        await engine.leave_group("g")
    await joined(engine)
    await engine.begin_update()
    with pytest.raises(EngineRefused, match="open already"):
        await engine.begin_update()
    await engine.take_over()
    await engine.leave_group("g")
    with pytest.raises(EngineRefused, match="no group"):
        await updated(engine, PolicyVersion(1, 1))
    with pytest.raises(EngineRefused, match="max_new_tokens"):
        await engine.stream(asking(bound=0))


async def test_one_process_poses_as_several_engines() -> None:
    async with serving(count=3) as url:
        first, third = EngineClient(f"{url}/e/0", VOCABULARY), EngineClient(f"{url}/e/2", VOCABULARY)
        await joined(third)
        assert await first.label() == "default"
        assert await third.label() == "1.0"
        assert await EngineClient(url, VOCABULARY).label() == "default", "the root is the first one"
        with pytest.raises(EngineRefused):
            await EngineClient(f"{url}/e/3", VOCABULARY).num_ranks()
        await first.close()
        await third.close()
