"""How long another rank waits for its part of a step, and how rank 0's event loop fares meanwhile.

ours: planned in a thread, then each rank gets its share as arrays, as `Ranks.run(Train(plan))` begins.
pickled: what was done before: planned on the event loop, then the whole plan to every rank by
    `broadcast_object_list`, and each distributes all of it to know its own part.

Two ranks, gloo on loopback. The time is from rank 0's groups until rank 1 says that it has its samples by
micro-batch; the lag is the longest time that a task on rank 0's event loop that sleeps 1 ms was kept from
running. Runs alternate; the ratio is that of the medians.

    python tests/bench/bench_shares.py [--groups 256] [--tokens 9000] [--repeats 3]
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from asyncrl_api.job import AlgorithmSpec, StalenessSpec
from asyncrl_runtime.contract.messages import Group, Sample, VersionSpan, mask_to_bytes
from asyncrl_runtime.trainer.books.staleness import LiveGroup, assess
from asyncrl_runtime.trainer.update.packing import distribute, split_minibatches
from asyncrl_runtime.trainer.update.policy_api import StepSettings
from asyncrl_runtime.trainer.update.ranks import make_commands_group
from asyncrl_runtime.trainer.update.shares import outline, receive_share, send_share
from asyncrl_runtime.trainer.update.step import StepPlan, plan_step

GROUP_SIZE, CAPACITY, MINIBATCHES = 16, 32768, 4
WAYS = ("ours", "pickled")


def make_groups(count: int, num_tokens: int) -> list[LiveGroup]:
    rng = np.random.default_rng(0)
    groups = []
    for ticket in range(count):
        ids = rng.integers(0, 150_000, (GROUP_SIZE, num_tokens), dtype=np.int32)
        logprobs = -rng.random((GROUP_SIZE, num_tokens), dtype=np.float32)
        samples = tuple(
            Sample(
                index=index,
                prompt_ids=ids[index, :200].tobytes(),
                response_ids=ids[index].tobytes(),
                behavior_logprobs=logprobs[index].tobytes(),
                response_mask=mask_to_bytes([True] * num_tokens),
                version_spans=(VersionSpan(1, 0, num_tokens // 2), VersionSpan(1, 1, num_tokens)),
                reward=float(index % 2),
                temperature=1.0,
                finish_reason="stop",
            )
            for index in range(GROUP_SIZE)
        )
        verdict = assess(Group(ticket=ticket, group_size=GROUP_SIZE, samples=samples), 2, RULE, {}, "None")
        assert isinstance(verdict, LiveGroup)
        groups.append(verdict)
    return groups


RULE = StalenessSpec()


def plan(groups: list[LiveGroup]) -> StepPlan:
    return plan_step(
        groups,
        settings=StepSettings(AlgorithmSpec(), 0.1, 1.0, (0.9, 0.95), 1e-8),
        max_new_tokens=10_000,
        num_minibatches=MINIBATCHES,
        tokens_per_micro_batch=CAPACITY,
        learning_rate=1e-6,
    )


@contextlib.asynccontextmanager
async def measured_lag(lags: list[float]) -> AsyncIterator[None]:
    async def tick() -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            lags[-1] = max(lags[-1], time.perf_counter() - began - 0.001)

    lags.append(0.0)
    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0.01)
    try:
        yield
        await asyncio.sleep(0.01)
    finally:
        ticking.cancel()


def wait_for_the_other(group: dist.ProcessGroup) -> None:
    dist.recv(torch.empty(1), src=1, group=group)


def send_ours(groups: list[LiveGroup], group: dist.ProcessGroup) -> None:
    shares = plan(groups).shares(2)
    dist.broadcast_object_list([outline(shares)], src=0, group=group)
    send_share(shares[1], 1, group)
    wait_for_the_other(group)


def send_pickled(planned: StepPlan, group: dist.ProcessGroup) -> None:
    dist.broadcast_object_list([planned], src=0, group=group)
    wait_for_the_other(group)


def follow(way: str, group: dist.ProcessGroup) -> None:
    box: list[Any] = [None]
    dist.broadcast_object_list(box, src=0, group=group)
    if way == "ours":
        received = receive_share(box[0], 1, group)
        assert received.minibatches
    else:
        samples = box[0].samples
        for members in split_minibatches([s.ticket for s in samples], MINIBATCHES):
            distribute([samples[index].num_tokens for index in members], CAPACITY, 2)
    dist.send(torch.zeros(1), dst=0, group=group)


async def lead(groups: list[LiveGroup], repeats: int, group: dist.ProcessGroup) -> None:
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    lags: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way in WAYS:
            async with measured_lag(lags[way]):
                began = time.perf_counter()
                if way == "ours":
                    await asyncio.to_thread(send_ours, groups, group)
                else:
                    await asyncio.to_thread(send_pickled, plan(groups), group)
                seconds[way].append(time.perf_counter() - began)
    for way in WAYS:
        print(
            f"{way:8} {statistics.median(seconds[way]):6.2f} s until rank 1 has its part "
            f"({min(seconds[way]):.2f} to {max(seconds[way]):.2f}), "
            f"event loop late by {1000 * statistics.median(lags[way]):.0f} ms at most"
        )
    for name, values in (("time", seconds), ("lag", lags)):
        ratio = statistics.median(values["pickled"]) / statistics.median(values["ours"])
        print(f"{name}: ours is {ratio:.1f} times lower")


def run(rank: int, options: argparse.Namespace) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(options.port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    group = make_commands_group()
    if rank == 0:
        asyncio.run(lead(make_groups(options.groups, options.tokens), options.repeats, group))
        return
    for _ in range(options.repeats):
        for way in WAYS:
            follow(way, group)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--groups", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=9000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--port", type=int, default=29617)
    options = parser.parse_args()
    print(f"{options.groups} groups of {GROUP_SIZE} samples of {options.tokens} tokens, two ranks")
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=run, args=(rank, options)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()


if __name__ == "__main__":
    main()
