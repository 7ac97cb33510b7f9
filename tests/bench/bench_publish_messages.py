"""What a publication to many engines costs the controller: messages, and its own CPU, over a real broker.

to all: `WeightPublisher.publish` in a group that has formed, with broadcasts that take no time.
one by one: the same phases, each worker asked by a request of its own: to prepare, for each bucket, to
    commit. So it was done before there was one message to all.

Workers are one process with a subscription for each, which say yes to everything. Only the controller's side
is measured; there are no engines and no data. Both ways alternate in one run; the numbers are medians.

    python tests/bench/bench_publish_messages.py [--engines 32 128 512] [--buckets 12]
"""

import argparse
import asyncio
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from nats.aio.msg import Msg
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from asyncrl_api.names import JobNames, NatsAddress
from asyncrl_runtime.contract.messages import (
    CommitUpdate,
    ControlReply,
    Heartbeat,
    Message,
    PolicyVersion,
    PrepareUpdate,
    ReceiveWeights,
    encode,
)
from asyncrl_runtime.transport.broker import Broker
from asyncrl_runtime.weights.bucket import PublishedWeights, describe
from asyncrl_runtime.weights.fleet import Fleet
from asyncrl_runtime.weights.publisher import WeightPublisher
from support.jobs.nats_server import NatsServer

NAMES = JobNames(job="bench_messages")
TIMEOUT_SECONDS = 60.0


class CountingBroker(Broker):
    """A broker that counts the messages that are sent through it."""

    num_messages = 0

    async def request(self, subject: str, payload: bytes, timeout_seconds: float) -> bytes | None:
        self.num_messages += 1
        return await super().request(subject, payload, timeout_seconds)

    def request_all(self, *arguments):  # type: ignore[no-untyped-def]
        self.num_messages += 1
        return super().request_all(*arguments)


class InstantGroup:
    """A weight group, and the place where it meets, through which nothing is sent."""

    port = 1

    def open_place(self, host: str) -> "InstantGroup":
        return self

    async def form(self, world_size: int, name: str, backend: str, timeout_seconds: float) -> "InstantGroup":
        return self

    async def broadcast(self, data: Tensor) -> None:
        await asyncio.sleep(0)

    async def leave(self) -> None:
        pass

    def close(self) -> None:
        pass


def work(url: str, workers: list[str]) -> None:
    """Pose as workers that say yes to everything."""
    asyncio.run(_work(url, workers))


async def _work(url: str, workers: list[str]) -> None:
    broker = await Broker.connect(NatsAddress(url=url), NAMES, "workers")

    def answering(worker: str):  # type: ignore[no-untyped-def]
        yes = encode(ControlReply(ok=True, worker=worker))

        async def on_message(message: Msg) -> None:
            await message.respond(yes)

        return on_message

    for worker in workers:
        for subject in (NAMES.control(worker), NAMES.control_all):
            await broker.client.subscribe(subject, cb=answering(worker))
    await broker.client.flush()
    await broker.client.publish(NAMES.heartbeat("ready"), b"")
    await broker.closed.wait()


async def measure(url: str, num_engines: int, num_buckets: int, repeats: int) -> list[str]:
    """Return the lines of the table."""
    broker = await CountingBroker.connect(NatsAddress(url=url), NAMES, "controller")
    workers = [f"rollout-{number}" for number in range(num_engines)]
    is_ready = asyncio.Event()

    async def on_ready(message: Msg) -> None:
        is_ready.set()

    await broker.client.subscribe(NAMES.heartbeat("ready"), cb=on_ready)
    await broker.client.flush()
    process = multiprocessing.get_context("spawn").Process(target=work, args=(url, workers), daemon=True)
    process.start()
    await is_ready.wait()
    fleet = Fleet(time.monotonic)
    publisher = make_publisher(broker, fleet, num_buckets)
    seen: dict[str, list[tuple[int, float, float]]] = {"one by one": [], "to all": []}
    for repeat in range(repeats + 1):
        version = PolicyVersion(1, repeat)
        for worker in workers:
            fleet.heard(
                Heartbeat(worker=worker, incarnation="i", engine="e", engine_state="ready", version=None)
            )
        ways = {
            "to all": publish_to_all(publisher, version, num_engines),
            "one by one": ask_one_by_one(broker, workers, version, num_buckets),
        }
        for way, publication in ways.items():
            messages, cpu, began = broker.num_messages, time.process_time(), time.perf_counter()
            await publication
            figures = (
                broker.num_messages - messages,
                time.process_time() - cpu,
                time.perf_counter() - began,
            )
            if repeat:  # the first joins the group
                seen[way].append(figures)
    process.terminate()
    await broker.close()
    return [_row(num_engines, num_buckets, way, each) for way, each in seen.items()]


def make_publisher(broker: Broker, fleet: Fleet, num_buckets: int) -> WeightPublisher:
    async def gather(names: tuple[str, ...]) -> Tensor:
        return torch.zeros(4, dtype=torch.uint8)

    layout = tuple(describe([(f"w{number}", torch.float32, (1,))]) for number in range(num_buckets))
    return WeightPublisher(
        broker,
        NAMES,
        fleet,
        PublishedWeights(layout, gather),
        InstantGroup(),
        attempt=1,
        host="127.0.0.1",
        backend="gloo",
        model_bytes=0,
        timeout_seconds=TIMEOUT_SECONDS,
    )


async def publish_to_all(publisher: WeightPublisher, version: PolicyVersion, num_engines: int) -> None:
    published = await publisher.publish(version, "Retract")
    assert len(published.engines) == num_engines, published.failed


async def ask_one_by_one(
    broker: Broker, workers: list[str], version: PolicyVersion, num_buckets: int
) -> None:
    groups = ("wu-1-1",)
    bucket = ReceiveWeights(groups=groups, version=version, timeout_seconds=TIMEOUT_SECONDS)
    prepare = PrepareUpdate(
        groups=groups, version=version, interrupt="Retract", timeout_seconds=TIMEOUT_SECONDS
    )
    phases: list[Message] = [
        prepare,
        *[bucket] * num_buckets,
        CommitUpdate(groups=groups, version=version),
    ]
    for phase in phases:
        asked = (broker.request(NAMES.control(worker), encode(phase), TIMEOUT_SECONDS) for worker in workers)
        assert None not in await asyncio.gather(*asked)


def _row(num_engines: int, num_buckets: int, way: str, seen: list[tuple[int, float, float]]) -> str:
    messages, cpu, wall = (statistics.median(each) for each in zip(*seen, strict=True))
    return f"| {num_engines} | {num_buckets} | {way} | {messages:.0f} | {cpu * 1e3:.0f} | {wall * 1e3:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engines", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--buckets", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    columns = ["engines", "buckets", "asked", "messages sent", "controller's CPU, ms", "wall, ms"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    with tempfile.TemporaryDirectory() as folder:
        server = NatsServer(Path(folder))
        server.start()
        try:
            for num_engines in options.engines:
                rows = asyncio.run(measure(server.url, num_engines, options.buckets, options.repeats))
                print("\n".join(rows), flush=True)
        finally:
            server.kill()


if __name__ == "__main__":
    main()
