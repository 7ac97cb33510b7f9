"""Memory of each rank under ZeRO 3 against a formula, on CPUs with gloo: what a rank has beside its imports.

state: after the first update; weights, their masters, Adam's two moments and the gradient, each a share:
    (4 + 4 + 8 + 4) * parameters / N in fp32, (2 + 4 + 8 + 4) in bf16; and DeepSpeed's bucket of gradients.
gather: highest while all weights are gathered for a broadcast, bucket by bucket: state + the copy of the
    rank's share, + two buckets on rank 0, and what it receives of one.
update: highest while a minibatch is trained: all that + the weights of the largest layer + its
    gradients + activations, which are what autograd keeps of a forward pass.

Measured: resident memory (VmRSS), and its peak since a mark (VmHWM), less what the process had before it
loaded the model. DeepSpeed is told to give gathered weights back at once (`stage3_max_reuse_distance: 0`).

    python tests/bench/bench_zero3.py [--ranks 2 4]
"""

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from asyncrl_api.job import AlgorithmSpec, DeepSpeedSpec, TrainingSpec
from asyncrl_runtime.trainer.update.packing import MicroBatch, TrainingSample, pack
from asyncrl_runtime.trainer.update.policy import Policy
from asyncrl_runtime.weights.copies import ShareCopy, make_copy_group
from support.engines.tiny_models import build_model

SHAPE = {"hidden_size": 1024, "num_layers": 6, "vocabulary_size": 8192, "initializer_range": 0.02}
BUCKET_BYTES = 64 * 2**20
REDUCE_BUCKET = 8_000_000
NUM_TOKENS = 512
STATE_BYTES = {"Float32": 4 + 4 + 8 + 4, "BFloat16": 2 + 4 + 8 + 4}
GIVE_BACK_AT_ONCE = {
    "zero_optimization": {
        "reduce_bucket_size": REDUCE_BUCKET,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--dtypes", nargs="+", choices=STATE_BYTES, default=list(STATE_BYTES))
    options = parser.parse_args()
    columns = ["dtype", "ranks", "rank", "phase", "MB", "by the formula", "ratio"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for dtype in options.dtypes:
        for num_ranks in options.ranks:
            with tempfile.TemporaryDirectory() as folder:
                for line in run_ranks(Path(folder), dtype, num_ranks):
                    print(line, flush=True)


def run_ranks(folder: Path, dtype: str, num_ranks: int) -> list[str]:
    """Return the lines of the table for the first and the last rank."""
    build_model(folder / "model", **SHAPE)  # type: ignore[arg-type]  # the values are of several types
    build_model(folder / "tiny", num_layers=1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment |= {"WORLD_SIZE": str(num_ranks), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    # Large blocks are mapped one by one, so that what is freed is seen to be.
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", "import bench_zero3; bench_zero3.run_rank()", str(folder), dtype]
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, cwd=Path(__file__).parent)
        for rank in range(num_ranks)
    ]
    assert [rank.wait(600) for rank in ranks] == [0] * num_ranks
    lines = []
    for rank in (0, num_ranks - 1):
        for phase, (measured, expected) in json.loads((folder / f"{rank}.json").read_text()).items():
            cells = [dtype, num_ranks, rank, phase, f"{measured / 1e6:.0f}", f"{expected / 1e6:.0f}"]
            lines.append(f"| {' | '.join(map(str, cells))} | {measured / expected:.2f} |")
    return lines


def run_rank() -> None:
    """Be one of the ranks."""
    folder, dtype = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    warm_up(folder)
    baseline = resident()
    policy = make_policy(folder / "model", dtype)
    batch = make_batch()
    update(policy, batch)
    gc.collect()
    measured = {"state": resident() - baseline}
    mark()
    copy = gather_all(policy)
    measured["gather"] = peak() - baseline
    mark()
    update(policy, batch)
    measured["update"] = peak() - baseline

    numbers = count(policy, batch, dtype)
    state = STATE_BYTES[dtype] * numbers["parameters"] / dist.get_world_size() + numbers["reduce bucket"]
    others = 1 - 1 / dist.get_world_size()
    kept = copy.num_bytes + (BUCKET_BYTES * (2 + others) if dist.get_rank() == 0 else 0)
    expected = {
        "state": state,
        "gather": state + kept,
        "update": state + kept + 2 * numbers["largest layer"] + numbers["activations"],
    }
    found = {phase: (measured[phase], expected[phase]) for phase in expected}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def make_policy(model: Path, dtype: Any) -> Policy:
    return Policy(
        model,
        dtype=dtype,
        training=TrainingSpec(batch_size=3, max_steps=10),
        algorithm=AlgorithmSpec(),
        deepspeed=DeepSpeedSpec(zero_stage=3, config=GIVE_BACK_AT_ONCE),
    )


def warm_up(folder: Path) -> None:
    """Import and connect all that a policy needs, by way of one that is tiny."""
    policy = make_policy(folder / "tiny", "Float32")
    update(policy, make_batch(8))
    gather_all(policy)


def gather_all(policy: Policy) -> ShareCopy:
    """Have each rank copy its share, and rank 0 gather all buckets; return the copy, which stays."""
    layout = [policy.layout(names) for names in policy.buckets(BUCKET_BYTES)]
    copy = ShareCopy(layout, policy.shares, make_copy_group())
    copy.take()
    if dist.get_rank() != 0:
        copy.serve()
        return copy
    for each in copy.layout:
        copy.gather(each.names)
    copy.close()
    return copy


def make_batch(num_tokens: int = NUM_TOKENS) -> MicroBatch:
    rng = np.random.default_rng(dist.get_rank())
    sampled = np.ones(num_tokens // 2, bool)
    sample = TrainingSample(
        ticket=1,
        index=0,
        prompt_ids=rng.integers(0, 512, num_tokens // 2).astype(np.int32),
        response_ids=rng.integers(0, 512, num_tokens // 2).astype(np.int32),
        behavior_logprobs=np.full(num_tokens // 2, -6.0, np.float32),
        sampled_mask=sampled,
        loss_mask=sampled,
        advantage=1.0,
        temperature=1.0,
        staleness=np.zeros(num_tokens // 2, np.int32),
    )
    return pack([sample])


def update(policy: Policy, batch: MicroBatch) -> None:
    policy.update([batch], proximal_logprobs=None, num_tokens=NUM_TOKENS, learning_rate=1e-6)


def count(policy: Policy, batch: MicroBatch, dtype: str) -> dict[str, float]:
    """Return what the formula is made of: numbers and bytes."""
    model = policy._engine.module.causal_lm
    sizes = {name: parameter.ds_numel for name, parameter in model.named_parameters()}
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    itemsize = 4 if dtype == "Float32" else 2
    return {
        "parameters": sum(sizes.values()),
        "largest weight": itemsize * max(sizes.values()),
        "largest layer": itemsize * max(layer, *sizes.values()),
        "reduce bucket": itemsize * REDUCE_BUCKET,
        "activations": activations(policy, batch),
    }


def activations(policy: Policy, batch: MicroBatch) -> float:
    """Return the bytes of what a forward pass keeps for the backward pass, weights apart."""
    kept: dict[int, int] = {}
    parameters = list(policy._engine.module.parameters())

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in {each.untyped_storage().data_ptr() for each in parameters}:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy._engine.module(batch)
    return sum(kept.values())


def resident() -> int:
    return memory("VmRSS")


def peak() -> int:
    return memory("VmHWM")


def mark() -> None:
    """Let the peak begin here (proc(5), clear_refs)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def memory(name: str) -> int:
    """Return a line of /proc/self/status, in bytes."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
