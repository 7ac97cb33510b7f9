"""Log-probs of the same tokens under the same weights: the CPU engine's against the trainer's.

The engine samples over HTTP, 16 responses at once of up to 200 tokens, in batches that change and with a
key-value cache; the trainer packs prompts and responses, and makes one forward pass over each micro-batch.
fp32 on both sides. What differs is the order of sums, so the difference grows with the logits: "spread"
weights are random with a deviation of 0.2, ten times the usual.

    python tests/bench/bench_logprobs.py [FOLDER...]
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import torch.distributed as dist

from asyncrl_api.job import AlgorithmSpec, DeepSpeedSpec, TrainingSpec
from asyncrl_runtime.trainer.update.packing import TrainingSample, distribute, pack
from asyncrl_runtime.trainer.update.policy import Policy

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.engines.tiny_models import build_model, running_engine

NUM_SAMPLES = 64
IN_FLIGHT = 16
TOKENS_PER_MICRO_BATCH = 4096
MODELS: dict[str, dict[str, Any]] = {
    "Llama, 0.9 M": {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "initializer_range": 0.06},
    "Llama, 0.9 M, spread": {"hidden_size": 128, "num_layers": 4, "num_heads": 4},
    "Llama, 10 M": {
        "hidden_size": 384,
        "num_layers": 5,
        "num_heads": 6,
        "vocabulary_size": 2048,
        "initializer_range": 0.05,
    },
    "Qwen3, 0.9 M, spread": {"family": "qwen3", "hidden_size": 128, "num_layers": 4, "num_heads": 4},
}


async def sample(url: str, vocabulary_size: int) -> list[TrainingSample]:
    """Let the engine answer random prompts; responses have random lengths, so that batches change."""
    rng = np.random.default_rng(5)
    gate = asyncio.Semaphore(IN_FLIGHT)

    async def ask(client: httpx.AsyncClient, ticket: int, prompt: list[int], length: int) -> TrainingSample:
        body = {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": length, "ignore_eos": True, "sampling_seed": ticket},
            "return_logprob": True,
        }
        async with gate:
            answer = (await client.post("/generate", json=body)).raise_for_status().json()
        logprobs = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
        sampled = np.ones(length, dtype=np.bool_)
        return TrainingSample(
            ticket=ticket,
            index=0,
            prompt_ids=np.array(prompt, dtype=np.int32),
            response_ids=np.array(answer["output_ids"], dtype=np.int32),
            behavior_logprobs=np.array(logprobs, dtype=np.float32),
            sampled_mask=sampled,
            loss_mask=sampled,
            advantage=0.0,
            temperature=1.0,
        )

    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        asked = [
            ask(
                client,
                ticket,
                rng.integers(3, vocabulary_size, 12).tolist(),
                int(np.exp(rng.uniform(1, 5.3))),
            )
            for ticket in range(NUM_SAMPLES)
        ]
        return list(await asyncio.gather(*asked))


def gaps(policy: Policy, samples: Sequence[TrainingSample]) -> torch.Tensor:
    """Return the absolute difference at each sampled token, [tokens]."""
    (bins,) = distribute([s.num_tokens for s in samples], TOKENS_PER_MICRO_BATCH, num_ranks=1)
    batches = [pack([samples[i] for i in indices]) for indices in bins]
    trained = policy.logprobs(batches)
    return torch.cat([(a - b.behavior_logprobs).abs() for a, b in zip(trained, batches, strict=True)])


def measure(name: str, folder: Path) -> str:
    vocabulary_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    with running_engine(folder) as engine:
        samples = asyncio.run(sample(engine.url, vocabulary_size))
    policy = Policy(
        folder,
        dtype="Float32",
        training=TrainingSpec(batch_size=1, max_steps=1),
        algorithm=AlgorithmSpec(),
        deepspeed=DeepSpeedSpec(zero_stage=0),
    )
    found = gaps(policy, samples)
    lowest = min(float(each.behavior_logprobs.min()) for each in samples)
    return f"| {name} | {len(found)} | {lowest:.1f} | {found.max():.1e} | {found.mean():.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="of more models, measured too")
    folders = parser.parse_args().folders
    torch.set_num_threads(1)
    print("| model | tokens | lowest log-prob | largest difference | mean |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        dist.init_process_group("gloo", init_method=f"file://{name}/rendezvous", rank=0, world_size=1)
        for number, (model, settings) in enumerate(MODELS.items()):
            print(measure(model, build_model(Path(name, str(number)), **settings)), flush=True)
        for folder in folders:
            print(measure(folder.name, folder), flush=True)


if __name__ == "__main__":
    main()
