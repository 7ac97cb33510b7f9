"""Engines, workers, the trainer and the broker fail in each phase of a weight epoch: who is left goes on."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from asyncrl_api.names import JobNames, NatsAddress
from asyncrl_runtime.contract.messages import PolicyVersion
from asyncrl_runtime.rollout.engine_api import EngineRefused
from asyncrl_runtime.weights.engines import Published
from support.engines.rollout_scene import Scene, holds, open_scene, publish, versions
from support.jobs.nats_server import NatsServer

V0, V1, V2 = (PolicyVersion(1, version) for version in range(3))
RESTARTED = PolicyVersion(2, 1)

JOIN = ("/init_weights_update_group", 1)
PREPARE = ("/begin_weight_update", 1)
THIRD_BUCKET = ("/update_weights_from_distributed", 3)
COMMIT = ("/end_weight_update", 1)


@pytest.fixture
async def scene(nats_address: NatsAddress, names: JobNames) -> AsyncIterator[Scene]:
    async with open_scene(nats_address, names) as scene:
        yield scene


async def assert_samples_with(scene: Scene, version: PolicyVersion, *workers: str) -> None:
    groups = await scene.sampled(await scene.issue(4))
    assert {group.worker for group in groups} <= set(workers)
    assert set().union(*map(versions, groups)) == {version}


def refuse() -> None:
    raise EngineRefused("told to")


@pytest.mark.parametrize("call", [JOIN, PREPARE, THIRD_BUCKET, COMMIT])
async def test_an_engine_that_dies_is_left_out_and_the_others_get_the_version(
    scene: Scene, call: tuple[str, int]
) -> None:
    """The first of three is killed: a broadcast goes through it to the last."""
    a, b, c = await scene.add("a", "b", "c")
    publisher = scene.publisher()
    a.client.strike(*call, a.engine.kill)
    published = await publish(publisher, V0, seed=1)
    assert set(published.engines) == {"b", "c"}
    assert await holds(b, V0, seed=1) and await holds(c, V0, seed=1)
    assert b.worker.engine_fault() is None and c.worker.engine_fault() is None
    await assert_samples_with(scene, V0, "b", "c")

    assert (await publish(publisher, V1, seed=2)).engines == ("b", "c")
    await scene.restart_engine(a)
    assert (await publish(publisher, V1, seed=2)).engines == ("a",)
    for replica in (a, b, c):
        assert await holds(replica, V1, seed=2)


@pytest.mark.parametrize(
    ("call", "is_restarted"), [(JOIN, True), (PREPARE, False), (THIRD_BUCKET, True), (COMMIT, False)]
)
async def test_an_engine_that_hangs_is_left_out_and_is_clean_or_restarted_afterwards(
    scene: Scene, call: tuple[str, int], is_restarted: bool
) -> None:
    """It is restarted if its worker's deadline has passed too; else what was asked of it comes to its end."""
    a, b = await scene.add("a", "b")
    publisher = scene.publisher()
    b.client.strike(*call, b.engine.freeze)
    published = await publish(publisher, V0, seed=1)
    assert published.engines == ("a",)
    assert await holds(a, V0, seed=1)
    await assert_samples_with(scene, V0, "a")

    assert (b.worker.engine_fault() is not None) == is_restarted
    if is_restarted:
        await scene.until("it is out", lambda: scene.state("b") == "down")
        await scene.restart_engine(b)
    else:
        b.engine.thaw()
        await scene.until("it is clean", lambda: scene.state("b") in ("empty", "ready"))
    assert b.worker.engine_fault() is None
    assert (await publish(publisher, V1, seed=2)).engines == ("a", "b")
    assert await holds(a, V1, seed=2) and await holds(b, V1, seed=2)
    await assert_samples_with(scene, V1, "a", "b")


async def test_an_engine_that_received_a_part_stays_paused_until_it_has_everything_again(
    scene: Scene,
) -> None:
    """It refuses a bucket whenever it is tried; the other engines get the version nevertheless."""
    a, b = await scene.add("a", "b")
    publisher = scene.publisher()
    await publish(publisher, V0, seed=1)
    path, third = THIRD_BUCKET
    for nth in (third, third + 1):
        a.client.strike(path, nth, refuse)
    published = await publish(publisher, V1, seed=2)
    assert published.engines == ("b",) and published.failed == ("a",)
    assert await holds(b, V1, seed=2) and b.worker.engine_fault() is None

    b.engine.kill()
    await scene.until("only that is left", lambda: (scene.state("a"), scene.state("b")) == ("dirty", "down"))
    assert await a.engine.is_paused() and await a.engine.label() == str(V0)
    tickets = await scene.issue(2)
    await scene.hear("a", 3)
    assert not scene.held and not scene.groups
    assert (await publish(publisher, V1, seed=2)).engines == ("a",)
    assert await holds(a, V1, seed=2)
    assert [versions(group) for group in await scene.sampled(tickets)] == [{V1}, {V1}]


async def test_an_engine_that_no_bucket_was_sent_to_goes_on_at_its_old_version(scene: Scene) -> None:
    a, b = await scene.add("a", "b")
    publisher = scene.publisher()
    await publish(publisher, V0, seed=1)
    a.client.strike(*PREPARE, refuse)
    published = await publish(publisher, V1, seed=2)
    assert published.engines == ("b",) and published.failed == ("a",)
    assert await holds(a, V0, seed=1) and await holds(b, V1, seed=2)
    b.engine.kill()
    await scene.until("one is left", lambda: scene.state("b") == "down" and scene.state("a") == "ready")
    await assert_samples_with(scene, V0, "a")


@pytest.mark.parametrize(("call", "begun"), [(PREPARE, False), (THIRD_BUCKET, True)])
async def test_workers_that_hear_nothing_more_retreat_alone(
    scene: Scene, call: tuple[str, int], begun: bool
) -> None:
    """The trainer hangs in mid epoch, and its successor finds engines that it can update."""
    a, b = await scene.add("a", "b")
    await publish(scene.publisher(), V0, seed=1)
    publication = asyncio.create_task(publish(scene.publisher(), V1, seed=2))

    async def hang() -> None:
        publication.cancel()

    for replica in (a, b):
        replica.client.strike(*call, hang)
    await asyncio.wait({publication})
    assert publication.cancelled()
    if begun:
        await scene.until("both are dirty", lambda: scene.state("a") == scene.state("b") == "dirty")
        assert await a.engine.is_paused() and await b.engine.is_paused()
    else:
        for replica in (a, b):
            await replica.engine.wait_until_it_goes_on()
            assert await holds(replica, V0, seed=1)
        await assert_samples_with(scene, V0, "a", "b")
    assert (await publish(scene.publisher(), RESTARTED, seed=2)).engines == ("a", "b")
    assert await holds(a, RESTARTED, seed=2) and await holds(b, RESTARTED, seed=2)
    await assert_samples_with(scene, RESTARTED, "a", "b")


async def test_the_trainer_goes_on_alone_when_all_engines_die(scene: Scene) -> None:
    replicas = await scene.add("a", "b")
    publisher = scene.publisher()
    for replica in replicas:
        replica.client.strike(*THIRD_BUCKET, replica.engine.kill)
    published = await publish(publisher, V0, seed=1)
    assert published.engines == () and set(published.failed) == {"a", "b"}
    await scene.until("both are gone", lambda: scene.state("a") == scene.state("b") == "down")
    assert await publish(publisher, V1, seed=2) == Published()
    await asyncio.gather(*map(scene.restart_engine, replicas))
    assert (await publish(publisher, V1, seed=2)).engines == ("a", "b")


async def test_a_worker_that_dies_in_mid_update_leaves_an_engine_that_its_successor_updates(
    scene: Scene,
) -> None:
    a, b = await scene.add("a", "b")
    publisher = scene.publisher()
    await publish(publisher, V0, seed=1)
    is_in_update = asyncio.Event()

    async def hang() -> None:
        await b.engine.post("/begin_weight_update")
        is_in_update.set()
        await asyncio.Event().wait()

    b.client.strike(*PREPARE, hang)
    publication = asyncio.create_task(publish(publisher, V1, seed=2))
    await is_in_update.wait()
    await b.kill_worker()
    published = await publication
    assert published.engines == ("a",) and published.failed == ("b",)
    assert await b.engine.is_paused()
    await b.start_worker()
    await scene.until("the successor is there", lambda: scene.state("b") == "empty")
    assert (await publish(publisher, V1, seed=2)).engines == ("b",)
    assert await holds(a, V1, seed=2) and await holds(b, V1, seed=2)
    await assert_samples_with(scene, V1, "a", "b")


async def test_a_broker_that_is_restarted_in_mid_epoch_costs_that_epoch(
    own_nats: NatsServer, names: JobNames
) -> None:
    async with open_scene(NatsAddress(url=own_nats.url), names) as scene:
        replicas = await scene.add("a", "b")
        publisher = scene.publisher()
        await publish(publisher, V0, seed=1)
        replicas[0].client.strike(*THIRD_BUCKET, own_nats.kill)
        publication = asyncio.create_task(publish(publisher, V1, seed=2))
        await scene.until("the broker is away", lambda: not scene.broker.client.is_connected)
        own_nats.start()
        missed = {"a", "b"} - set((await publication).engines)
        if missed:  # an answer may have gone through afterwards
            await scene.until("they are heard", lambda: {who for who, _ in publisher.behind(V1)} == missed)
            assert set((await publish(publisher, V1, seed=2)).engines) == missed
        assert all([await holds(replica, V1, seed=2) for replica in replicas])
        await assert_samples_with(scene, V1, "a", "b")
