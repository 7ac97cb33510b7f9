"""The trajectory plane against bare nats-py: prompt groups per second from a worker to the trainer's books.

ours: in one process the worker's end, messages made of what was sampled (per-token arrays are bytes by then),
    `publish_result` (encoding, `Broker.publish` with its retries); in another the trainer's, `OrderedReader`,
    `Books.take` (holes, duplicates, decoding, `Inbox`), where tickets are closed by the batch.
bare: the same messages, encoded beforehand, `jetstream.publish` with the same message ids; read by what is
    the fastest of nats-py's own ways (pull in batches of 16, 64 and 256, push with and without callback, were
    tried): an ordered push consumer, which acknowledges nothing either, with a callback that counts.

Both have the job's own trajectory stream on a real server, and 16 groups in flight, each waiting for its
acknowledgement. Two processes, since worker and trainer are two; with the server's that makes three on
however many cores there are, so a rate is that of all the work together. Clients stay connected; streams are
new for every run. The time is from the first publish to the last message taken. Runs alternate; the ratio is
that of the medians, and the ratios of neighboring runs show the spread.

    python tests/bench/bench_trajectories.py [--repeats 9]
"""

import argparse
import asyncio
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nats.aio.msg import Msg

sys.path.insert(0, str(Path(__file__).parent.parent))
from asyncrl_api.names import JobNames, NatsAddress
from asyncrl_runtime.contract.messages import Group, Sample, VersionSpan, encode, mask_to_bytes
from asyncrl_runtime.rollout.ticket_work import publish_result
from asyncrl_runtime.trainer.books.books import Books
from asyncrl_runtime.transport.broker import Broker
from asyncrl_runtime.transport.reader import OrderedReader
from asyncrl_runtime.transport.streams import delete_streams, make_streams
from asyncrl_runtime.transport.worker_end import WorkerEnd
from support.jobs.nats_server import NatsServer
from support.messages.samples import make_job

IN_FLIGHT = 16
BATCH_SIZE = 64
NAMES = JobNames(job="bench")
SPEC = make_job().spec
STORAGE_BYTES = 2**30
PUBLISH_SECONDS = 2.0
"""The time that `Broker.publish` waits for an acknowledgement."""


class Case(NamedTuple):
    group_size: int
    num_tokens: int
    """The tokens of each response, of 8 bytes each."""
    num_messages: int


CASES = {
    "1 x 8 KB": Case(1, 1_000, 5_000),
    "1 x 512 KB": Case(1, 64_500, 200),
    "8 x 1 KB": Case(8, 110, 5_000),
}
REACH = {"1 x 8 KB": 0.9, "1 x 512 KB": 0.9, "8 x 1 KB": 0.6}


class Run(NamedTuple):
    """What both processes are told."""

    side: str
    case: Case


def sample_fields(case: Case) -> list[dict[str, Any]]:
    """What a group's samples are made of: prompts of 32 tokens, three policy versions."""
    rng = np.random.default_rng(0)
    count = case.num_tokens
    return [
        {
            "index": index,
            "prompt_ids": rng.integers(0, 150_000, 32).astype("<i4").tobytes(),
            "response_ids": rng.integers(0, 150_000, count).astype("<i4").tobytes(),
            "behavior_logprobs": (-rng.exponential(size=count)).astype("<f4").tobytes(),
            "response_mask": mask_to_bytes([True] * count),
            "version_spans": tuple(VersionSpan(1, i, count * i // 3) for i in (1, 2, 3)),
            "reward": 1.0,
            "temperature": 1.0,
            "finish_reason": "stop",
        }
        for index in range(case.group_size)
    ]


def make_group(ticket: int, fields: Sequence[dict[str, Any]]) -> Group:
    samples = tuple(Sample(**one) for one in fields)
    return Group(ticket=ticket, group_size=len(samples), samples=samples, worker="rollout-0", seconds=1.0)


async def publish_all(address: NatsAddress, broker: Broker, run: Run) -> float:
    """Publish tickets 1 to num_messages, IN_FLIGHT side by side; return when it began."""
    fields = sample_fields(run.case)
    numbers = range(1, run.case.num_messages + 1)
    payloads = {n: encode(make_group(n, fields)) for n in numbers if run.side == "bare"}

    state = await broker.jetstream.key_value(NAMES.state_bucket)
    end = WorkerEnd(broker, address, NAMES, "rollout-0", state)

    async def publish_ours(ticket: int) -> None:
        await publish_result(end, make_group(ticket, fields))

    async def publish_bare(ticket: int) -> None:
        headers = {"Nats-Msg-Id": str(ticket)}
        subject, payload = NAMES.trajectory(ticket), payloads[ticket]
        await broker.jetstream.publish(subject, payload, timeout=PUBLISH_SECONDS, headers=headers)

    publish: Callable[[int], Awaitable[None]] = publish_ours if run.side == "ours" else publish_bare
    tickets = iter(numbers)

    async def publish_one_after_the_other() -> None:
        for ticket in tickets:
            await publish(ticket)

    began = time.monotonic()
    await asyncio.gather(*(publish_one_after_the_other() for _ in range(IN_FLIGHT)))
    return began


async def read_all(broker: Broker, run: Run) -> float:
    """Return when the last message was taken."""
    await (_read_ours if run.side == "ours" else _read_bare)(broker, run.case)
    return time.monotonic()


async def _read_ours(broker: Broker, case: Case) -> None:
    books, num_closed = Books(SPEC), 0
    books.issued(case.num_messages)  # what was not is refused
    async for message in OrderedReader(broker, NAMES.trajectory_stream, 1):
        books.take(message)
        if message.sequence == case.num_messages:
            assert num_closed + len(books.inbox.arrived) == case.num_messages, "some were refused"
            return
        if len(books.inbox.arrived) == BATCH_SIZE:
            num_closed += BATCH_SIZE
            for ticket in list(books.inbox.arrived):
                books.inbox.close(ticket)


async def _read_bare(broker: Broker, case: Case) -> None:
    num_messages, everything = 0, asyncio.Event()

    async def count(_: Msg) -> None:
        nonlocal num_messages
        num_messages += 1
        if num_messages == case.num_messages:
            everything.set()

    subscription = await broker.jetstream.subscribe(
        NAMES.trajectory(">"), stream=NAMES.trajectory_stream, cb=count, ordered_consumer=True
    )
    await everything.wait()
    await subscription.unsubscribe()


async def _work(url: str, pipe: Connection, work: Callable[[Broker, Run], Awaitable[float]]) -> None:
    """One of the two processes: do as told, and answer with a time."""
    broker = await Broker.connect(NatsAddress(url=url), NAMES, "bench")
    while (run := await asyncio.to_thread(pipe.recv)) is not None:
        pipe.send(await work(broker, run))
    await broker.close()


def run_process(url: str, pipe: Connection, is_worker: bool) -> None:
    publish = partial(publish_all, NatsAddress(url=url))
    asyncio.run(_work(url, pipe, publish if is_worker else read_all))


class Processes:
    """The worker's and the trainer's process."""

    def __init__(self, url: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        for is_worker in (True, False):
            ours, theirs = context.Pipe()
            context.Process(target=run_process, args=(url, theirs, is_worker), daemon=True).start()
            self._pipes.append(ours)
        self._broker_url = url

    async def rate(self, run: Run) -> float:
        """Messages per second."""
        broker = await Broker.connect(NatsAddress(url=self._broker_url), NAMES, "bench-setup")
        await make_streams(broker.jetstream, NAMES, STORAGE_BYTES)
        worker, trainer = self._pipes
        trainer.send(run)
        worker.send(run)
        began: float = await asyncio.to_thread(worker.recv)
        ended: float = await asyncio.to_thread(trainer.recv)
        await delete_streams(broker.jetstream, NAMES)
        await broker.close()
        return run.case.num_messages / (ended - began)

    def end(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)


def row(name: str, ours: Sequence[float], bare: Sequence[float]) -> str:
    pairs = [a / b for a, b in zip(ours, bare, strict=True)]
    size = len(encode(make_group(1, sample_fields(CASES[name]))))
    columns: list[Any] = [
        name,
        f"{size / 1e3:.1f} KB",
        f"{statistics.median(ours):.0f}",
        f"{statistics.median(bare):.0f}",
        f"{statistics.median(ours) / statistics.median(bare):.2f}",
        f"{min(pairs):.2f} .. {statistics.median(pairs):.2f} .. {max(pairs):.2f}",
        REACH[name],
    ]
    return "| " + " | ".join(str(column) for column in columns) + " |"


async def measure(url: str, repeats: int) -> None:
    processes = Processes(url)
    print("| a message | bytes | ours, msg/s | bare, msg/s | ratio | least, median, most of a pair | reach |")
    print("|---|---|---|---|---|---|---|")
    for name, case in CASES.items():
        rates: dict[str, list[float]] = {"ours": [], "bare": []}
        for repeat in range(repeats + 1):
            for side in rates if repeat % 2 else reversed(rates):
                rate = await processes.rate(Run(side, case))
                if repeat:  # the first warms up
                    rates[side].append(rate)
        print(row(name, rates["ours"], rates["bare"]), flush=True)
    processes.end()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = NatsServer(Path(folder))
        server.start()
        try:
            asyncio.run(measure(server.url, options.repeats))
        finally:
            server.kill()


if __name__ == "__main__":
    main()
