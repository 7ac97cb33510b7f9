"""What benchmarks of weight updates share: a policy in this process, engines and their workers beside it."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import torch
import torch.distributed as dist
from nats.aio.msg import Msg
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from asyncrl_api.job import AsyncRLJob
from asyncrl_runtime.contract.messages import Heartbeat, PolicyVersion, decode
from asyncrl_runtime.trainer.update.policy import Policy
from asyncrl_runtime.transport.broker import Broker
from asyncrl_runtime.transport.streams import make_streams
from asyncrl_runtime.weights.bucket import PublishedWeights
from asyncrl_runtime.weights.copies import ShareCopy, make_copy_group
from asyncrl_runtime.weights.fleet import Fleet
from asyncrl_runtime.weights.group import TorchGroups
from asyncrl_runtime.weights.publisher import WeightPublisher
from support.jobs.job_harness import JobHarness, until
from support.jobs.nats_server import NatsServer

LOOPBACK = "127.0.0.1"


def prepare_process() -> None:
    """Make this process a trainer of one rank and one thread."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)


def load_policy(model_folder: Path, job: AsyncRLJob) -> Policy:
    spec = job.spec
    return Policy(
        model_folder,
        dtype=spec.model.dtype,
        training=spec.training,
        algorithm=spec.algorithm,
        deepspeed=spec.trainer.deepspeed,
    )


class PolicyAndEngines:
    """Brings the policy's weights to all engines of a job; made by `open_engines`."""

    def __init__(
        self,
        policy: Policy,
        publisher: WeightPublisher,
        fleet: Fleet,
        urls: list[str],
    ) -> None:
        self.policy = policy
        self.publisher = publisher
        self._fleet = fleet
        self.version = PolicyVersion(1, 0)
        """The version that was published last."""
        self.urls = urls
        """The URLs of the engines."""

    @property
    def num_bytes(self) -> int:
        return self.policy.num_bytes

    async def publish(self) -> float:
        """Publish the weights under the next version and return the seconds; every engine attests it."""
        self.version = PolicyVersion(1, self.version.version + 1)
        await until(lambda: len(self._fleet.living) == len(self.urls))  # a busy machine lets them fall silent
        began = time.perf_counter()
        published = await self.publisher.publish(self.version, "Retract")
        seconds = time.perf_counter() - began
        assert (len(published.engines), published.num_epochs) == (len(self.urls), 1), published
        async with httpx.AsyncClient() as http:
            for url in self.urls:
                label = (await http.get(f"{url}/model_info")).json()["weight_version"]
                assert label == str(self.version), f"{url} is at {label}, not at {self.version}"
        return seconds


def weights_of(policy: Policy, bucket_megabytes: int) -> PublishedWeights:
    """Return a copy of the weights as they are now."""
    layout = [policy.layout(names) for names in policy.buckets(bucket_megabytes * 2**20)]
    copy = ShareCopy(layout, policy.shares, make_copy_group())
    copy.take()

    async def gather(names: tuple[str, ...]) -> Tensor:
        return await asyncio.to_thread(copy.gather, names)

    return PublishedWeights(copy.layout, gather)


@contextlib.asynccontextmanager
async def open_engines(
    folder: Path, job: AsyncRLJob, make_policy: Callable[[], Policy], num_engines: int
) -> AsyncIterator[PolicyAndEngines]:
    """Start a NATS server and `num_engines` engines with their workers, as the local runner does."""
    server = NatsServer(folder / "nats")
    server.start()
    try:
        with JobHarness(folder / "run", server, job) as harness:
            names = harness.config.names
            for replica in range(num_engines):
                harness.start_rollout(replica)
            broker = await Broker.connect(harness.config.nats, names, "controller")
            await make_streams(broker.jetstream, names, 2**28)
            fleet = await _hear_heartbeats(broker, names.heartbeat("*"))
            policy = await asyncio.to_thread(make_policy)
            publisher = WeightPublisher(
                broker,
                names,
                fleet,
                weights_of(policy, job.spec.weight_sync.bucket_megabytes),
                TorchGroups(),
                attempt=1,
                host=LOOPBACK,
                backend="gloo",
                model_bytes=policy.num_bytes,
            )
            states = ["empty"] * num_engines
            await asyncio.to_thread(
                harness.wait_until,
                lambda: [beat.engine_state for beat in fleet.living] == states,
                180,
            )
            urls = [f"http://{LOOPBACK}:{harness.engine_port(replica)}" for replica in range(num_engines)]
            yield PolicyAndEngines(policy, publisher, fleet, urls)
            await publisher.leave()
            await broker.close()
    finally:
        server.kill()


async def _hear_heartbeats(broker: Broker, subject: str) -> Fleet:
    fleet = Fleet(time.monotonic)

    async def heard(message: Msg) -> None:
        fleet.heard(decode(message.data, Heartbeat))

    await broker.client.subscribe(subject, cb=heard)
    return fleet
