"""The trajectory plane against what else carries samples to a trainer: Redis Streams and Ray's queue.

ours: as in bench_trajectories.py, whose messages, numbers in flight and two processes all sides have.
    Guaranteed: an acknowledged group survives kills of every process; one that is published again, or read
    again, counts once; a hole is noticed and read again; the server refuses what exceeds its bytes.
Redis: XADD, then XREAD in batches of 64 from the last id seen; the server's append-only file is flushed every
    second, as NATS' is every two minutes. Guaranteed: what was acknowledged survives kills. Not: once only (a
    retried XADD is stored twice); a bound in bytes (it takes memory until it is killed).
Ray: `ray.util.queue.Queue`, 16 puts and 16 gets side by side, between two actors. Guaranteed: nothing; what
    is in it goes with its process.

Each is measured in turn, as often as `--repeats` says, after one run that warms up. Redis and Ray are no
dependencies of asyncrl: `pip install redis ray`, and `redis-server` on the PATH.

    python tests/bench/bench_trajectory_peers.py [--repeats 5]
"""

import argparse
import asyncio
import importlib
import multiprocessing
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from asyncrl_runtime.contract.messages import encode
from bench.bench_trajectories import CASES, IN_FLIGHT, Case, Processes, Run, make_group, sample_fields
from support.jobs.nats_server import NatsServer, free_port

READ_AT_ONCE = 64
STREAM, FIELD = "trajectories", b"group"
START_SECONDS = 20.0


def payloads(case: Case) -> list[bytes]:
    """The messages, encoded as ours are."""
    fields = sample_fields(case)
    return [encode(make_group(ticket, fields)) for ticket in range(1, case.num_messages + 1)]


async def put_all(messages: list[bytes], put: Callable[[bytes], Awaitable[Any]]) -> float:
    """Put them all, IN_FLIGHT side by side; return when it began."""
    left = iter(messages)

    async def put_one_after_the_other() -> None:
        for message in left:
            await put(message)

    began = time.monotonic()
    await asyncio.gather(*(put_one_after_the_other() for _ in range(IN_FLIGHT)))
    return began


# Redis Streams


def redis_client(port: int) -> Any:
    return importlib.import_module("redis.asyncio").Redis(port=port)


class RedisServer:
    """A server with an append-only file in a folder."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        flags = {"port": self.port, "dir": folder, "appendonly": "yes", "appendfsync": "everysec", "save": ""}
        command = ["redis-server", "--bind", "127.0.0.1"]
        for name, value in flags.items():
            command += [f"--{name}", str(value)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + START_SECONDS
        while socket.socket().connect_ex(("127.0.0.1", self.port)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"redis-server does not listen after {START_SECONDS:.0f} s")
            time.sleep(0.05)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


async def _write_to_redis(client: Any, case: Case) -> float:
    return await put_all(payloads(case), lambda message: client.xadd(STREAM, {FIELD: message}))


async def _read_from_redis(client: Any, case: Case) -> float:
    last, num_messages = "0", 0
    while num_messages < case.num_messages:
        for _, entries in await client.xread({STREAM: last}, count=READ_AT_ONCE, block=1000):
            num_messages += len(entries)
            last = entries[-1][0]
    return time.monotonic()


async def _serve_redis(port: int, pipe: Connection, work: Callable[[Any, Case], Awaitable[float]]) -> None:
    client = redis_client(port)
    while (case := await asyncio.to_thread(pipe.recv)) is not None:
        pipe.send(await work(client, case))
    await client.aclose()


def run_redis_process(port: int, pipe: Connection, is_worker: bool) -> None:
    asyncio.run(_serve_redis(port, pipe, _write_to_redis if is_worker else _read_from_redis))


class RedisPlane:
    """Two processes on a server of their own."""

    def __init__(self, folder: Path) -> None:
        self._server = RedisServer(folder)
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        for is_worker in (True, False):
            ours, theirs = context.Pipe()
            arguments = (self._server.port, theirs, is_worker)
            context.Process(target=run_redis_process, args=arguments, daemon=True).start()
            self._pipes.append(ours)

    async def rate(self, case: Case) -> float:
        client = redis_client(self._server.port)
        await client.delete(STREAM)
        await client.aclose()
        worker, trainer = self._pipes
        trainer.send(case)
        worker.send(case)
        began: float = await asyncio.to_thread(worker.recv)
        ended: float = await asyncio.to_thread(trainer.recv)
        return case.num_messages / (ended - began)

    def end(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        self._server.kill()


# Ray's queue


class RayPlane:
    """Two actors, and the queue between them, which is a third."""

    def __init__(self) -> None:
        ray: Any = importlib.import_module("ray")  # no dependency, so no types
        folders = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(folders)}}
        self._ray = ray
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=environment)
        self._queue: Any = importlib.import_module("ray.util.queue").Queue()

        @ray.remote
        class End:
            async def write(self, queue: Any, case: Case) -> float:
                return await put_all(payloads(case), queue.put_async)

            async def read(self, queue: Any, case: Case) -> float:
                async def get_some(count: int) -> None:
                    for _ in range(count):
                        await queue.get_async()

                shares = [len(range(first, case.num_messages, IN_FLIGHT)) for first in range(IN_FLIGHT)]
                await asyncio.gather(*map(get_some, shares))
                return time.monotonic()

        end: Any = End  # ray has given it more than its class has
        self._worker, self._trainer = end.remote(), end.remote()

    async def rate(self, case: Case) -> float:
        ended = self._trainer.read.remote(self._queue, case)
        began: float = await self._worker.write.remote(self._queue, case)
        seconds: float = await ended - began
        return case.num_messages / seconds

    def end(self) -> None:
        self._ray.shutdown()


# All in turn


async def measure(folder: Path, repeats: int) -> None:
    server = NatsServer(folder / "nats")
    server.start()
    (folder / "redis").mkdir()
    ours, redis, ray = Processes(server.url), RedisPlane(folder / "redis"), RayPlane()
    sides: dict[str, Callable[[Case], Awaitable[float]]] = {
        "ours": lambda case: ours.rate(Run("ours", case)),
        "redis": redis.rate,
        "ray": ray.rate,
    }
    print("| a message | ours, msg/s | Redis, msg/s | Ray, msg/s | ours over Redis | ours over Ray |")
    print("|---|---|---|---|---|---|")
    for name, case in CASES.items():
        rates: dict[str, list[float]] = {side: [] for side in sides}
        for repeat in range(repeats + 1):
            for side, rate in sides.items():
                found = await rate(case)
                if repeat:  # the first warms up
                    rates[side].append(found)
        median = {side: statistics.median(found) for side, found in rates.items()}
        columns = [name, *(f"{median[side]:.0f}" for side in sides)]
        columns += [f"{median['ours'] / median[side]:.2f}" for side in ("redis", "ray")]
        print("| " + " | ".join(columns) + " |", flush=True)
    for plane in (ours, redis, ray):
        plane.end()
    server.kill()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if shutil.which("redis-server") is None:
        parser.error("redis-server is not on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(Path(folder), options.repeats))


if __name__ == "__main__":
    main()
