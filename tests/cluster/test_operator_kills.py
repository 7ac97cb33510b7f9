"""The operator killed after each of its writes: the next one comes to the same end, nothing is done twice.

The operator runs in this process, so that the place of the kill is exact: the API client dies after the k-th
write has been carried out and before its answer is read. A reconciler without any memory then goes on.
"""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from asyncrl_operator.api_server.api import Api, ApiError
from asyncrl_operator.api_server.cluster import Cluster as Caches
from asyncrl_operator.api_server.recorder import Recorder
from asyncrl_operator.executor import Executor
from asyncrl_operator.main import connect
from asyncrl_operator.obstacles import Obstacles
from asyncrl_operator.reconcile import Reconciler
from asyncrl_operator.render.manifests import Defaults
from asyncrl_operator.resources import ASYNCRL_JOBS
from asyncrl_operator.telemetry import Telemetry
from asyncrl_operator.workqueue import Key
from support.cluster.control_plane import Cluster
from support.cluster.operator_process import Job, make_claim

pytestmark = pytest.mark.e2e

DEFAULTS = Defaults(runtime_image="asyncrl/runtime:test", nats_image="nats:test")
MAX_WRITES = 40
SECONDS = 60.0
AT_ONCE = 8
"""The number of jobs that are brought up at a time, each with its own place of the kill."""


class Killed(Exception):
    """The operator has been killed."""


@dataclass
class Life:
    """The fate of one operator: how much it has written, and after which write it dies."""

    num_writes: int = 0
    dies_after: int | None = None


LIFE: ContextVar[Life | None] = ContextVar("life", default=None)
"""The fate of the operator that makes a call; the caches that all of them share have none."""


class MortalApi(Api):
    """Dies after a number of writes; the last one has reached the server."""

    async def _call(self, verb: str, *arguments: Any, **named: Any) -> Any:
        life = LIFE.get()
        try:
            return await super()._call(verb, *arguments, **named)
        finally:
            if life is not None and verb != "GET":
                life.num_writes += 1
                if life.num_writes == life.dies_after:
                    raise Killed


@asynccontextmanager
async def watching(api: Api, namespace: str) -> AsyncIterator[Caches]:
    """Give caches of a namespace that are kept up to date."""
    caches = Caches(api, [namespace], lambda key, *, at_once=False: None, time.monotonic)
    task = asyncio.create_task(caches.run())
    try:
        async with asyncio.timeout(SECONDS):
            await caches.wait_until_synced()
        yield caches
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def passes_until_running(api: Api, caches: Caches, key: Key) -> None:
    """Run passes of a reconciler that remembers nothing until the job runs and a pass writes nothing.

    Raises:
        Killed: the client has killed the operator.
    """
    reconciler = Reconciler(
        caches,
        Executor(caches, DEFAULTS, lambda: "secret"),
        Obstacles(caches, time.time),
        Recorder(api, time.time),
        Telemetry(),
        time.time,
    )
    async with asyncio.timeout(SECONDS):
        while True:
            live = await api.get(ASYNCRL_JOBS.path(key.namespace, key.name))
            caches.take_job("MODIFIED", live)
            try:
                await reconciler.reconcile(key)
            except ApiError as error:
                assert error.status == 409, error
            groups = {each["name"]: each["summary"] for each in live["status"].get("groups", ())}
            if groups == {"messaging": "1/1", "trainer": "1/1", "rollout": "2/2"}:
                return
            await asyncio.sleep(0.1)


async def bring_up(api: Api, caches: Caches, key: Key, dies_after: int | None) -> int:
    """Bring a job up, with one kill on the way; return how often was written until then, or at all."""
    life = Life(dies_after=dies_after)
    LIFE.set(life)
    try:
        await passes_until_running(api, caches, key)
    except Killed:
        life.dies_after = None
        await passes_until_running(api, caches, key)
    return life.num_writes


def what_there_is(job: Job) -> dict[str, Any]:
    """Return what a job comes to; names without the job's, and without what the Job controller makes up."""
    kinds = (
        "serviceaccounts,roles,rolebindings,services,configmaps,pdb,networkpolicies,statefulsets,jobs,pods"
    )
    children = sorted(
        (
            each["kind"],
            re.sub(r"(-trainer-\d+-\d+)-\w{5}$", r"\1", each["metadata"]["name"].removeprefix(job.name)),
        )
        for each in job.children(kinds)
    )
    attempt = job.status()["attempt"]
    counted = {name: attempt[name] for name in ("number", "restarts", "disruptions")}
    return {
        "children": children,
        "attempt": counted,
        "phase": job.status()["phase"],
        "trainers that were ever started": num_trainers_made(job),
    }


def num_trainers_made(job: Job) -> int:
    """Return how many trainer pods there have been: a Job that was made, lost and made again starts two."""
    query = "involvedObject.kind=Job,reason=SuccessfulCreate"
    events = json.loads(job.kubectl("get", "events", f"--field-selector={query}", "-o", "json"))["items"]
    return sum(each["involvedObject"]["name"].startswith(f"{job.name}-trainer-") for each in events)


async def test_a_kill_after_any_write_changes_nothing_in_the_end(
    cluster: Cluster, namespace: str, operator_rights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(operator_rights))
    await asyncio.to_thread(cluster.apply, *make_claim(namespace))

    async with connect() as client:
        api = MortalApi(client)

        async def one(name: str, dies_after: int | None) -> int:
            await asyncio.to_thread(Job(cluster, namespace, name).apply)
            api = MortalApi(client)
            return await bring_up(api, caches, Key(namespace, name), dies_after)

        async with watching(api, namespace) as caches:
            writes = await one("whole", None)
            assert 20 < writes < MAX_WRITES
            expected = await asyncio.to_thread(what_there_is, Job(cluster, namespace, "whole"))
            assert expected["phase"] == "Running" and expected["attempt"]["number"] == 1
            for first in range(1, writes + 1, AT_ONCE):
                places = range(first, min(first + AT_ONCE, writes + 1))
                await asyncio.gather(*(one(f"k{place}", place) for place in places))
                for place in places:
                    job = Job(cluster, namespace, f"k{place}")
                    found = await asyncio.to_thread(what_there_is, job)
                    assert found == expected, f"killed after write {place}"
