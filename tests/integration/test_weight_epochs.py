"""Weights reach engines: all alike and as a whole, those that come late too, in groups that change."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
from torch import Tensor

from asyncrl_api.names import JobNames, NatsAddress
from asyncrl_runtime.contract.messages import PolicyVersion
from asyncrl_runtime.trainer.update.policy import Policy
from asyncrl_runtime.weights.bucket import PublishedWeights
from asyncrl_runtime.weights.copies import ShareCopy, make_copy_group
from asyncrl_runtime.weights.engines import Published
from asyncrl_runtime.weights.publisher import ChecksumMismatch
from support.engines.rollout_scene import SPEC, Scene, checksums_of, holds, open_scene, publish, versions
from support.engines.tiny_models import tiny_model

V0, V1, V2, V3, V4 = (PolicyVersion(1, version) for version in range(5))
BUCKET_BYTES = 40_000


@pytest.fixture
async def scene(nats_address: NatsAddress, names: JobNames) -> AsyncIterator[Scene]:
    async with open_scene(nats_address, names) as scene:
        yield scene


async def test_a_policy_reaches_all_engines_to_the_bit(scene: Scene, process_group: None) -> None:
    """Whatever they held, in buckets of several tensors and of one that is larger than a bucket."""
    replicas = [*await scene.add("a"), *await scene.add("b", model_folder=tiny_model(seed=1))]
    policy = Policy(
        tiny_model(seed=2),
        dtype="Float32",
        training=SPEC.training,
        algorithm=SPEC.algorithm,
        deepspeed=SPEC.trainer.deepspeed,
    )
    buckets = policy.buckets(BUCKET_BYTES)
    weights = dict(policy.weights([name for names in buckets for name in names]))
    assert len(buckets) > 5 and max(map(len, buckets)) > 1
    assert max(tensor.nbytes for tensor in weights.values()) > BUCKET_BYTES

    copy = ShareCopy([*map(policy.layout, buckets)], policy.shares, make_copy_group())
    copy.take()

    async def gather(names: tuple[str, ...]) -> Tensor:
        return await asyncio.to_thread(copy.gather, names)

    publisher = scene.publisher(verify=True)
    publisher.weights = PublishedWeights(copy.layout, gather)
    published = await publisher.publish(V0, "Retract")
    assert published.engines == ("a", "b") and published.num_epochs == 1
    assert len(set(published.checksums.values())) == 1 and all(published.checksums.values())
    sent = checksums_of(weights)
    for replica in replicas:
        assert await replica.engine.checksums() == sent
        assert await replica.engine.label() == str(V0) and not await replica.engine.is_paused()


async def test_an_engine_over_several_gpus_is_as_many_members(scene: Scene) -> None:
    """Ranks lie one behind the other; an engine that is lost takes all of its own away."""
    await scene.add("a")
    [b] = await scene.add("b", tp_size=2)
    [c] = await scene.add("c", tp_size=3)
    publisher = scene.publisher(verify=True)
    assert set((await publish(publisher, V0, seed=1)).engines) == {"a", "b", "c"}
    assert {(join.world_size) for join in scene.joins} == {7}
    starts = sorted(join.rank for join in scene.joins)
    assert starts[0] == 1 and sorted(map(int.__sub__, [*starts[1:], 7], starts)) == [1, 2, 3]
    assert all([await holds(each, V0, seed=1) for each in scene.replicas.values()])

    scene.joins.clear()
    c.engine.kill()
    assert set((await publish(publisher, V1, seed=2)).engines) == {"a", "b"}
    assert scene.joins[-1].world_size == 4
    await scene.restart_engine(c)
    assert (await publish(publisher, V1, seed=2)).engines == ("c",)
    assert [(join.rank, join.world_size) for join in scene.joins[-1:]] == [(1, 4)]
    assert await holds(b, V1, seed=2) and await holds(c, V1, seed=2)


async def test_engines_that_differ_after_the_same_weights_are_a_mismatch(scene: Scene) -> None:
    _, b = await scene.add("a", "b")
    publisher = scene.publisher(verify=True)
    await publish(publisher, V0, seed=1)
    b.client.strike("/end_weight_update", 1, lambda: b.engine.load(tiny_model(seed=2)))
    with pytest.raises(ChecksumMismatch, match=r"version 1\.1: \{'a': '\w+', 'b': '\w+'\}"):
        await publish(publisher, V1, seed=1)


async def test_an_engine_is_compared_with_those_that_had_the_version_before_it_came(scene: Scene) -> None:
    publisher = scene.publisher(verify=True)
    await scene.add("a")
    await publish(publisher, V0, seed=1)
    [b] = await scene.add("b")
    b.client.strike("/end_weight_update", 1, lambda: b.engine.load(tiny_model(seed=2)))
    with pytest.raises(ChecksumMismatch, match=r"version 1\.0: \{'a': '\w+', 'b': '\w+'\}"):
        await publish(publisher, V0, seed=1)


async def test_who_comes_late_samples_nothing_before_the_next_publication(scene: Scene) -> None:
    publisher = scene.publisher()
    assert await publish(publisher, V0, seed=1) == Published()  # nobody is there yet
    [a] = await scene.add("a")
    tickets = await scene.issue(2)
    await scene.hear("a", 3)
    assert not scene.held and not scene.groups
    assert (await publish(publisher, V0, seed=1)).engines == ("a",)
    assert [versions(group) for group in await scene.sampled(tickets)] == [{V0}, {V0}]

    [b] = await scene.add("b")
    assert {group.worker for group in await scene.sampled(await scene.issue(6))} == {"a"}
    assert publisher.behind(V0) == [("b", scene.beat("b").engine)]
    assert (await publish(publisher, V0, seed=1)).engines == ("b",)
    assert publisher.behind(V0) == [] and publisher.num_engines(V0) == 2
    assert await holds(a, V0, seed=1) and await holds(b, V0, seed=1)


async def test_a_group_lasts_as_long_as_its_members(scene: Scene) -> None:
    await scene.add("a", "b")
    publisher = scene.publisher()

    async def group_of(version: PolicyVersion) -> tuple[str, int]:
        assert (await publish(publisher, version, seed=version.version)).num_epochs == 1
        last = scene.joins[-1]
        return last.group, last.world_size

    first = await group_of(V0)
    assert first[1] == 3
    with socket.create_connection(("127.0.0.1", scene.joins[-1].port)):
        pass  # where members meet is open as long as the group is
    assert await group_of(V1) == first and len(scene.joins) == 2
    [c] = await scene.add("c")
    second = await group_of(V2)
    assert second[1] == 2 and second[0] != first[0], "who comes late has a group of its own"
    c.engine.kill()
    await scene.until("c is known to be gone", lambda: scene.state("c") == "down")
    assert await group_of(V3) == second and len(scene.joins) == 3, "nobody joins again"
    with pytest.raises(ConnectionRefusedError), contextlib.closing(socket.socket()) as probe:
        probe.connect(("127.0.0.1", scene.joins[-1].port))
    scene.replicas["b"].engine.kill()
    await scene.until("b is known to be gone", lambda: scene.state("b") == "down")
    third = await group_of(V4)
    assert third[1] == 2 and third[0] not in (first[0], second[0])

    await publisher.leave()
    with pytest.raises(ConnectionRefusedError), contextlib.closing(socket.socket()) as probe:
        probe.connect(("127.0.0.1", scene.joins[-1].port))


async def test_samples_are_let_finish_before_the_update_where_the_job_says_so(scene: Scene) -> None:
    publisher = scene.publisher()
    [a] = await scene.add("a")
    await publish(publisher, V0, seed=1)
    await a.engine.slow_down(0.3)
    under_way = await scene.issue(1, max_new_tokens=40)
    await scene.until("it is sampled", lambda: scene.beat("a").num_running_samples > 0)
    await scene.add("b")

    assert (await publish(publisher, V1, seed=2, interrupt="Drain")).engines == ("b",)
    await scene.until("it drains", lambda: scene.state("a") == "draining")
    later = await scene.sampled(await scene.issue(3))
    assert {group.worker for group in later} == {"b"} and versions(later[0]) == {V1}
    assert (await publish(publisher, V1, seed=2, interrupt="Drain")).num_epochs == 0

    await a.engine.slow_down(0)
    [finished] = await scene.sampled(under_way)
    assert finished.worker == "a" and versions(finished) == {V0}
    await scene.until("it has drained", lambda: scene.state("a") == "drained")
    assert (await publish(publisher, V1, seed=2, interrupt="Drain")).engines == ("a",)
    assert await holds(a, V1, seed=2)
    await scene.until("it samples again", lambda: scene.state("a") == "ready")
