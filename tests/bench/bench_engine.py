"""Tokens per second of the CPU engine over HTTP, against transformers' batched `generate`; and latency.

Both sample the same responses' lengths from the same prompts, with log-probs, on the same model with the
same number of threads. Lengths have a long tail, as those of language models do. `generate` runs static
batches, each of which ends with its longest response; it is given its best settings (key-value cache,
SDPA, inference mode). Runs alternate, and medians are printed.

A second table is of many small requests, each a prompt group of 8 samples of 3 tokens: 32 at once, then one
by one, where the time that the client sees is compared with what the scheduler took.

    python tests/bench/bench_engine.py [--repeats 3] [--requests 256]
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.engines.tiny_models import build_model, running_engine

SLOTS = 16
IN_FLIGHT = 2 * SLOTS
GROUP_SIZE = 8
MODELS = {
    "0.9 M": {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "vocabulary_size": 512},
    "10 M": {"hidden_size": 384, "num_layers": 5, "num_heads": 6, "vocabulary_size": 2048},
}


class Work(NamedTuple):
    """What is sampled: prompts of 6 to 24 tokens, and how long each response is."""

    prompts: list[list[int]]
    lengths: NDArray[np.int64]

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())


def make_work(num_requests: int, vocabulary_size: int) -> Work:
    """Log-normal lengths of mean 64 before they are clipped to [4, 512]; the same at every call."""
    rng = np.random.default_rng(7)
    sigma = 1.0
    lengths = rng.lognormal(np.log(64) - sigma**2 / 2, sigma, num_requests).round().clip(4, 512)
    prompts = [rng.integers(3, vocabulary_size, rng.integers(6, 25)).tolist() for _ in range(num_requests)]
    return Work(prompts, lengths.astype(np.int64))


async def run_engine(url: str, work: Work) -> float:
    """Keep twice as many requests in flight as there are slots; return the seconds until the last answer."""
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        await asyncio.gather(*(client.get("/model_info") for _ in range(IN_FLIGHT)))  # connect
        await client.post("/flush_cache")

        pending = iter(zip(work.prompts, work.lengths.tolist(), strict=True))

        async def ask_one_after_the_other() -> None:
            for prompt, length in pending:
                sampling = {"max_new_tokens": length, "ignore_eos": True, "temperature": 1.0}
                body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
                answer = (await client.post("/generate", json=body)).json()
                assert len(answer["meta_info"]["output_token_logprobs"]) == length

        start = time.perf_counter()
        await asyncio.gather(*(ask_one_after_the_other() for _ in range(IN_FLIGHT)))
        return time.perf_counter() - start


@torch.inference_mode()
def run_generate(model: Any, work: Work) -> float:
    """Static batches in the order of the requests; return the seconds for all, log-probs included."""
    start = time.perf_counter()
    for first in range(0, len(work.prompts), SLOTS):
        prompts = work.prompts[first : first + SLOTS]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        longest = int(work.lengths[first : first + SLOTS].max())
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=longest,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logprobs = torch.stack(out.logits, dim=1).log_softmax(dim=-1)
        logprobs.gather(2, out.sequences[:, width:, None])
    return time.perf_counter() - start


def measure(name: str, folder: Path, repeats: int, num_requests: int) -> str:
    """Return the line of the table for one model."""
    settings: dict[str, Any] = MODELS[name]
    build_model(folder, **settings)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    work = make_work(num_requests, settings["vocabulary_size"])
    warm_up = Work(work.prompts[:SLOTS], work.lengths[:SLOTS].clip(max=8))
    rates: dict[str, list[float]] = {"engine": [], "generate": []}
    with running_engine(folder, "--max-running-requests", str(SLOTS), "--threads", "1") as engine:
        asyncio.run(run_engine(engine.url, warm_up))
        run_generate(model, warm_up)
        for _ in range(repeats):
            rates["generate"].append(work.num_tokens / run_generate(model, work))
            rates["engine"].append(work.num_tokens / asyncio.run(run_engine(engine.url, work)))
    ours, theirs = (statistics.median(rates[side]) for side in ("engine", "generate"))
    pairs = [a / b for a, b in zip(rates["engine"], rates["generate"], strict=True)]
    return (
        f"| {name} | {ours:.0f} | {theirs:.0f} | {ours / theirs:.2f} | {min(pairs):.2f} .. {max(pairs):.2f} |"
    )


async def measure_small_groups(url: str, vocabulary_size: int) -> str:
    rng = np.random.default_rng(3)

    def make_body() -> dict[str, Any]:
        seeds = rng.integers(0, 2**40, GROUP_SIZE).tolist()
        sampling = [{"max_new_tokens": 3, "ignore_eos": True, "sampling_seed": seed} for seed in seeds]
        prompts = [rng.integers(3, vocabulary_size, 6).tolist()] * GROUP_SIZE
        return {"input_ids": prompts, "sampling_params": sampling, "return_logprob": True}

    together, alone, outside = [], [], []
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        for _ in range(6):  # the first round connects
            bodies = [make_body() for _ in range(32)]
            start = time.perf_counter()
            await asyncio.gather(*(client.post("/generate", json=body) for body in bodies))
            together.append((time.perf_counter() - start) / 32)
        for _ in range(50):
            body = make_body()
            start = time.perf_counter()
            answers = (await client.post("/generate", json=body)).json()
            alone.append(time.perf_counter() - start)
            outside.append(alone[-1] - max(a["meta_info"]["e2e_latency"] for a in answers))
    columns = (statistics.median(times) * 1000 for times in (together[1:], alone, outside))
    return "| " + " | ".join(f"{ms:.1f}" for ms in columns) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | engine, tokens/s | generate, tokens/s | ratio | ratios of the runs |")
    print("|---|---|---|---|---|")
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            print(measure(name, Path(folder), arguments.repeats, arguments.requests), flush=True)
    print("\n| groups of 8 x 3 tokens, 0.9 M: ms each of 32 at once | alone | of it outside the scheduler |")
    print("|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = MODELS["0.9 M"]
        build_model(Path(folder), **settings)
        with running_engine(Path(folder)) as engine:
            print(asyncio.run(measure_small_groups(engine.url, settings["vocabulary_size"])))


if __name__ == "__main__":
    main()
