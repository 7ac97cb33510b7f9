"""Two jobs of one name in two namespaces: neither reaches what is the other's, with all its pods have."""

from collections.abc import Iterator

import pytest

from support.chart.installed_operator import Operator
from support.cluster.control_plane import making_namespace
from support.cluster.nodes import NodeCluster
from support.cluster.running_job import RunningJob, prepare

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900, func_only=True)]

SPEC = {"training": {"maxSteps": 5000}, "evaluation": {"samples": 50, "everySteps": 5000}}

ASK = """
import asyncio
from asyncrl_runtime.trainer.cluster_report import in_cluster_client

async def ask():
    async with in_cluster_client() as client:
        for path in {paths!r}:
            print((await client.get(path)).status_code)

asyncio.run(ask())
"""
CONNECT = """
import asyncio, json, nats

async def connect():
    told = json.load(open("/etc/asyncrl/nats/worker.json"))
    said = asyncio.Queue()

    async def on_error(error):
        await said.put(str(error))

    client = await asyncio.wait_for(nats.connect({url!r}, **told, error_cb=on_error), 10)
    await client.publish({subject!r}, b"")
    print(await asyncio.wait_for(said.get(), 5))

try:
    asyncio.run(connect())
except Exception as error:
    print(type(error).__name__)
"""


@pytest.fixture
def jobs(nodes: NodeCluster, operator: Operator) -> Iterator[tuple[RunningJob, RunningJob]]:
    """Two jobs that train."""
    with making_namespace(nodes) as mine, making_namespace(nodes) as theirs:
        made = RunningJob(nodes, mine), RunningJob(nodes, theirs)
        for job in made:
            prepare(nodes, job.namespace)
            job.apply(**SPEC)
        for job in made:
            job.wait_for_step(1, 300)
        yield made


def test_neither_can_read_what_is_the_others(jobs: tuple[RunningJob, RunningJob]) -> None:
    mine, theirs = jobs
    root = "/api/v1/namespaces/{}/{}"
    reports = [root.format(job.namespace, f"configmaps/{job.name}-report") for job in jobs]
    secrets = [root.format(job.namespace, "secrets") for job in jobs]
    answers = mine.execute("trainer", "trainer", ASK.format(paths=[*reports, *secrets])).split()
    assert answers == ["200", "403", "403", "403"], "its own report and nothing else"

    ticket = f"rl.{mine.namespace}_{mine.name}.prompt.1"
    urls = {job: f"nats://{job.name}-nats.{job.namespace}.svc.cluster.local:4222" for job in jobs}
    own = mine.execute("rollout", "worker", CONNECT.format(url=urls[mine], subject=ticket))
    assert "permissions violation" in own.lower(), "a worker issues no ticket"
    foreign = mine.execute("rollout", "worker", CONNECT.format(url=urls[theirs], subject=ticket))
    assert foreign == "TimeoutError", "the other's server is not reached"
    for job in jobs:
        job.wait_for_step(job.trained() + 1)
