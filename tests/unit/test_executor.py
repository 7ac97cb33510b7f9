"""What an executor considers settled, and which objects it leaves as they were created."""

from dataclasses import replace
from typing import Any, cast

from asyncrl_operator.api_server.cluster import Cluster
from asyncrl_operator.api_server.informer import Store
from asyncrl_operator.api_server.kept_fields import compact
from asyncrl_operator.api_server.observe import Child
from asyncrl_operator.decide.desired import Desired
from asyncrl_operator.decide.observed import Observed
from asyncrl_operator.executor import Executor, Target
from asyncrl_operator.resources import (
    CHILDREN,
    CONFIG_MAPS,
    JOBS,
    SERVICES,
    STATEFUL_SETS,
    Resource,
    resource_of,
)
from asyncrl_operator.workqueue import Key
from asyncrl_runtime.simulation.virtual_time import run_virtually
from support.cluster.api_calls import RefusalError, Request
from support.cluster.memory_api_client import MemoryResponse, Send
from support.cluster.whole_operator import NAME, World, running_world
from support.manifests.rendered_jobs import DEFAULTS, job_of

JOB = job_of("cpu")
UID = JOB.metadata.uid or ""
KEY = Key(JOB.metadata.namespace or "", JOB.metadata.name)


class Children:
    """Stands for caches and API server; a child may go while another is being made."""

    def __init__(self) -> None:
        self._stores: dict[Resource, Store[bytes]] = {resource: Store(compact) for resource in CHILDREN}
        self._version = 0
        self.made: list[tuple[Resource, str]] = []
        self.goes_meanwhile: tuple[Resource, str] | None = None

    def children(self, key: Key) -> list[Child]:
        return [Child(kind, entry) for kind, store in self._stores.items() for entry in store.of(key)]

    def child(self, resource: Resource, namespace: str, name: str) -> Any:
        return self._stores[resource].get(namespace, name)

    def drop(self, resource: Resource, name: str) -> None:
        self._stores[resource].discard(KEY.namespace, name)

    async def verify(self, key: Key, uid: str) -> None: ...

    async def make(self, manifest: dict[str, Any], uid: str) -> bool:
        self._version += 1
        more = {"uid": f"u{self._version}", "resourceVersion": str(self._version)}
        raw = {**manifest, "metadata": {**manifest["metadata"], **more}}
        self._stores[resource_of(manifest)].put(raw)
        self.made.append((resource_of(manifest), manifest["metadata"]["name"]))
        if self.goes_meanwhile is not None:
            self.drop(*self.goes_meanwhile)
            self.goes_meanwhile = None
        return True


async def passes(executor: Executor, count: int) -> None:
    target = Target(KEY, JOB, UID, 1, Desired(), 1)
    for _ in range(count):
        await executor.act(target, Observed(), (), is_verified=True)


async def test_a_child_that_goes_during_a_pass_is_made_again_by_the_next() -> None:
    children = Children()
    executor = Executor(cast(Cluster, cast(Any, children)), DEFAULTS, lambda: "secret")
    await passes(executor, 2)
    first, last = children.made[0], children.made[-1]
    children.made.clear()
    children.drop(*last)
    children.goes_meanwhile = first  # the pass has looked at it before
    await passes(executor, 2)
    assert children.made == [last, first]
    await passes(executor, 1)
    assert children.made == [last, first], "nothing is left to do"


def image_of(world: World, resource: Resource, name: str) -> str:
    return str(world.get(resource, name)["spec"]["template"]["spec"]["containers"][0]["image"])


def test_an_upgraded_operator_leaves_what_is_made_once_as_it_was_made() -> None:
    """A Job cannot be changed, so every apply to it would be refused."""

    async def play() -> None:
        async with running_world() as world:
            world.create_job()
            await world.until(lambda: world.is_up)
            await world.until_quiet()
            config = world.get(CONFIG_MAPS, f"{NAME}-config-1")
            assert config["immutable"]
            world.defaults = replace(world.defaults, runtime_image="asyncrl/runtime:next")
            await world.operator.end()
            writes = len(world.writes)
            await world.start()
            await world.until_quiet()
            assert not any("/jobs/" in write for write in world.writes[writes:])
            assert image_of(world, JOBS, f"{NAME}-trainer-1") == "asyncrl/runtime:test"
            assert world.get(CONFIG_MAPS, f"{NAME}-config-1") == config
            assert image_of(world, STATEFUL_SETS, f"{NAME}-rollout") == "asyncrl/runtime:next"
            assert world.condition("Ready") == "True/Running" and world.condition("Stalled") == "absent"

    run_virtually(play())


def test_what_is_made_once_and_edited_by_hand_is_left_alone() -> None:
    async def play() -> None:
        async with running_world() as world:
            world.create_job()
            await world.until(lambda: world.is_up)
            await world.until_quiet()
            writes = len(world.writes)
            world.edit(JOBS, f"{NAME}-trainer-1", {"spec": {"activeDeadlineSeconds": 7}})
            world.edit(JOBS, f"{NAME}-trainer-1", {"metadata": {"labels": {"app.kubernetes.io/name": "x"}}})
            await world.until_quiet()
            assert world.writes[writes:] == []

    run_virtually(play())


def test_what_stands_in_the_way_of_an_apply_does_not_keep_what_is_to_go() -> None:
    """If a quota stands in the way, for example, the deletions may make room."""

    async def play() -> None:
        async def refuse(request: Request, send: Send) -> MemoryResponse:
            if request.verb == "PATCH" and f"/services/{NAME}-rollout" in request.path:
                message = 'services "gsm8k-rollout" is forbidden: exceeded quota: few'
                return MemoryResponse.of(RefusalError(403, "Forbidden", message))
            return await send(request)

        async with running_world() as world:
            world.create_job()
            await world.until(lambda: world.is_up)
            on_the_way, world.on_the_way = world.on_the_way, refuse
            world.edit(SERVICES, f"{NAME}-rollout", {"spec": {"ports": []}})
            world.edit_job(training={"learningRate": 2e-6})
            await world.until(lambda: not world.names(JOBS), "the trainer before is gone")
            await world.until(lambda: "exceeded quota: few" in world.message("Reconciling"))
            world.on_the_way = on_the_way
            await world.until(lambda: world.names(JOBS) == [f"{NAME}-trainer-2"] and world.is_up)

    run_virtually(play())
