"""A rank other than 0 fails within a step: rank 0 learns why before it ends, whatever it is doing.

The ranks are processes that run this file; they have no model, only a policy that fails or waits.
"""

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from asyncrl_api.job import AlgorithmSpec
from asyncrl_runtime.trainer.turn_clock import TurnClock
from asyncrl_runtime.trainer.update.failures import StepFailed
from asyncrl_runtime.trainer.update.packing import MicroBatch, TrainingSample
from asyncrl_runtime.trainer.update.policy_api import StepSettings, Update
from asyncrl_runtime.trainer.update.ranks import Ranks, Train, make_commands_group
from asyncrl_runtime.trainer.update.step import StepPlan
from asyncrl_runtime.weights.adapter_publisher import Adapter
from asyncrl_runtime.weights.copies import AdapterCopy

pytestmark = pytest.mark.slow


class FailingPolicy:
    """Rank 1 runs out of memory; rank 0 waits for it in a collective, which ends as gloo's or not at all."""

    world_size = 2

    def __init__(self, collective: str) -> None:
        self._collective = collective

    def use(self, settings: StepSettings) -> None:
        """Nothing of it matters here."""

    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        return []

    def update(self, micro_batches: Sequence[MicroBatch], **_: Any) -> Update:
        for _batch in micro_batches:
            if dist.get_rank() == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if self._collective == "hangs":
            threading.Event().wait()
        dist.all_reduce(torch.zeros(1))
        raise AssertionError("the other rank has not failed")


def sample(ticket: int, num_tokens: int) -> TrainingSample:
    everything = np.ones(num_tokens, np.bool_)
    ids, logprobs = np.full(num_tokens, 7, np.int32), np.full(num_tokens, -1.0, np.float32)
    return TrainingSample(ticket, 0, ids, ids, logprobs, everything, everything, 1.0, 1.0)


def main(collective: str) -> None:
    dist.init_process_group("gloo")
    ranks = Ranks(
        cast(Any, FailingPolicy(collective)),
        make_commands_group(),
        None,
        AdapterCopy(lambda: Adapter("", b""), is_rank_0=dist.get_rank() == 0),
        TurnClock(time.monotonic),
    )
    settings = StepSettings(AlgorithmSpec(), 0.0, 1.0, (0.9, 0.95), 1e-8)
    plan = StepPlan((sample(5, 9), sample(6, 4)), (0.0, 0.0), 1, 20, 1e-3, settings)
    try:
        if dist.get_rank() == 1:
            ranks.follow()
        asyncio.run(ranks.run(Train(plan)))
    except StepFailed as failed:
        print(failed.cause, failed.tickets, failed.is_out_of_memory)
    sys.stdout.flush()
    os._exit(0)


@pytest.mark.parametrize("collective", ["breaks", "hangs"])
def test_rank_0_learns_why_another_rank_has_failed(collective: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "PYTHONPATH": os.pathsep.join(folders),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, collective],
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    cause = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert said == [f"{cause} (6,) True\n"] * 2


if __name__ == "__main__":
    main(sys.argv[1])
