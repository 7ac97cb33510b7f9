"""The whole operator except kopf, on an API server in memory, in virtual time.

Caches, passes, reconciler, executor and recorder are the product's, put together as `main.run` does; a task
that lists and watches AsyncRLJobs stands for kopf.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML

from asyncrl_api.crdgen import FILE_NAME
from asyncrl_api.report import Report
from asyncrl_api.times import to_text
from asyncrl_operator.api_server.api import Api, ApiError
from asyncrl_operator.api_server.cluster import Cluster
from asyncrl_operator.api_server.recorder import Recorder
from asyncrl_operator.executor import Executor
from asyncrl_operator.obstacles import Obstacles
from asyncrl_operator.passes import Passes
from asyncrl_operator.reconcile import Reconciler
from asyncrl_operator.render.manifests import Defaults
from asyncrl_operator.resources import (
    ASYNCRL_JOBS,
    CHILDREN,
    CONFIG_MAPS,
    EVENTS,
    PODS,
    SECRETS,
    Json,
    Resource,
)
from asyncrl_operator.telemetry import Telemetry
from asyncrl_operator.workqueue import WorkQueue
from support.cluster.api_calls import Request
from support.cluster.controllers import MERGE, Controllers
from support.cluster.memory_api_client import MemoryApiClient, MemoryResponse, Send, pass_on
from support.cluster.memory_api_server import NAMESPACES, MemoryApiServer
from support.cluster.operator_process import make_job
from support.paths import ROOT

CRD: Json = YAML(typ="safe").load((ROOT / "crds" / FILE_NAME).read_text())
DEFAULTS = Defaults("asyncrl/runtime:test", "nats:test")
BEGAN = 1_800_000_000.0
"""Unix time at which every world begins."""
NAMESPACE, NAME = "team", "gsm8k"
TURN_SECONDS = 0.5
"""The time between two turns of the controllers."""
LOOK_SECONDS = 0.25
WAIT_SECONDS = 120.0
QUIET_SECONDS = 30.0

OnTheWay = Callable[[Request, Send], Awaitable[MemoryResponse]]


@dataclass
class Operator:
    """One life of the operator."""

    cluster: Cluster
    reconciler: Reconciler
    passes: Passes
    api: Api
    telemetry: Telemetry
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def end(self) -> None:
        """Kill it."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


class World:
    """A cluster in which the operator runs, with one job."""

    def __init__(self, on_the_way: OnTheWay = pass_on) -> None:
        self.on_the_way = on_the_way
        """What becomes of the operator's calls."""
        self.writes: list[str] = []
        """All calls of the operator that change something: verb and path, and status of the answer."""
        self.defaults = DEFAULTS
        """The defaults of the operator that is started next."""
        self.are_controllers_away = False
        """Whether nobody acts on objects but operator and user."""
        self.num_lists = 0
        """The number of pages that the operator has asked for."""
        self.server = MemoryApiServer(CRD, self.now)
        self.server.store(NAMESPACES, {"metadata": {"name": NAMESPACE, "uid": "n1"}})
        self.controllers = Controllers(self.server, self.now)
        self._operator: Operator | None = None

    def now(self) -> float:
        """Return the Unix time."""
        return BEGAN + asyncio.get_running_loop().time()

    # -- the operator

    @property
    def operator(self) -> Operator:
        assert self._operator is not None
        return self._operator

    async def start(self) -> None:
        """Start an operator without any memory, and return once its caches are filled."""
        loop, telemetry = asyncio.get_running_loop(), Telemetry()
        api = Api(MemoryApiClient(self.server, self._call), telemetry.called)
        passes = Passes(WorkQueue(), telemetry, self.now)
        cluster = Cluster(api, (), passes.wake, loop.time)
        reconciler = Reconciler(
            cluster,
            Executor(cluster, self.defaults, lambda: "secret"),
            Obstacles(cluster, self.now),
            Recorder(api, self.now),
            telemetry,
            self.now,
        )
        self._operator = Operator(cluster, reconciler, passes, api, telemetry)
        self._operator.tasks = [
            asyncio.create_task(cluster.run(), name="caches"),
            asyncio.create_task(_tell_of_jobs(api, cluster), name="jobs"),
        ]
        await cluster.wait_until_synced()
        self._operator.tasks.append(asyncio.create_task(passes.run(reconciler.reconcile), name="passes"))

    async def restart(self) -> None:
        """Kill the operator and start another."""
        await self.operator.end()
        await self.start()

    async def _call(self, request: Request, send: Send) -> MemoryResponse:
        await asyncio.sleep(0)  # others go on meanwhile
        self.num_lists += "limit" in request.query
        response = await self.on_the_way(request, send)
        if request.verb != "GET":
            self.writes.append(f"{request.verb} {request.path} {response.status}")
        return response

    # -- time

    async def until(self, holds: Callable[[], Any], what: str = "", seconds: float = WAIT_SECONDS) -> Any:
        """Return what `holds` returns once it is true.

        Raises:
            AssertionError: it has not become true in time.
        """
        deadline = self.now() + seconds
        while not (found := holds()):
            self.check()
            assert self.now() < deadline, f"not within {seconds:.0f} s: {what or holds}; {self.status()}"
            await asyncio.sleep(LOOK_SECONDS)
        return found

    async def until_quiet(self, seconds: float = QUIET_SECONDS) -> None:
        """Return once the operator has changed nothing for a while.

        Raises:
            AssertionError: it does not come to rest.
        """
        for _ in range(20):
            before = len(self.writes)
            await asyncio.sleep(seconds)
            self.check()
            if len(self.writes) == before:
                return
        raise AssertionError(f"the operator does not come to rest: {self.writes[-10:]}")

    def check(self) -> None:
        """Raise if the operator has stopped, or has asked for what the API server in memory lacks."""
        if self.server.lacked:
            raise self.server.lacked[0]
        for task in self.operator.tasks:
            if task.done():
                task.result()

    # -- the user, and the trainer

    def ask(self, verb: str, path: str, body: Json | None = None, content_type: str = MERGE) -> Json:
        """Make a call as the user does, which must succeed."""
        query = {"fieldManager": "user"}
        status, answer = self.server.answer(Request(verb, path, query, body, content_type))
        assert status < 400, answer
        return answer

    def create_job(self, **spec: Any) -> None:
        self.ask("POST", ASYNCRL_JOBS.path(NAMESPACE), make_job(NAME, **spec), "application/json")

    def edit_job(self, **spec: Any) -> None:
        self.ask("PATCH", ASYNCRL_JOBS.path(NAMESPACE, NAME), {"spec": spec})

    def delete(self, resource: Resource, name: str) -> None:
        self.ask("DELETE", resource.path(NAMESPACE, name), {}, "application/json")

    def edit(self, resource: Resource, name: str, patch: Json) -> Json:
        return self.ask("PATCH", resource.path(NAMESPACE, name), patch)

    def report(self, step: int, **values: Any) -> None:
        """Write a report as the present attempt's trainer does."""
        report = Report(
            attempt=self.status()["attempt"]["number"],
            step=step,
            max_steps=200,
            state="Training",
            time=to_text(self.now()),
            **values,
        )
        text = report.model_dump_json(by_alias=True, exclude_none=True)
        self.edit(CONFIG_MAPS, f"{NAME}-report", {"data": {"report": text}})

    # -- what is seen

    def get(self, resource: Resource, name: str) -> Json:
        """Return an object; empty if it is not there."""
        return next((each for each in self.server.all(resource) if each["metadata"]["name"] == name), {})

    def names(self, resource: Resource) -> list[str]:
        return [each["metadata"]["name"] for each in self.server.all(resource)]

    def status(self) -> Json:
        return dict(self.get(ASYNCRL_JOBS, NAME).get("status", {}))

    def condition(self, kind: str) -> str:
        """Return "True/Reason" of a condition; "absent"."""
        found = (each for each in self.status().get("conditions", ()) if each["type"] == kind)
        return next((f"{each['status']}/{each['reason']}" for each in found), "absent")

    def message(self, kind: str) -> str:
        """Return the message of a condition."""
        found = (each["message"] for each in self.status().get("conditions", ()) if each["type"] == kind)
        return str(next(found, ""))

    def events(self) -> dict[str, int]:
        """Return how many Events about the job have each reason."""
        counts: dict[str, int] = {}
        for event in self.server.all(EVENTS):
            if event["involvedObject"]["kind"] == "AsyncRLJob":
                counts[event["reason"]] = counts.get(event["reason"], 0) + event["count"]
        return counts

    def groups(self) -> dict[str, str]:
        """Return how many pods of each group are ready, of how many."""
        return {each["name"]: each["summary"] for each in self.status().get("groups", ())}

    @property
    def is_up(self) -> bool:
        return self.groups() == {"messaging": "1/1", "trainer": "1/1", "rollout": "2/2"}

    def made(self) -> list[str]:
        """Return all pods and their owners that have ever existed, without the names' random parts."""
        kinds = ("Job ", "StatefulSet ", "Pod ")
        made = (re.sub(r"(-trainer-\d+-\d+)-\d+$", r"\1", each) for each in self.server.made)
        return sorted(each for each in made if each.startswith(kinds))

    def outcome(self) -> Json:
        """Return what the job has come to, and how it got there."""
        attempt = self.status()["attempt"]
        return {
            "children": {kind.plural: self.names(kind) for kind in (*CHILDREN, SECRETS)},
            "attempt": {name: attempt[name] for name in ("number", "restarts", "disruptions")},
            "phase": self.status()["phase"],
            "groups": self.groups(),
            "ever made": self.made(),
        }

    def pods(self) -> Iterator[str]:
        """Yield the names of all pods."""
        return (each["metadata"]["name"] for each in self.server.all(PODS))


@asynccontextmanager
async def running_world(on_the_way: OnTheWay = pass_on) -> AsyncIterator[World]:
    """Provide a world in which controllers and operator run; at its end nothing must have gone wrong."""
    world = World(on_the_way)

    async def turn() -> None:
        while True:
            if not world.are_controllers_away:
                world.controllers.settle()
            await asyncio.sleep(TURN_SECONDS)

    turns = asyncio.create_task(turn(), name="controllers")
    await world.start()
    try:
        yield world
        world.check()
        if turns.done():
            turns.result()
    finally:
        await world.operator.end()
        turns.cancel()
        await asyncio.gather(turns, return_exceptions=True)


async def _tell_of_jobs(api: Api, cluster: Cluster) -> None:
    """List and watch AsyncRLJobs, as kopf does."""
    path = ASYNCRL_JOBS.path(None)
    while True:
        try:
            page = await api.list(path)
            for job in page:
                cluster.take_job(None, job)
            query = {"resourceVersion": page.metadata["resourceVersion"], "timeoutSeconds": "300"}
            async for event in api.watch(path, **query):
                cluster.take_job(event["type"], event["object"])
        except ApiError:
            await asyncio.sleep(1.0)
