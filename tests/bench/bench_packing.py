"""Trainer throughput of packed micro-batches against padded ones, on this machine's CPU.

    python tests/bench/bench_packing.py [--repeats 7]

Both sides make the same optimizer update through the same Policy (DeepSpeed, ZeRO 0, one gloo rank, one
thread): forward, loss, backward, AdamW. Both have the same token budget per micro-batch.

packed: AReaL's allocation, sequences end to end, attention by segments.
padded: sequences in order of arrival, as trainers take them; a micro-batch is closed when longest times
    number of sequences would exceed the budget. Right padding needs no mask under causality, so there is
    none, and attention is one `scaled_dot_product_attention(is_causal=True)`; logits are computed at sampled
    tokens alone. What it pays for is the padding, nothing else.

A token is a real one, prompt or response. Repetitions are interleaved, medians are reported; losses of both
sides are compared, so that they do the same work.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from asyncrl_api.job import AlgorithmSpec, DeepSpeedSpec, TrainingSpec
from asyncrl_runtime.trainer.update.diagnostics import report_tokens
from asyncrl_runtime.trainer.update.packing import MicroBatch, TrainingSample, distribute, pack
from asyncrl_runtime.trainer.update.policy import Policy
from asyncrl_runtime.trainer.update.token_logprobs import token_logprobs

VOCABULARY = 512
LONGEST = 1024


class Setting(NamedTuple):
    sigma: float
    """The deviation of the logarithm of a response's length; with 1.0 the longest hundredth is 10 times the
median."""
    budget: int
    """Tokens per micro-batch; padded ones count longest times number. The manifest's default is twice its
    default context."""


SETTINGS = {
    "log-normal": Setting(sigma=1.0, budget=4 * LONGEST),
    "log-normal, tight": Setting(sigma=1.0, budget=2 * LONGEST),
    "equal": Setting(sigma=0.0, budget=4 * LONGEST),
}


@dataclass(frozen=True, eq=False)
class PaddedBatch(MicroBatch):
    """A micro-batch whose `input_ids` are [n, L]; `positions` index the flattened batch."""


def padded_forward(model: Any, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
    hidden = model.causal_lm.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    logits = model.causal_lm.lm_head(hidden.flatten(0, 1)[batch.positions])
    return token_logprobs(logits, batch.targets, batch.temperatures)


def pad(samples: Sequence[TrainingSample]) -> PaddedBatch:
    """The rows of `pack`, in a padded layout."""
    ordered = sorted(samples, key=lambda s: (-s.num_tokens, s.ticket, s.index))
    packed = pack(ordered)
    longest = ordered[0].num_tokens
    ids = np.zeros((len(ordered), longest), dtype=np.int64)
    positions = []
    for row, sample in enumerate(ordered):
        ids[row, : sample.num_tokens] = np.concatenate([sample.prompt_ids, sample.response_ids])
        first = row * longest + len(sample.prompt_ids) - 1
        positions.append(first + np.arange(len(sample.response_ids)))
    fields = {name: getattr(packed, name) for name in packed.__dataclass_fields__}
    changed = {"input_ids": torch.from_numpy(ids), "positions": torch.from_numpy(np.concatenate(positions))}
    return PaddedBatch(**fields | changed)


def pad_in_order(samples: Sequence[TrainingSample], budget: int) -> list[PaddedBatch]:
    batches: list[PaddedBatch] = []
    current: list[TrainingSample] = []
    for sample in samples:
        longest = max(s.num_tokens for s in [*current, sample])
        if current and longest * (len(current) + 1) > budget:
            batches.append(pad(current))
            current = []
        current.append(sample)
    return [*batches, pad(current)]


def pack_by_allocation(samples: Sequence[TrainingSample], budget: int) -> list[MicroBatch]:
    (bins,) = distribute([s.num_tokens for s in samples], budget, num_ranks=1)
    return [pack([samples[i] for i in indices]) for indices in bins]


def make_samples(sigma: float, num_tokens: int) -> list[TrainingSample]:
    """Prompts of 16 tokens, responses log-normal around 48, no sequence above LONGEST."""
    rng = np.random.default_rng(0)
    samples: list[TrainingSample] = []
    while sum(s.num_tokens for s in samples) < num_tokens:
        length = int(np.clip(rng.lognormal(np.log(48), sigma), 1, LONGEST - 16))
        sampled = np.ones(length, dtype=np.bool_)
        samples.append(
            TrainingSample(
                ticket=len(samples) // 8,
                index=len(samples) % 8,
                prompt_ids=rng.integers(0, VOCABULARY, 16).astype(np.int32),
                response_ids=rng.integers(0, VOCABULARY, length).astype(np.int32),
                behavior_logprobs=np.full(length, -np.log(VOCABULARY), dtype=np.float32),
                sampled_mask=sampled,
                loss_mask=sampled,
                advantage=float(rng.normal()),
                temperature=1.0,
            )
        )
    return samples


def make_policy(folder: Path) -> Policy:
    return Policy(
        folder,
        dtype="Float32",
        training=TrainingSpec(batch_size=1, max_steps=1),
        algorithm=AlgorithmSpec(),
        deepspeed=DeepSpeedSpec(zero_stage=0),
    )


class Side:
    """One way of batching: a policy and what it was measured to do."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.seconds: list[float] = []
        self.loss = 0.0

    def update(self, batches: Sequence[MicroBatch], num_rows: int) -> None:
        began = time.process_time()
        update = self.policy.update(batches, proximal_logprobs=None, num_tokens=num_rows, learning_rate=0.0)
        self.seconds.append(time.process_time() - began)
        self.loss = report_tokens(update.sums)["loss"]


def measure(name: str, num_tokens: int, repeats: int, packed: Side, padded: Side) -> str:
    setting = SETTINGS[name]
    samples = make_samples(setting.sigma, num_tokens)
    real = sum(s.num_tokens for s in samples)
    num_rows = sum(s.num_sampled_tokens for s in samples)
    padded_batches = pad_in_order(samples, setting.budget)
    work: list[tuple[Side, Sequence[MicroBatch]]] = [
        (packed, pack_by_allocation(samples, setting.budget)),
        (padded, padded_batches),
    ]
    for side, batches in work:
        side.update(batches, num_rows)  # warm up
        side.seconds.clear()
    assert abs(packed.loss - padded.loss) < 1e-5, (packed.loss, padded.loss)
    for _ in range(repeats):
        for side, batches in work:
            side.update(batches, num_rows)
    rates = [real / statistics.median(side.seconds) for side in (packed, padded)]
    filled = real / sum(b.input_ids.numel() for b in padded_batches)
    counts = "/".join(str(len(batches)) for _, batches in work)
    return (
        f"| {name:17} | {setting.budget:6} | {len(samples):4} | {real:6} | {counts:>6} | {filled:6.0%} "
        f"| {rates[0]:7.0f} | {rates[1]:7.0f} | {rates[0] / rates[1]:5.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=12_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        dist.init_process_group("gloo", init_method=f"file://{name}/rendezvous", rank=0, world_size=1)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LONGEST,
        )
        LlamaForCausalLM(config).save_pretrained(f"{name}/model")
        packed, padded = (Side(make_policy(Path(name, "model"))) for _ in range(2))
    module = padded.policy._engine.module
    module.causal_lm.set_attn_implementation("sdpa")
    module.forward = MethodType(padded_forward, module)
    print("real tokens per CPU-second, forward + backward + update, one thread\n")
    print("| lengths           | budget | seqs | tokens | mbs    | filled | packed  | padded  | ratio |")
    print("|-------------------|--------|------|--------|--------|--------|---------|---------|-------|")
    for kind in SETTINGS:
        print(measure(kind, options.tokens, options.repeats, packed, padded), flush=True)


if __name__ == "__main__":
    main()
