"""A whole weight update against a raw gloo broadcast of the same bytes to the same number of processes.

update: `WeightPublisher.publish` through all its phases, from a Policy's parameters in buckets, over NATS to
    the workers of two engines, as the local runner starts them: pause and begin, flatten and broadcast,
    load into the live parameters, end and continue. It ends when both workers have said so; then both engines
    must attest the version. `with join`: the same after the group was left, so that a store is opened and a
    group of three is formed again, as where an engine came or went.
loading: the part of `update` between the ends of the broadcasts and the engines' answers to them, in which
    they copy what came into their parameters. On SGLang the reach holds for `update` without it.
raw: `torch.distributed.broadcast` of one tensor of uint8 from this process to two others that do nothing
    else, until both have it.

Engines have one thread each and nothing to sample. Runs alternate; the ratio is that of the medians. At the
end CPU engines' checksums are compared with the policy's weights, which were changed meanwhile; SGLang has
checksums on GPUs alone.

`--pause` compares instead how long engines sample nothing, with `weightSync.mode` Direct and Staged, while
one weight in a hundred changes.

    python tests/bench/bench_weights.py [--repeats 11] [--pause]
    ASYNCRL_SGLANG_PYTHON=... python tests/bench/bench_weights.py --engine SGLang
"""

import argparse
import asyncio
import hashlib
import multiprocessing
import statistics
import sys
import tempfile
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import httpx
import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from asyncrl_api.job import AsyncRLJob
from asyncrl_runtime.trainer.update.policy import Policy
from asyncrl_runtime.weights.group import TorchGroup, host_group, join_group, open_store
from asyncrl_runtime.weights.publisher import WeightPublisher
from support.engines.policy_and_engines import (
    LOOPBACK,
    PolicyAndEngines,
    load_policy,
    open_engines,
    prepare_process,
)
from support.engines.tiny_models import build_model
from support.jobs.job_harness import build_job

NUM_ENGINES = 2
GROUP = "raw"
TIMEOUT_SECONDS = 60.0


class Size(NamedTuple):
    dtype: str
    shape: dict[str, Any]
    reach: str


SIZES = {
    "3.4 MB, fp32": Size(
        "Float32",
        {"hidden_size": 128, "num_layers": 4, "vocabulary_size": 512, "tie_word_embeddings": True},
        "raw + 40 ms",
    ),
    "270 MB, bf16": Size(
        "BFloat16",
        {"hidden_size": 1024, "num_layers": 10, "vocabulary_size": 4096, "initializer_range": 0.02},
        "1.7",
    ),
    "270 MB, fp32": Size(
        "Float32",
        {"hidden_size": 1024, "num_layers": 5, "vocabulary_size": 2048, "initializer_range": 0.02},
        "1.7",
    ),
}


class RawBroadcast:
    """Two processes that receive one tensor again and again."""

    def __init__(self, num_bytes: int) -> None:
        context = multiprocessing.get_context("spawn")
        store = open_store(LOOPBACK)
        self._pipes: list[Connection] = []
        for rank in range(1, NUM_ENGINES + 1):
            ours, theirs = context.Pipe()
            arguments = (store.port, rank, num_bytes, theirs)
            context.Process(target=receive_for_ever, args=arguments, daemon=True).start()
            self._pipes.append(ours)
        self._tensor = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
        self._group = host_group(store, 1 + NUM_ENGINES, GROUP, "gloo", TIMEOUT_SECONDS)
        self._store = store

    def run(self) -> float:
        """Return the seconds until both processes have the tensor."""
        for pipe in self._pipes:
            pipe.send(True)
            pipe.recv()  # it is about to receive
        began = time.monotonic()
        dist.broadcast(self._tensor, src=0, group=self._group)
        ended: float = max(pipe.recv() for pipe in self._pipes)
        return ended - began

    def end(self) -> None:
        for pipe in self._pipes:
            pipe.send(False)
        dist.destroy_process_group(self._group)
        self._store.close()


def receive_for_ever(port: int, rank: int, num_bytes: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    group = join_group(LOOPBACK, port, rank, 1 + NUM_ENGINES, GROUP, "gloo", TIMEOUT_SECONDS)
    tensor = torch.zeros(num_bytes, dtype=torch.uint8)
    while pipe.recv():
        pipe.send(True)
        dist.broadcast(tensor, src=0, group=group)
        pipe.send(time.monotonic())


class Stopwatch:
    """Takes the time that engines need after each broadcast of a publisher."""

    def __init__(self, publisher: WeightPublisher) -> None:
        self._expect, broadcast = publisher._expect, TorchGroup.broadcast
        vars(publisher).update(_expect=self._run_expect)
        self._ended = self.loading = 0.0

        async def timed(group: TorchGroup, data: Tensor) -> None:
            await broadcast(group, data)
            self._ended = time.perf_counter()

        patch.object(TorchGroup, "broadcast", timed).start()

    def _run_expect(self, replies: Any, phase: str) -> None:
        if phase == "transfer":
            self.loading += time.perf_counter() - self._ended
        self._expect(replies, phase)


def _job(model: Path, size: Size, engine: str, weight_sync: dict[str, Any]) -> AsyncRLJob:
    return build_job(
        model,
        model={"dtype": size.dtype},
        rollout={"engine": {"type": engine}},
        gpuBudget={
            "total": 1 + NUM_ENGINES,
            "mode": "Manual",
            "split": {"trainer": 1, "rollout": NUM_ENGINES},
        },
        weightSync=weight_sync,
    )


async def measure(name: str, folder: Path, engine: str, repeats: int) -> str:
    """Return the line of the table for one size."""
    size = SIZES[name]
    dtype = torch.bfloat16 if size.dtype == "BFloat16" else torch.float32
    model = build_model(folder / "model", dtype=dtype, **size.shape)
    job = _job(model, size, engine, {})
    async with open_engines(folder, job, lambda: load_policy(model, job), NUM_ENGINES) as engines:
        raw = RawBroadcast(engines.num_bytes)
        assert isinstance(engines.publisher, WeightPublisher)
        stopwatch = Stopwatch(engines.publisher)
        seconds: dict[str, list[float]] = {"raw": [], "update": [], "loading": [], "with join": []}
        for repeat in range(repeats + 1):
            times = {"raw": await asyncio.to_thread(raw.run)}
            stopwatch.loading = 0.0
            times["update"] = await engines.publish()
            times["loading"] = stopwatch.loading
            await engines.publisher.leave()
            times["with join"] = await engines.publish()
            if repeat:  # the first makes the buffers
                for side, value in times.items():
                    seconds[side].append(value)
        if engine == "CPU":
            await _compare_checksums(engines)
        raw.end()
        return _row(f"{name}, {engine}", engines.num_bytes, seconds, size.reach)


async def measure_pause(name: str, folder: Path, engine: str, repeats: int) -> str:
    """Return the line of the table for the pauses of one size, in both modes, and what Staged transfers."""
    size, medians = SIZES[name], {}
    dtype = torch.bfloat16 if size.dtype == "BFloat16" else torch.float32
    model = build_model(folder / "model", dtype=dtype, **size.shape)
    for mode in ("Direct", "Staged"):
        job = _job(model, size, engine, {"mode": mode, "stagingMegabytes": 300})
        make = partial(load_policy, model, job)
        async with open_engines(folder / mode, job, make, NUM_ENGINES) as engines:
            pauses, updates = [], []
            for repeat in range(repeats + 1):
                await asyncio.to_thread(_change_some, engines.policy)
                seconds = await engines.publish()
                if repeat:  # the first makes the buffers
                    pauses.append(engines.seconds.pause)
                    updates.append(seconds)
            if engine == "CPU":
                await _compare_checksums(engines)
            medians[mode] = statistics.median(pauses), statistics.median(updates)
    direct, staged = medians["Direct"], medians["Staged"]
    times = [f"{each * 1e3:.1f}" for each in (direct[0], staged[0], direct[1], staged[1])]
    return "| " + " | ".join([f"{name}, {engine}", *times, f"{staged[0] / direct[0]:.2f}", "0.3"]) + " |"


@torch.no_grad()
def _change_some(policy: Policy) -> None:
    """Change one weight in a hundred: a step in bf16 with a small learning rate leaves most as they are."""
    [names] = policy.buckets(2**62)
    for _, tensor in policy.weights(names):
        tensor.view(-1)[::100].mul_(-1)


async def _compare_checksums(engines: PolicyAndEngines) -> None:
    """The engines hold the policy's weights, which have never been in a folder."""
    [names] = engines.policy.buckets(2**62)
    parameters = list(engines.policy.weights(names))
    await asyncio.to_thread(_change, parameters)
    await engines.publish()
    expected = {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()
        for name, tensor in parameters
    }
    async with httpx.AsyncClient(timeout=120) as http:
        for url in engines.urls:
            answer = (await http.post(f"{url}/weights_checker", json={"action": "checksum"})).json()
            assert expected.items() <= answer["ranks"][0]["checksums"].items(), (
                url
            )  # tied ones have two names


@torch.no_grad()
def _change(parameters: list[tuple[str, Tensor]]) -> None:
    for _, tensor in parameters:
        tensor.add_(0.125)


def _row(name: str, num_bytes: int, seconds: dict[str, list[float]], reach: str) -> str:
    raw, update, loading, join = (statistics.median(each) for each in seconds.values())
    pairs = [a / b for a, b in zip(seconds["update"], seconds["raw"], strict=True)]
    columns = [
        name,
        f"{num_bytes / 1e6:.1f}",
        f"{raw * 1e3:.1f}",
        f"{update * 1e3:.1f}",
        f"{(update - raw) * 1e3:.1f}",
        f"{loading * 1e3:.1f}",
        f"{update / raw:.2f}",
        f"{(update - loading) / raw:.2f}",
        f"{min(pairs):.2f} .. {statistics.median(pairs):.2f} .. {max(pairs):.2f}",
        f"{join * 1e3:.1f}",
        reach,
    ]
    return "| " + " | ".join(columns) + " |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--engine", choices=["CPU", "SGLang"], default="CPU")
    parser.add_argument("--pause", action="store_true")
    options = parser.parse_args()
    prepare_process()
    if options.pause:
        columns = ["weights", "pause Direct, ms", "Staged, ms", "update Direct, ms", "Staged, ms"]
        print(f"| {' | '.join([*columns, 'ratio of pauses', 'reach'])} |\n|{'---|' * 7}")
    for name in options.sizes if options.pause else []:
        with tempfile.TemporaryDirectory() as folder:
            pauses = measure_pause(name, Path(folder), options.engine, options.repeats)
            print(asyncio.run(pauses), flush=True)
    if options.pause:
        return
    columns = ["weights", "MB", "raw, ms", "update, ms", "more, ms", "loading, ms", "ratio"]
    columns += ["without loading", "of the pairs", "with join, ms", "reach"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            print(asyncio.run(measure(name, Path(folder), options.engine, options.repeats)), flush=True)


if __name__ == "__main__":
    main()
