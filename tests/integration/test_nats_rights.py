"""A server that checks its clients: a job runs with the rights of its roles, and a worker has no others."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from nats.aio.client import Client

from asyncrl_api.names import JobNames, NatsAddress
from asyncrl_operator.render.messaging import User, worker_permissions
from asyncrl_runtime.contract.broker import TransportError
from asyncrl_runtime.contract.messages import ResumePoint
from asyncrl_runtime.transport.broker import Broker
from asyncrl_runtime.transport.resume_points import ResumePoints
from asyncrl_runtime.transport.streams import make_streams
from support.jobs.forked_processes import ForkedProcess
from support.jobs.job_harness import JobHarness, build_job
from support.jobs.nats_server import NatsServer

PASSWORDS = {"trainer": "t-secret", "worker": "w-secret"}
NAMES = JobNames.on_own_server("default", "harness")


@pytest.fixture
def guarded_nats(tmp_path: Path) -> Iterator[NatsServer]:
    users = [
        User("trainer", PASSWORDS["trainer"]),
        User("worker", PASSWORDS["worker"], worker_permissions(NAMES)),
    ]
    server = NatsServer(tmp_path / "nats", users=users)
    server.start()
    yield server
    server.kill()


def credentials(folder: Path, role: str, password: str | None = None) -> str:
    path = folder / f"{role}.json"
    path.write_text(json.dumps({"user": role, "password": password or PASSWORDS[role]}))
    return str(path)


class GuardedJob(JobHarness):
    """Its trainer and its workers are told different things, as in a cluster."""

    def __init__(self, folder: Path, server: NatsServer) -> None:
        evaluation = {"source": "harness_data:rows", "everySteps": 2, "samples": 2}
        training = {"maxSteps": 8}
        super().__init__(folder, server, build_job(evaluation=evaluation, training=training))
        assert self.config.names == NAMES
        self._trainer_config = folder / "trainer-config.json"
        for role, path in (("worker", self.folder.config), ("trainer", self._trainer_config)):
            address = NatsAddress(url=server.url, credentials_file=credentials(folder, role))
            self.config.model_copy(update={"nats": address}).save(path)

    def start_guarded_trainer(self) -> ForkedProcess:
        self.attempt += 1
        arguments = ["--config", str(self._trainer_config), "--attempt", str(self.attempt)]
        return self._fork("trainer", ["rank", *arguments])


@pytest.mark.slow
def test_a_job_runs_whole_with_the_rights_of_its_roles(guarded_nats: NatsServer, tmp_path: Path) -> None:
    """Tickets, evaluation, weight epochs, and a worker that hands back what it holds and comes again."""
    job = GuardedJob(tmp_path / "run", guarded_nats)
    with job:
        job.start_rollout()
        job.start_guarded_trainer()
        job.wait_until(lambda: job.step >= 2)
        job.signal("rollout-0-worker", signal.SIGTERM)
        assert job.wait("rollout-0-worker") == 0
        job.start("rollout-0-worker")
        assert job.wait("trainer") == 0, job.log_tail("trainer")
        assert job.report is not None and job.report.step == 8 and job.report.last_evaluation is not None
        said = (job.log_text("trainer") + job.log_text("rollout-0-worker")).lower()
        assert "permissions violation" not in said
        assert "violation" not in (guarded_nats.folder / "nats.log").read_text().lower()


@pytest.mark.slow
def test_a_job_keeps_to_the_subjects_of_its_account(tmp_path: Path) -> None:
    """A shared server is used, whose account has the subjects of `team.` and JetStream's own."""
    rights = {
        "publish": {"allow": ["team.>", "$JS.API.>", "$JS.ACK.>", "$KV.>"]},
        "subscribe": {"allow": ["team.>"]},
    }
    server = NatsServer(tmp_path / "nats", users=[User("trainer", PASSWORDS["trainer"], rights)])
    job = JobHarness(
        tmp_path / "run",
        server,
        build_job(
            messaging={"mode": "Shared", "shared": {"url": server.url, "subjectPrefix": "team"}},
            evaluation={"source": "harness_data:rows", "everySteps": 2, "samples": 2},
        ),
    )
    address = NatsAddress(url=server.url, credentials_file=credentials(tmp_path, "trainer"))
    job.config.model_copy(update={"nats": address}).save(job.folder.config)
    server.start()
    try:
        with job:
            job.start_rollout()
            job.start_trainer()
            assert job.wait("trainer") == 0, job.log_tail("trainer")
    finally:
        server.kill()
    assert "violation" not in (server.folder / "nats.log").read_text().lower()


@asynccontextmanager
async def worker_client(server: NatsServer) -> AsyncIterator[tuple[Client, "asyncio.Queue[str]"]]:
    """A plain client with a worker's password, and what the server reproaches it with."""
    reproaches: asyncio.Queue[str] = asyncio.Queue()

    async def on_error(error: Exception) -> None:
        reproaches.put_nowait(str(error).lower())

    client = Client()
    prefix = NAMES.inbox_prefix
    await client.connect(
        server.url, user="worker", password=PASSWORDS["worker"], error_cb=on_error, inbox_prefix=prefix
    )
    try:
        yield client, reproaches
    finally:
        await client.close()


@asynccontextmanager
async def connected(server: NatsServer, folder: Path, role: str) -> AsyncIterator[Broker]:
    address = NatsAddress(url=server.url, credentials_file=credentials(folder, role))
    broker = await Broker.connect(address, NAMES, role)
    try:
        yield broker
    finally:
        await broker.close()


FORBIDDEN = {
    "issue a ticket": NAMES.prompt(1),
    "ask a question": NAMES.evaluation("ask", "k"),
    "set the live values": f"$KV.{NAMES.state_bucket}.live",
    "tell a version": f"$KV.{NAMES.state_bucket}.version",
    "take the lease": f"$KV.{NAMES.lease_bucket}.holder",
    "announce": f"{NAMES.announcements}.version",
    "begin a weight epoch": NAMES.control("rollout-1"),
    "delete a stream": f"$JS.API.STREAM.DELETE.{NAMES.trajectory_stream}",
    "purge trajectories": f"$JS.API.STREAM.PURGE.{NAMES.trajectory_stream}",
    "make a consumer": f"$JS.API.CONSUMER.DURABLE.CREATE.{NAMES.trajectory_stream}.mine",
    "read others' answers": f"$JS.API.CONSUMER.MSG.NEXT.{NAMES.evaluation_stream}.answer",
    "list streams": "$JS.API.STREAM.NAMES",
}


@pytest.mark.parametrize("what", FORBIDDEN)
async def test_a_worker_may_not(guarded_nats: NatsServer, what: str) -> None:
    async with worker_client(guarded_nats) as (client, reproaches):
        await client.publish(FORBIDDEN[what], b"{}")
        reproach = await asyncio.wait_for(reproaches.get(), 5)
    assert "permissions violation for publish" in reproach


@pytest.mark.parametrize("subject", [">", NAMES.trajectory(">"), NAMES.prompt("*"), NAMES.heartbeat("*")])
async def test_a_worker_may_not_listen_to(guarded_nats: NatsServer, subject: str) -> None:
    async with worker_client(guarded_nats) as (client, reproaches):
        await client.subscribe(subject)
        reproach = await asyncio.wait_for(reproaches.get(), 5)
    assert "permissions violation for subscription" in reproach


async def test_a_worker_keeps_takes_up_and_clears_what_was_handed_back(
    guarded_nats: NatsServer, tmp_path: Path
) -> None:
    async with connected(guarded_nats, tmp_path, "trainer") as trainer:
        await make_streams(trainer.jetstream, NAMES, 2**30)
        async with connected(guarded_nats, tmp_path, "worker") as worker:
            parts = ResumePoints(worker, NAMES, await worker.jetstream.key_value(NAMES.state_bucket))
            await parts.write(ResumePoint(ticket=7, num_failures=2))
            assert await parts.read(7) == ResumePoint(ticket=7, num_failures=2)
            await parts.delete(7)
            assert await parts.read(7) is None


@pytest.mark.parametrize("file", ["wrong-password", "absent", "not-json", "no-user", "none"])
async def test_who_cannot_say_who_it_is_is_told_why(
    guarded_nats: NatsServer, tmp_path: Path, file: str
) -> None:
    path = str(tmp_path / "absent.json")
    if file == "wrong-password":
        path = credentials(tmp_path, "trainer", "guess")
    elif file == "not-json":
        (tmp_path / "absent.json").write_text("user: trainer")
    elif file == "no-user":
        (tmp_path / "absent.json").write_text("{}")
    address = NatsAddress(url=guarded_nats.url, credentials_file="" if file == "none" else path)
    with pytest.raises(TransportError) as caught:
        await Broker.connect(address, NAMES, "trainer-1", deadline_seconds=3)
    is_local = file in ("absent", "not-json", "no-user")
    assert (path if is_local else guarded_nats.url) in str(caught.value)
