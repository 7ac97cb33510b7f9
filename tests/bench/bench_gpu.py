"""The trainer on one GPU: steps against a plain PyTorch loop, memory, copies, checkpoints, a device model.

Weights are random and have the shapes of SmolLM2-135M and Qwen2.5-1.5B. A step is the trainer's own
(`train_step` over packed micro-batches, DeepSpeed, bf16). The plain loop pads each micro-batch to its longest
sequence, and has weights and AdamW in fp32 under autocast. "dense" sequences are equally long, "long-tailed"
ones log-normal. Nothing is fetched. One GPU is used, and there is no engine: what the device model says of
engines is that of another one, and says so.

    make gpu-check

Without a GPU it says so and does nothing; `--rehearse` does everything on the CPU with tiny shapes.
"""

import argparse
import gc
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from asyncrl_api.job import AlgorithmSpec, DeepSpeedSpec, TrainingSpec
from asyncrl_runtime.calibration.findings import render_model
from asyncrl_runtime.calibration.measured_run import RunFacts, find_in_run
from asyncrl_runtime.emulation.device import load_device_model
from asyncrl_runtime.trainer.update.packing import TrainingSample
from asyncrl_runtime.trainer.update.policy import Policy
from asyncrl_runtime.trainer.update.policy_api import StepSettings
from asyncrl_runtime.trainer.update.saved_files import ignore
from asyncrl_runtime.trainer.update.step import StepPlan, train_step

MINIBATCHES = 2
BUCKET_BYTES = 256 * 2**20
BASE_MODEL = "h200"
"""The device model that says what is not measured here."""
SETTINGS = StepSettings(AlgorithmSpec(), 0.1, 1.0, (0.9, 0.95), 1e-8)


@dataclass(frozen=True)
class Size:
    """What is trained: a model's shape, and the tokens of a step."""

    name: str
    config: PretrainedConfig
    micro_batch_tokens: int
    step_tokens: int
    dense_tokens: int
    """The tokens of each sequence of a dense batch, and twice the median of a long-tailed one."""

    @property
    def prompt_tokens(self) -> int:
        return self.dense_tokens // 32


SIZES = (
    Size(
        "135M",
        LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49_152,
            max_position_embeddings=32_768,
            tie_word_embeddings=True,
        ),
        micro_batch_tokens=16_384,
        step_tokens=131_072,
        dense_tokens=2_048,
    ),
    Size(
        "1.5B",
        Qwen2Config(
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            vocab_size=151_936,
            max_position_embeddings=32_768,
            tie_word_embeddings=True,
        ),
        micro_batch_tokens=16_384,
        step_tokens=65_536,
        dense_tokens=2_048,
    ),
)
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 128,
}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
REHEARSED = tuple(Size(size.name, type(size.config)(**SHAPE, **HEADS), 128, 256, 64) for size in SIZES)
"""The same with tiny shapes."""


@dataclass
class Check:
    """One run: where it runs, how long it may take, and what it has found."""

    device: torch.device
    out: Path
    ends_at: float
    cells: list[dict[str, Any]] = field(default_factory=list)

    def now(self) -> float:
        """Return seconds, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def measure(self, cell: dict[str, Any], work: Callable[[], dict[str, float]]) -> None:
        """Do a piece of work and note what it returns, or why it could not be done; the rest goes on."""
        if time.perf_counter() > self.ends_at:
            found: dict[str, Any] = {"not_run": "the time was up"}
        else:
            try:
                found = work()
            except torch.OutOfMemoryError as error:
                found = {"not_run": f"out of memory: {str(error).splitlines()[0]}"}
        self.cells.append({**cell, **found})
        print(json.dumps(self.cells[-1]), flush=True)
        (self.out / "results.json").write_text(json.dumps(self.cells, indent=1) + "\n")

    @contextmanager
    def peak_memory(self, found: dict[str, float]) -> Iterator[None]:
        """Note how much memory of the GPU was in use at most during the body."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        yield
        if self.device.type == "cuda":
            found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30


def make_samples(size: Size, batch: str, seed: int, tokens: int | None = None) -> list[TrainingSample]:
    """Return samples of about so many tokens, one for each minibatch at least."""
    noise, left = np.random.default_rng(seed), tokens or size.step_tokens
    samples: list[TrainingSample] = []
    while left > 0 or len(samples) < MINIBATCHES:
        length = size.dense_tokens
        if batch == "long-tailed":
            drawn = size.dense_tokens / 2 * noise.lognormal(0.0, 0.85)
            length = int(np.clip(drawn, size.prompt_tokens + 8, size.micro_batch_tokens))
        left -= length
        samples.append(_sample(len(samples), length, size, noise))
    return samples


def _sample(number: int, length: int, size: Size, noise: np.random.Generator) -> TrainingSample:
    count, vocabulary = length - size.prompt_tokens, size.config.vocab_size
    mask = np.ones(count, np.bool_)
    return TrainingSample(
        ticket=number,
        index=0,
        prompt_ids=noise.integers(0, vocabulary, size.prompt_tokens).astype(np.int32),
        response_ids=noise.integers(0, vocabulary, count).astype(np.int32),
        behavior_logprobs=np.full(count, -np.log(vocabulary), np.float32),
        sampled_mask=mask,
        loss_mask=mask,
        advantage=1.0 if number % 2 else -1.0,
        temperature=1.0,
        staleness=np.zeros(count, np.int32),
    )


def write_model(size: Size, folder: Path) -> Path:
    """Write random weights of this shape."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(size.config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


# -- the trainer's step


def make_policy(folder: Path, recompute: str) -> Policy:
    training = TrainingSpec(batch_size=8, max_steps=10)
    return Policy(
        folder,
        dtype="BFloat16",
        training=training,
        algorithm=AlgorithmSpec(),
        deepspeed=DeepSpeedSpec(),
        activation_checkpointing="Always" if recompute == "recompute" else "Never",
    )


def our_step(check: Check, policy: Policy, size: Size, samples: Sequence[TrainingSample]) -> dict[str, float]:
    """Make one step of the trainer; return its line of metrics, as far as the device decides it."""
    rewards = (0.0,) * len(samples)
    plan = StepPlan(tuple(samples), rewards, MINIBATCHES, size.micro_batch_tokens, 1e-6, SETTINGS)
    [share] = plan.shares(1)
    outcome = train_step(policy, share, clock=check.now)
    return {**plan.report(), **outcome.report}


def measure_ours(check: Check, policy: Policy, size: Size, batch: str) -> dict[str, float]:
    samples = make_samples(size, batch, seed=1)
    our_step(check, policy, size, samples)  # memory is taken and kernels are chosen at the first
    found: dict[str, float] = {}
    with check.peak_memory(found):
        line = our_step(check, policy, size, samples)
    updates = line["train_seconds"] - line["proximal_seconds"]
    tokens = line["num_pass_tokens"]
    forward = tokens * (MINIBATCHES - 1) / MINIBATCHES / line["proximal_seconds"]
    rates = {"update_tokens_per_second": tokens / updates, "forward_tokens_per_second": forward}
    return {"tokens": tokens, "update_seconds": updates, **rates, **found}


# -- the plain loop


def plain_batches(size: Size, samples: Sequence[TrainingSample]) -> list[list[TrainingSample]]:
    """Return the samples as they come, in batches that fit into a micro-batch once they are padded."""
    batches: list[list[TrainingSample]] = [[]]
    for sample in samples:
        padded = max([each.num_tokens for each in batches[-1]] + [sample.num_tokens])
        if batches[-1] and padded * (len(batches[-1]) + 1) > size.micro_batch_tokens:
            batches.append([])
        batches[-1].append(sample)
    return batches


def plain_loss(model: Any, batch: Sequence[TrainingSample], device: torch.device) -> Tensor:
    """Return the summed policy-gradient loss of the responses of a padded batch."""
    longest = max(sample.num_tokens for sample in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask, weights = torch.zeros_like(ids), torch.zeros(len(batch), longest)
    for row, sample in enumerate(batch):
        tokens = np.concatenate([sample.prompt_ids, sample.response_ids]).astype(np.int64)
        ids[row, : len(tokens)] = torch.from_numpy(tokens)
        mask[row, : len(tokens)] = 1
        weights[row, len(sample.prompt_ids) : len(tokens)] = sample.advantage
    ids, mask, weights = ids.to(device), mask.to(device), weights.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return (losses * weights[:, 1:].flatten()).sum()


def measure_plain(check: Check, folder: Path, size: Size, batch: str, recompute: str) -> dict[str, float]:
    samples = make_samples(size, batch, seed=1)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(check.device).train()
    if recompute == "recompute":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    halves = [samples[0::MINIBATCHES], samples[1::MINIBATCHES]]

    def updates() -> float:
        began = check.now()
        for half in halves:
            count = sum(sample.num_sampled_tokens for sample in half)
            for each in plain_batches(size, half):
                (plain_loss(model, each, check.device) / count).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return check.now() - began

    updates()
    found: dict[str, float] = {}
    with check.peak_memory(found):
        seconds = updates()
    tokens = sum(sample.num_tokens for sample in samples)
    return {
        "tokens": tokens,
        "update_seconds": seconds,
        "update_tokens_per_second": tokens / seconds,
        **found,
    }


# -- copies and checkpoints


def measure_copy(check: Check, policy: Policy) -> dict[str, float]:
    """Copy all weights into host memory, pinned on a GPU, as a publication beside training needs them."""
    buckets = policy.buckets(BUCKET_BYTES)
    kept: dict[tuple[tuple[str, ...], int], Tensor] = {}

    def copy() -> float:
        began = check.now()
        for names in buckets:
            for place, data in enumerate(policy.shares(names)):
                if (names, place) not in kept:
                    kept[names, place] = torch.empty_like(data, device="cpu", pin_memory=data.is_cuda)
                kept[names, place].copy_(data)
        return check.now() - began

    first, again = copy(), copy()
    return {"bytes": policy.num_bytes, "first_seconds": first, "seconds": again}


def measure_checkpoint(check: Check, policy: Policy, size: Size) -> dict[str, float]:
    """Write a checkpoint while nothing else happens, and once more while steps are made.

    The second one holds whatever the steps left in the weights: it is its time that counts.
    """
    samples = make_samples(size, "dense", seed=2)
    with tempfile.TemporaryDirectory() as folder:
        began = check.now()
        write = policy.save(Path(folder) / "alone")
        gathered = check.now()
        write(ignore)
        written = check.now()
        alone = our_step(check, policy, size, samples)["train_seconds"]
        write = policy.save(Path(folder) / "beside")
        thread = threading.Thread(target=write, args=(ignore,))
        thread.start()
        beside = []
        while True:
            beside.append(our_step(check, policy, size, samples)["train_seconds"])
            if not thread.is_alive():
                break
        thread.join()
        num_bytes = sum(file.stat().st_size for file in Path(folder, "alone").rglob("*") if file.is_file())
    return {
        "bytes": num_bytes,
        "gather_seconds": gathered - began,
        "write_seconds": written - gathered,
        "step_seconds": alone,
        "step_seconds_beside": max(beside),
    }


# -- the device model


def measure_device_model(check: Check, policy: Policy, size: Size, where: str) -> dict[str, float]:
    """Make ten steps of unequal size, and of their metrics a device model."""
    lines = []
    for number in range(10):
        tokens = size.step_tokens * (number % 5 + 1) // 5
        lines.append(our_step(check, policy, size, make_samples(size, "long-tailed", number, tokens)))
    facts = RunFacts(where, MINIBATCHES, num_bytes=policy.num_bytes, bytes_source=f"{where}: the trainer")
    findings = find_in_run(lines, facts)
    # Their lengths are this program's own, and nothing was sent.
    for path in [path for path in findings.numbers if path.startswith("responses.")]:
        del findings.numbers[path]
    base = (BASE_MODEL, load_device_model(BASE_MODEL))
    text = render_model(findings, f"the trainer of a {size.name} model, {where}", base)
    (check.out / f"device-model-{size.name}.yaml").write_text(text)
    return {path: value for path, value in findings.numbers.items() if path.startswith("trainer.")}


# -- all of it


def check_size(check: Check, size: Size, where: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = write_model(size, Path(place))
        for recompute in ("recompute", "keep"):
            policy: list[Policy] = []

            def loaded(policy: list[Policy] = policy, recompute: str = recompute) -> Policy:
                if not policy:
                    policy.append(make_policy(folder, recompute))
                return policy[0]

            cell = {"model": size.name, "activations": recompute}
            for batch in ("dense", "long-tailed"):
                check.measure(
                    {**cell, "what": "asyncrl", "batch": batch},
                    lambda batch=batch, loaded=loaded: measure_ours(check, loaded(), size, batch),  # type: ignore[misc]
                )
            if recompute == "recompute":
                check_apart(check, loaded, size, where)
            policy.clear()
            free_memory()
            for batch in ("dense", "long-tailed"):
                check.measure(
                    {**cell, "what": "plain loop", "batch": batch},
                    lambda batch=batch, recompute=recompute: measure_plain(  # type: ignore[misc]
                        check, folder, size, batch, recompute
                    ),
                )
                free_memory()


def check_apart(check: Check, loaded: Callable[[], Policy], size: Size, where: str) -> None:
    """Measure what is neither a step nor a comparison."""
    cell = {"model": size.name}
    check.measure({**cell, "what": "snapshot copy"}, lambda: measure_copy(check, loaded()))
    check.measure({**cell, "what": "checkpoint"}, lambda: measure_checkpoint(check, loaded(), size))
    check.measure(
        {**cell, "what": "device model"}, lambda: measure_device_model(check, loaded(), size, where)
    )


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def render(cells: Sequence[dict[str, Any]]) -> str:
    """Return the cells as a text table."""
    lines = [f"{'model':6} {'what':14} {'batch':12} {'activations':12} figures"]
    for cell in cells:
        head = [str(cell.get(name, "")) for name in ("model", "what", "batch", "activations")]
        rest = {name: value for name, value in cell.items() if name not in HEADS_OF_CELLS}
        figures = ", ".join(f"{name} {_short(value)}" for name, value in rest.items())
        lines.append(f"{head[0]:6} {head[1]:14} {head[2]:12} {head[3]:12} {figures}")
    return "\n".join(lines) + "\n"


HEADS_OF_CELLS = ("model", "what", "batch", "activations")


def _short(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1000 else str(value)[:60]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=540.0, help="after so long nothing more is begun")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        print(f"skipped: no GPU (torch {torch.__version__} sees none)")
        return
    device = torch.device("cpu" if arguments.rehearse else "cuda:0")
    name = "a CPU, as a rehearsal" if arguments.rehearse else torch.cuda.get_device_name(0)
    where = f"measured on {name} at {datetime.now(UTC).isoformat(timespec='seconds')}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port(), RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo" if arguments.rehearse else "nccl", rank=0, world_size=1)
    check = Check(device, arguments.out, time.perf_counter() + arguments.seconds)
    for size in REHEARSED if arguments.rehearse else SIZES:
        check_size(check, size, where)
    dist.destroy_process_group()
    table = f"{where}, torch {torch.__version__}\n\n{render(check.cells)}"
    (arguments.out / "results.txt").write_text(table)
    print(table)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


if __name__ == "__main__":
    main()
