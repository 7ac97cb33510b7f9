"""CPU seconds of a rollout worker per answer, from the engine's stream to the group that is stored.

engine: a process of its own that speaks SGLang's HTTP. Each request is answered by a stream of chunks in
    SGLang's form, each with the tokens that are new, as often as the worker asks for, at a steady pace.
worker: the product's `Worker` in a process of its own, as it is in a pod: HTTP client, sessions, tokenizer,
    scoring in a reward process, groups encoded and published to a real nats-server. Only the updates of the
    weights are left out.

Only the CPU time of the process of the worker counts, over the answers, so that a busy machine changes it
little; the tokens/s of one core are its inverse. With `--baseline`, the same is done with the code of another
checkout in the same run, by turns.

    python tests/bench/bench_worker.py [--baseline CHECKOUT] [--lengths 4096 9216 16384] [--open 304]
"""

import argparse
import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from asyncrl_api.job import Spec
from asyncrl_api.names import JobNames, NatsAddress
from asyncrl_api.run_config import RunConfig
from asyncrl_runtime.contract.messages import (
    CommitUpdate,
    ControlReply,
    ControlRequest,
    PolicyVersion,
    Ticket,
    encode,
)
from asyncrl_runtime.rollout.engine_updates import EngineUpdates

GROUP_SIZE = 16
VERSION = PolicyVersion(1, 0)
NAMES = JobNames(job="bench")
STORAGE_BYTES = 4 * 2**30
NUM_IDS = 500
START_SECONDS = 120.0
RUN_SECONDS = 1800.0
CORE_TOKENS_PER_SECOND = 20_000
ANSWER_SECONDS = 0.1
HEADER = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


# -- the engine


class Pieces:
    """Chunks with `interval` tokens each, encoded beforehand up to the counts that differ."""

    def __init__(self, interval: int) -> None:
        rng = random.Random(interval)
        self.made = [self._piece([rng.randrange(3, NUM_IDS) for _ in range(interval)]) for _ in range(32)]

    def _piece(self, ids: list[int]) -> tuple[bytes, bytes]:
        meta = {
            "id": f"{random.getrandbits(128):032x}",
            "prompt_tokens": 9,
            "weight_version": str(VERSION),
            "num_retractions": 0,
            "reasoning_tokens": 0,
            "cached_tokens": 0,
            "cached_tokens_details": None,
            "dp_rank": None,
            "input_token_logprobs": [],
            "output_token_logprobs": [[-random.expovariate(1.0), token, None] for token in ids],
            "output_token_logprobs_length": len(ids),
        }
        whole = msgspec.json.encode({"text": " word" * len(ids), "output_ids": ids, "meta_info": meta})
        return b"data: " + whole[:-2] + b',"completion_tokens":', b"}}\n\n"

    def chunk(self, nth: int, count: int, length: int) -> bytes:
        begin, end = self.made[nth % len(self.made)]
        rest: dict[str, Any] = {"finish_reason": None}
        if count == length:
            spans = [{"version": str(VERSION), "start": 0, "end": length}]
            rest = {"finish_reason": {"type": "length", "length": length}, "weight_versions": spans}
        return b"%b%d,%b%b" % (begin, count, msgspec.json.encode(rest)[1:-1], end)


class FakeEngine:
    """Answers as SGLang does, with random tokens: `tokens_per_second` in each stream."""

    def __init__(self, tokens_per_second: float) -> None:
        self._pace = tokens_per_second
        self._pieces: dict[int, Pieces] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                line, *headers = head.decode().lower().split("\r\n")
                fields = dict(header.split(": ", 1) for header in headers if header)
                data = await reader.readexactly(int(fields.get("content-length", 0)))
                path = line.split(" ")[1]
                if path == "/generate":
                    body = msgspec.json.decode(data)
                    if not body.get("stream"):  # a stream has broken: that is not what is measured
                        os._exit(1)
                    await self._generate(body["sampling_params"], writer)
                else:
                    answer = b"" if path == "/metrics" else msgspec.json.encode(self._answer())
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(answer) + answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _answer(self) -> dict[str, Any]:
        return {"weight_version": str(VERSION), "tp_size": 1, "success": True}

    async def _generate(self, sampling: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        length, interval = sampling["max_new_tokens"], sampling["stream_interval"]
        pieces = self._pieces.setdefault(interval, Pieces(interval))
        assert length % interval == 0, "the pieces are whole ones"
        writer.write(HEADER)
        await asyncio.sleep(random.random() * interval / self._pace)
        for nth, count in enumerate(range(interval, length + 1, interval)):
            chunk = pieces.chunk(nth, count, length)
            writer.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            await writer.drain()
            await asyncio.sleep(interval / self._pace)
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


async def run_engine(tokens_per_second: float) -> None:
    server = await asyncio.start_server(FakeEngine(tokens_per_second).serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


# -- the worker


class NoUpdates(EngineUpdates):
    """The engine has its weights from the start, and no others come."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.engine_restarted()

    def engine_restarted(self) -> None:
        super().engine_restarted()
        self._seen.version = VERSION

    async def _phase(self, request: ControlRequest) -> ControlReply:
        assert not isinstance(request, CommitUpdate)
        return ControlReply(ok=True)

    async def _retreat(self) -> None:
        pass


async def run_worker(config: RunConfig, engine_url: str) -> None:
    from asyncrl_runtime.model.source import ensure_model, load_tokenizer, vocab_size
    from asyncrl_runtime.rollout.engine_client import EngineClient
    from asyncrl_runtime.rollout.prompts import PromptRenderer
    from asyncrl_runtime.rollout.rewards.scorer import make_scorer
    from asyncrl_runtime.rollout.worker import Worker
    from asyncrl_runtime.rollout.workflows import make_workflow
    from asyncrl_runtime.transport.worker_end import WorkerEnd

    spec = config.spec
    folder = ensure_model(spec.model, config.model_cache, 0)
    renderer = PromptRenderer(load_tokenizer(folder), spec.dataset.prompt_field)
    scorer = make_scorer(
        spec.reward,
        answer_field=spec.dataset.answer_field,
        import_paths=config.import_paths,
        num_processes=1,
    )
    broker = await WorkerEnd.connect(config.nats, NAMES, "worker")
    engine = EngineClient(engine_url, vocab_size(folder))
    async with scorer:
        worker = Worker(
            "worker", spec, broker, engine, NoUpdates, renderer, make_workflow(spec.workflow), scorer
        )
        print("ready", flush=True)
        await worker.run()


# -- the trainer's place: it issues tickets and counts groups


class Figures(NamedTuple):
    cpu_per_answer: float
    seconds: float
    rss_mib: float


def started(*arguments: str, checkout: Path | None = None) -> subprocess.Popen[str]:
    """Start this file as another process, with the code of a checkout."""
    env = dict(os.environ)
    if checkout is not None:
        env["PYTHONPATH"] = os.pathsep.join(str(checkout / root) for root in ("crds", "runtime", "examples"))
    command = [sys.executable, __file__, *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


@contextmanager
def ended(*processes: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


async def measure(
    config: RunConfig, folder: Path, length: int, num_groups: int, checkout: Path, pace: float
) -> Figures:
    from asyncrl_runtime.transport.broker import Broker
    from asyncrl_runtime.transport.streams import delete_streams, make_streams

    broker = await Broker.connect(config.nats, NAMES, "trainer")
    await make_streams(broker.jetstream, NAMES, STORAGE_BYTES)
    engine = started("--as", "engine", "--pace", str(pace))
    assert engine.stdout is not None
    url = f"http://127.0.0.1:{int(engine.stdout.readline())}"
    worker = started(
        "--as", "worker", "--config", str(folder / "config.json"), "--url", url, checkout=checkout
    )
    assert worker.stdout is not None
    with ended(engine, worker):
        assert worker.stdout.readline() == "ready\n"
        process = psutil.Process(worker.pid)
        await asyncio.sleep(2)  # it has looked at its engine by then
        before, began = cpu_seconds(process), time.monotonic()
        for number in range(1, num_groups + 1):
            ticket = Ticket(
                ticket=number,
                row={"question": "1 + 1 ="},
                group_size=GROUP_SIZE,
                max_new_tokens=length,
                temperature=1.0,
            )
            await broker.jetstream.publish(NAMES.prompt(number), encode(ticket))
        while (await broker.jetstream.stream_info(NAMES.prompt_stream)).state.messages:
            assert worker.poll() is None and engine.poll() is None, "a process has ended"
            assert time.monotonic() - began < RUN_SECONDS
            await asyncio.sleep(0.5)
        used, seconds = cpu_seconds(process) - before, time.monotonic() - began
        rss = process.memory_info().rss / 2**20
    stored = (await broker.jetstream.stream_info(NAMES.trajectory_stream)).state.bytes
    num_answers = num_groups * GROUP_SIZE
    assert stored >= num_answers * length * 8, f"{stored} bytes for {num_answers} answers"
    await delete_streams(broker.jetstream, NAMES)
    await broker.close()
    return Figures(used / num_answers, seconds, rss)


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def make_spec(max_open: int, length: int) -> Spec:
    from support.jobs.job_harness import build_job

    return build_job(
        model={"contextLength": length + 64},
        sampling={"groupSize": GROUP_SIZE, "maxNewTokens": length},
        training={"tokensPerMicroBatch": length + 64},
        rollout={"maxConcurrency": max_open},
    ).spec


async def compare(options: argparse.Namespace) -> None:
    from support.jobs.nats_server import NatsServer
    from support.paths import USER_CODE

    checkouts = {"this": Path(__file__).parents[2]}
    if options.baseline:
        checkouts = {"baseline": options.baseline.resolve(), **checkouts}
    print("| answer | code | CPU s per answer | tokens/s and core | wall s | RSS, MiB | ratio |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="bench-worker-") as scratch:
        folder = Path(scratch)
        nats = NatsServer(folder / "nats", store_bytes=2 * STORAGE_BYTES)
        nats.start()
        try:
            for length in options.lengths:
                spec = make_spec(options.open, length)
                config = RunConfig(
                    namespace="n",
                    name="bench",
                    uid="u",
                    spec=spec,
                    nats=NatsAddress(url=nats.url),
                    job_folder=folder,
                    live_file=folder / "live",
                    report_file=folder / "report",
                    model_cache=folder / "cache",
                    import_paths=(USER_CODE,),
                )
                config.save(folder / "config.json")
                pace = options.tokens_per_second / options.open
                for _ in range(options.repeats):
                    costs: dict[str, float] = {}
                    for name, checkout in checkouts.items():
                        num_groups = options.open // GROUP_SIZE * options.rounds
                        figures = await measure(config, folder, length, num_groups, checkout, pace)
                        costs[name] = figures.cpu_per_answer
                        ratio = f"{costs['baseline'] / costs[name]:.2f}" if "baseline" in costs else ""
                        print(
                            f"| {length} | {name} | {figures.cpu_per_answer:.3f} "
                            f"| {length / figures.cpu_per_answer:,.0f} | {figures.seconds:.0f} "
                            f"| {figures.rss_mib:.0f} | {ratio} |",
                            flush=True,
                        )
        finally:
            nats.kill()
    print(f"\nreach: {ANSWER_SECONDS} s for 16,384 tokens; {CORE_TOKENS_PER_SECOND:,} tokens/s and core")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--as", dest="role", choices=("engine", "worker", "trainer"), default="trainer")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--url")
    parser.add_argument("--pace", type=float)
    parser.add_argument("--baseline", type=Path, help="another checkout, to compare with")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 9216, 16384])
    parser.add_argument("--open", type=int, default=304, help="streams that are open at a time")
    parser.add_argument("--rounds", type=int, default=1, help="answers of each stream, one after the other")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--tokens-per-second", type=float, default=60_000, help="of all streams together")
    options = parser.parse_args()
    if options.role == "engine":
        asyncio.run(run_engine(options.pace))
    elif options.role == "worker":
        asyncio.run(run_worker(RunConfig.load(options.config), options.url))
    else:
        asyncio.run(compare(options))


if __name__ == "__main__":
    main()
