"""What an executor takes for settled: only what nothing has changed while it looked."""

from typing import Any, cast

from asyncrl_operator.api_server.cluster import Cluster
from asyncrl_operator.api_server.informer import Store
from asyncrl_operator.api_server.kept_fields import compact
from asyncrl_operator.api_server.observe import Child
from asyncrl_operator.decide.desired import Desired
from asyncrl_operator.decide.observed import Observed
from asyncrl_operator.executor import Executor, Target
from asyncrl_operator.resources import CHILDREN, Resource, resource_of
from asyncrl_operator.workqueue import Key
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
