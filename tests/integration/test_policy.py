"""The policy under DeepSpeed, on one and on two gloo ranks, against plain PyTorch.

Ranks are processes that run this very file; a session of them goes through all scenarios, since to start one
takes longer than most of what it does. What they find they write into a folder, and the tests read it.
"""

import itertools
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from asyncrl_api.job import AlgorithmSpec, DeepSpeedSpec, LoRASpec, TrainingSpec
from asyncrl_runtime.contract.messages import BucketLayout
from asyncrl_runtime.trainer.update import step as step_module
from asyncrl_runtime.trainer.update.advantages import ADVANTAGES, compute_advantages
from asyncrl_runtime.trainer.update.deepspeed_config import BETAS, deep_merge
from asyncrl_runtime.trainer.update.diagnostics import report_tokens
from asyncrl_runtime.trainer.update.loss import POLICY_LOSSES
from asyncrl_runtime.trainer.update.packing import TrainingSample, distribute, pack, split_minibatches
from asyncrl_runtime.trainer.update.policy import Policy, load_model
from asyncrl_runtime.trainer.update.policy_api import StepSettings, Update
from asyncrl_runtime.trainer.update.saved_files import ignore
from asyncrl_runtime.trainer.update.step import StepPlan
from asyncrl_runtime.weights.copies import ShareCopy, make_copy_group
from support.jobs.naive_rl import NaiveTrainer

STAGES = (0, 1, 2, 3)
ALL_IN_SHARES = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""Settings without which weights as small as these would stay whole on each rank under ZeRO 3."""
PERSISTENT = {"zero_optimization": {"stage3_param_persistence_threshold": 1000}}
"""Settings with which the small ones among them do."""
OFFLOADED: dict[int, dict[str, Any]] = {
    1: {"offload_optimizer": {"device": "cpu"}},
    2: {"offload_optimizer": {"device": "cpu"}},
    3: {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}
REPEATED = ((0, "Float32"), (0, "BFloat16"), (2, "Float32"), (3, "Float32"))
RESTAGED = ((1, 2, "Float32"), (2, 1, "BFloat16"))
"""The edits of `zeroStage` that a running job allows, one in each dtype."""
NUM_STEPS = 3
LEARNING_RATE = 3e-3
CAPACITY = 60


def write_model(folder: Path) -> None:
    """Tied embeddings, grouped queries, norms on queries and keys."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def make_batch(step: int) -> list[TrainingSample]:
    """Three groups: of four, of three, and of one, which leaves one of two ranks without a sequence."""
    rng = np.random.default_rng(step)
    samples = []
    for ticket, size in enumerate((4, 3, 1)):
        for index in range(size):
            length = int(rng.integers(2, 20))
            sampled = rng.random(length) < 0.9
            sampled[-1] = True
            samples.append(
                TrainingSample(
                    ticket=ticket,
                    index=index,
                    prompt_ids=rng.integers(0, 40, int(rng.integers(1, 6))).astype(np.int32),
                    response_ids=rng.integers(0, 40, length).astype(np.int32),
                    behavior_logprobs=rng.normal(-3.2, 0.7, length).astype(np.float32),
                    sampled_mask=sampled,
                    loss_mask=sampled & (rng.random(length) < 0.9),
                    advantage=float(rng.normal()),
                    temperature=(1.0, 0.7)[ticket % 2],
                    staleness=np.zeros(length, np.int32),
                )
            )
    return samples


def algorithm_of(**changes: Any) -> AlgorithmSpec:
    # Narrow, so that it binds within a few updates.
    return AlgorithmSpec.model_validate({"clip": {"low": 0.02, "high": 0.02}} | changes)


def make_policy(folder: Path, stage: int, *, dtype: Any = "Float32", **changes: Any) -> Policy:
    shares = ALL_IN_SHARES if stage == 3 else {}
    return Policy(
        folder,
        dtype=dtype,
        training=TrainingSpec(
            batch_size=3,
            max_steps=10,
            weight_decay=changes.pop("weight_decay", 0.1),
            gradient_clipping=0.5,
            lora=changes.pop("lora", LoRASpec()),
        ),
        algorithm=algorithm_of(**changes.pop("algorithm", {})),
        deepspeed=DeepSpeedSpec(zero_stage=stage, config=deep_merge(shares, changes.pop("config", {}))),
        activation_checkpointing=changes.pop("activation_checkpointing", "Auto"),
        **changes,
    )


def train_step(policy: Policy, samples: Sequence[TrainingSample], capacity: int = CAPACITY) -> list[Update]:
    """One step of three minibatches, as the trainer does it."""
    minibatches = []
    for chosen in split_minibatches([s.ticket for s in samples], 3):
        mine = distribute([samples[i].num_tokens for i in chosen], capacity, dist.get_world_size())
        packed = [pack([samples[chosen[i]] for i in part]) for part in mine[dist.get_rank()]]
        minibatches.append((packed, sum(samples[i].num_sampled_tokens for i in chosen)))
    proximal = [policy.logprobs(packed) for packed, _ in minibatches]
    return [
        policy.update(
            packed,
            proximal_logprobs=None if number == 0 else proximal[number],
            num_tokens=num_tokens,
            learning_rate=LEARNING_RATE,
        )
        for number, (packed, num_tokens) in enumerate(minibatches)
    ]


def save(policy: Policy, folder: Path) -> None:
    policy.save(folder)(ignore)
    dist.barrier()


def restore(policy: Policy, folder: Path, scratch: Path) -> None:
    policy.convert(folder, scratch)(ignore)
    dist.barrier()
    policy.load(folder, scratch)


def make_copy(policy: Policy) -> ShareCopy:
    return ShareCopy(
        [policy.layout(names) for names in policy.buckets(4096)], policy.shares, make_copy_group()
    )


def weights_of(policy: Policy) -> dict[str, Tensor]:
    """Return them on rank 0, as they are sent to engines: from the ranks' copies; collective."""
    copy = make_copy(policy)
    copy.take()
    return gathered(copy)


def gathered(copy: ShareCopy) -> dict[str, Tensor]:
    """Return the weights of a copy on rank 0; the other ranks must serve it meanwhile."""
    weights: dict[str, Tensor] = {}
    if dist.get_rank() != 0:
        copy.serve()
        return weights
    for layout in copy.layout:
        weights |= unpack(layout, copy.gather(layout.names))
    copy.close()
    return weights


def unpack(layout: BucketLayout, bucket: Tensor) -> Iterator[tuple[str, Tensor]]:
    start = 0
    for name, dtype_name, shape in zip(layout.names, layout.dtypes, layout.shapes, strict=True):
        dtype = getattr(torch, dtype_name)
        end = start + torch.Size(shape).numel() * dtype.itemsize
        yield name, bucket[start:end].clone().view(dtype).view(shape)
        start = end
    assert start == bucket.nbytes


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- scenarios: each runs on all ranks; what rank 0 returns is the result ---------------------------------


def run_updates(model: Path, _: Path, stage: int, capacity: int, **changes: Any) -> dict[str, Any]:
    policy = make_policy(model, stage, **changes)
    updates = [
        update for step in range(NUM_STEPS) for update in train_step(policy, make_batch(step), capacity)
    ]
    return {
        "losses": [report_tokens(u.sums)["loss"] for u in updates],
        "norms": [u.gradient_norm for u in updates],
        "recomputes": policy._engine.module.causal_lm.is_gradient_checkpointing,
        "clipped": sum(report_tokens(u.sums)["clip_fraction"] for u in updates),
        "weights": weights_of(policy),
    }


def run_copy(model: Path, _: Path, stage: int, **changes: Any) -> dict[str, Any]:
    """Gather from a copy while a step is trained, and after it; look what the copy holds, and the policy."""
    policy = make_policy(model, stage, **changes)
    found: dict[str, list[bool]] = {"is copied": [], "is kept": [], "is trained": []}
    copy = make_copy(policy)
    with ThreadPoolExecutor(1) as beside:
        for step in range(2):
            before = weights_of(policy)
            copy.take()
            gathering = beside.submit(gathered, copy)
            train_step(policy, make_batch(step))
            found["is copied"].append(same(gathering.result(), before))
            found["is kept"].append(same(gathered(copy), before))
            found["is trained"].append(not same(weights_of(policy), before))
    return {**found, "shares": [num_bytes_of_all(copy), policy.num_bytes]}


def num_bytes_of_all(copy: ShareCopy) -> int:
    sizes = torch.tensor(copy.num_bytes)
    dist.all_reduce(sizes)
    return int(sizes)


def run_resume(model: Path, folder: Path, stage: int, dtype: str) -> dict[str, Any]:
    policy = make_policy(model, stage, dtype=dtype)
    train_step(policy, make_batch(0))
    before = weights_of(policy)
    save(policy, folder / "checkpoint")
    noise = torch.rand(3)
    train_step(policy, make_batch(1))

    resumed = make_policy(model, stage, dtype=dtype)
    untrained = weights_of(resumed)
    restore(resumed, folder / "checkpoint", folder / "scratch")
    restored, repeated_noise = weights_of(resumed), torch.rand(3)
    train_step(resumed, make_batch(1))
    return {
        "weights": before,
        "after": weights_of(policy),
        "changed": not same(untrained, before),
        "restored": same(restored, before),
        "repeated": same(weights_of(resumed), weights_of(policy)),
        "random": torch.equal(noise, repeated_noise),
    }


def run_repeated(model: Path, folder: Path, stage: int, dtype: str) -> dict[str, Any]:
    """Repeat a step under its own settings on a policy that began with others, then make one under those."""
    recorded = StepSettings(algorithm_of(), 0.1, 0.5, BETAS, 1e-8)
    edited = StepSettings(algorithm_of(klCoefficient=0.5), 0.4, 0.05, (0.8, 0.9), 1e-3)
    policy = make_policy(model, stage, dtype=dtype)
    policy.use(recorded)
    train_step(policy, make_batch(0))
    save(policy, folder / "checkpoint")
    train_step(policy, make_batch(1))
    expected = weights_of(policy)

    other = make_policy(model, stage, dtype=dtype, algorithm={"klCoefficient": 0.5}, weight_decay=0.4)
    restore(other, folder / "checkpoint", folder / "scratch")
    other.use(recorded)
    repeated = [report_tokens(update.sums) for update in train_step(other, make_batch(1))]
    is_repeated = same(weights_of(other), expected)
    other.use(edited)
    updates = train_step(other, make_batch(2))
    policy.use(recorded)
    train_step(policy, make_batch(2))
    groups = other._engine.optimizer.param_groups
    return {
        "repeated": is_repeated,
        "kl": [tokens["reference_kl"] for tokens in repeated],
        "new kl": report_tokens(updates[-1].sums)["reference_kl"],
        "differs": not same(weights_of(other), weights_of(policy)),
        "constants": sorted((g["weight_decay"], *g["betas"], g["eps"]) for g in groups),
    }


def run_edited(model: Path, folder: Path, stage: int, dtype: str) -> dict[str, Any]:
    """Go on with other settings of the optimizer than those under which the checkpoint was made."""
    policy = make_policy(model, stage, dtype=dtype)
    train_step(policy, make_batch(0))
    save(policy, folder / "checkpoint")
    params = {"amsgrad": True, "fused": False, "foreach": False}
    other = make_policy(model, stage, dtype=dtype, config={"optimizer": {"params": params}})
    restore(other, folder / "checkpoint", folder / "scratch")
    for each in (policy, other):
        train_step(each, make_batch(1))
    groups = other._engine.optimizer.param_groups
    return {
        "settings": [{name: group[name] for name in params} for group in groups],
        "before": weights_of(policy),
        "after": weights_of(other),
        "peaks": ["max_exp_avg_sq" in state for state in other._optimizer.state.values()],
    }


def run_resized(
    model: Path, folder: Path, stage: int, dtype: str, source: Path, was: int | None = None
) -> dict[str, Any]:
    """Go on from the checkpoint of `run_resume` under another number of ranks, and perhaps another stage."""
    saved = source / f"resume-{stage if was is None else was}-{dtype}" / "checkpoint"
    policy = make_policy(model, stage, dtype=dtype)
    restore(policy, saved, folder / "scratch")
    restored = weights_of(policy)
    train_step(policy, make_batch(1))
    save(policy, folder / "checkpoint")
    again = make_policy(model, stage, dtype=dtype)
    restore(again, folder / "checkpoint", folder / "scratch")
    return {
        "restored": restored,
        "after": weights_of(policy),
        "saved": same(weights_of(policy), weights_of(again)),
        "left over": (folder / "scratch").exists(),
    }


def run_foreign_checkpoint(model: Path, folder: Path) -> dict[str, Any]:
    policy = make_policy(model, 2)
    layout = folder / "checkpoint" / "layout.json"
    save(policy, layout.parent)
    if dist.get_rank() == 0:
        layout.write_text(json.dumps(json.loads(layout.read_text()) | {"zero_stage": 3}))
    dist.barrier()
    with pytest.raises(ValueError) as refused:
        policy.load(layout.parent, folder / "scratch")
    return {"message": str(refused.value)}


def run_not_finite(model: Path, _: Path, stage: int, dtype: str) -> dict[str, Any]:
    """The last rank's share alone spoils the second of three updates, in its first micro-batch."""
    batch = pack(make_batch(0))
    spoiled = torch.full((batch.num_sampled_tokens,), float("nan"))
    is_last = dist.get_rank() == dist.get_world_size() - 1
    norms: list[Any] = []
    weights = []
    for is_spoiled in (True, False):
        policy = make_policy(model, stage, dtype=dtype)
        for number in range(3):
            if number == 1 and not is_spoiled:
                continue
            proximal = [spoiled, torch.zeros_like(spoiled)] if number == 1 and is_last else None
            update = policy.update(
                [batch, batch], proximal_logprobs=proximal, num_tokens=99, learning_rate=1e-3
            )
            everywhere: list[float] = [0.0] * dist.get_world_size()
            dist.all_gather_object(everywhere, update.gradient_norm)
            norms += [everywhere] if is_spoiled else []
        weights.append(weights_of(policy))
    return {"norms": norms, "is_traceless": same(*weights), "weights": weights[0]}


def run_without_zeros(model: Path, _: Path, stage: int, computes_all: bool) -> dict[str, Any]:
    """Make one step with each loss and advantage; some groups are uniform, one sample is masked whole."""
    policy, weights = make_policy(model, stage), []
    pairs = list(itertools.product(POLICY_LOSSES, ADVANTAGES))
    for number, (loss, advantage) in enumerate(pairs[:: 3 if stage == 3 else 1]):  # each loss, in any case
        algorithm = algorithm_of(policyLoss=loss, advantage=advantage)
        samples, rewards = batch_with_zeros(number, algorithm)
        settings = StepSettings(algorithm, 0.1, 0.5, BETAS, 1e-8)
        plan = StepPlan(tuple(samples), rewards, 2, CAPACITY, 1e-3, settings)
        with pytest.MonkeyPatch.context() as patch:
            if computes_all:
                patch.setattr(step_module, "has_gradient", lambda sample, algorithm: True)
            share = plan.shares(dist.get_world_size())[dist.get_rank()]
            report = step_module.train_step(policy, share).report
        weights.append(weights_of(policy))
    return {"weights": weights, "num_tokens": report["num_computed_tokens"]}


def batch_with_zeros(number: int, algorithm: AlgorithmSpec) -> tuple[list[TrainingSample], tuple[float, ...]]:
    """Four groups of three; in every fourth batch all are uniform, so that its updates have no gradient."""
    rng = np.random.default_rng(100 + number)
    drawn = [sample for step in range(2) for sample in make_batch(1000 + 2 * number + step)][:12]
    rewards = rng.random(12)
    rewards[0:3], rewards[6:9] = 0.1, 0.7
    if number % 4 == 3:
        rewards = np.full(12, 0.3)
    tickets, lengths = np.repeat(np.arange(4), 3), np.full(12, 9)
    advantages = compute_advantages(rewards, tickets, lengths, lengths, algorithm)
    samples = [
        replace(sample, ticket=int(ticket), index=place, advantage=float(advantage))
        for place, (sample, ticket, advantage) in enumerate(zip(drawn, tickets, advantages, strict=True))
    ]
    samples[4] = replace(samples[4], loss_mask=np.zeros_like(samples[4].loss_mask))
    return samples, tuple(rewards.tolist())


def run_reference(model: Path, _: Path, stage: int, **changes: Any) -> dict[str, Any]:
    policy = make_policy(model, stage, algorithm={"klCoefficient": 0.5}, **changes)
    reference: Any = policy._reference
    updates = [u for step in range(2) for u in train_step(policy, make_batch(step))]
    shares = [] if stage < 3 else [each.ds_tensor.numel() for each in reference.module.parameters()]
    whole = sum(len(tensor.view(-1)) for tensor in weights_of(policy).values())
    return {
        "kl": [report_tokens(u.sums)["reference_kl"] for u in updates],
        "share": sum(shares) / whole if shares and dist.get_rank() == 0 else None,
    }


def run_reference_of_adapters(model: Path, _: Path, stage: int) -> dict[str, Any]:
    """The KL term without a copy of the model, and with one."""
    lora = LoRASpec(rank=4, alpha=8.0, target_modules=["q_proj", "down_proj"])
    found: dict[str, Any] = {}
    for name in ("kl", "kl of a copy"):
        policy = make_policy(model, stage, algorithm={"klCoefficient": 0.5}, lora=lora)
        found["is model"] = isinstance(policy._reference, torch.nn.Module)
        if name == "kl of a copy":
            policy._reference = load_model(model, "Float32").requires_grad_(False)
        updates = [u for step in range(2) for u in train_step(policy, make_batch(step))]
        found[name] = [report_tokens(u.sums)["reference_kl"] for u in updates]
        found[f"adapters, {name}"] = adapters_of(policy)
    return found


def run_export(model: Path, folder: Path) -> dict[str, Any]:
    policy = make_policy(model, 2, dtype="BFloat16")
    train_step(policy, make_batch(0))
    policy.export(folder / "exported", tokenizer=None)(ignore)
    buckets = [[(name, t.nbytes) for name, t in policy.weights(names)] for names in policy.buckets(4096)]
    return {"weights": weights_of(policy), "buckets": buckets}


def run_adapters(model: Path, folder: Path, stage: int) -> dict[str, Any]:
    lora = LoRASpec(rank=4, alpha=8.0, target_modules=["q_proj", "down_proj"])
    policy = make_policy(model, stage, lora=lora)
    before = frozen(policy)
    first = adapters_of(policy)
    train_step(policy, make_batch(0))
    save(policy, folder / "checkpoint")
    trained = adapters_of(policy)
    resumed = make_policy(model, stage, lora=lora)
    restore(resumed, folder / "checkpoint", folder / "scratch")
    restored = adapters_of(resumed)
    train_step(policy, make_batch(1))
    train_step(resumed, make_batch(1))
    policy.export(folder / "exported", tokenizer=None)(ignore)
    batch = pack(make_batch(2))
    with pytest.raises(ValueError) as refused:
        restore(make_policy(model, stage), folder / "checkpoint", folder / "scratch")
    return {
        "first": first,
        "trained": trained,
        "restored": same(restored, trained),
        "repeated": same(adapters_of(policy), adapters_of(resumed)),
        "after": adapters_of(policy),
        "frozen": same(before, frozen(policy)),
        "logprobs": policy.logprobs([batch])[0],
        "num_bytes": policy.num_bytes,
        "refused": str(refused.value),
    }


def adapters_of(policy: Policy) -> dict[str, Tensor]:
    return safetensors.torch.load(policy.adapter().weights)


def frozen(policy: Policy) -> dict[str, Tensor]:
    parameters = policy._engine.module.named_parameters()
    return {name: each.detach().clone() for name, each in parameters if not each.requires_grad}


Scenario = Callable[..., dict[str, Any]]
SCENARIOS: dict[str, tuple[Scenario, dict[str, Any]]] = {
    **{f"updates-{stage}": (run_updates, {"stage": stage, "capacity": CAPACITY}) for stage in STAGES},
    "updates-wide": (run_updates, {"stage": 2, "capacity": 10_000}),
    "updates-narrow": (run_updates, {"stage": 2, "capacity": 25}),
    **{
        f"updates-{stage}-offloaded": (
            run_updates,
            {"stage": stage, "capacity": CAPACITY, "config": {"zero_optimization": offloaded}},
        )
        for stage, offloaded in OFFLOADED.items()
    },
    **{
        f"copy-{stage}-{dtype}": (run_copy, {"stage": stage, "dtype": dtype})
        for stage, dtype in ((0, "Float32"), (1, "BFloat16"), (2, "Float32"), (3, "BFloat16"))
    },
    "copy-3-offloaded": (run_copy, {"stage": 3, "config": {"zero_optimization": OFFLOADED[3]}}),
    "copy-3-persistent": (run_copy, {"stage": 3, "config": PERSISTENT}),
    "updates-recompute": (
        run_updates,
        {"stage": 1, "capacity": CAPACITY, "activation_checkpointing": "Always"},
    ),
    **{
        # With a clip so narrow as above, rounding would decide whether a token has a gradient.
        f"updates-{stage}-bf16": (
            run_updates,
            {"stage": stage, "capacity": CAPACITY, "dtype": "BFloat16", "algorithm": {"clip": {"low": 0.2}}},
        )
        for stage in STAGES
    },
    **{
        f"resume-{stage}-{dtype}": (run_resume, {"stage": stage, "dtype": dtype})
        for stage in STAGES
        for dtype in ("Float32", "BFloat16")
    },
    **{
        f"not-finite-{stage}-{dtype}": (run_not_finite, {"stage": stage, "dtype": dtype})
        for stage in STAGES
        for dtype in ("Float32", "BFloat16")
    },
    **{f"adapters-{stage}": (run_adapters, {"stage": stage}) for stage in (0, 1, 2)},
    **{
        f"repeated-{stage}-{dtype}": (run_repeated, {"stage": stage, "dtype": dtype})
        for stage, dtype in REPEATED
    },
    **{
        f"zeros-{stage}-{'all' if computes_all else 'few'}": (
            run_without_zeros,
            {"stage": stage, "computes_all": computes_all},
        )
        for stage in (0, 3)
        for computes_all in (True, False)
    },
    **{
        f"edited-{stage}-{dtype}": (run_edited, {"stage": stage, "dtype": dtype}) for stage, dtype in REPEATED
    },
    "foreign": (run_foreign_checkpoint, {}),
    **{f"reference-{stage}": (run_reference, {"stage": stage}) for stage in (2, 3)},
    **{f"reference-adapters-{stage}": (run_reference_of_adapters, {"stage": stage}) for stage in (0, 2)},
    "export": (run_export, {}),
}


def resized_scenarios(source: Path) -> dict[str, tuple[Scenario, dict[str, Any]]]:
    """Return what goes on from the checkpoints of a session of another size."""
    return {
        f"resized-{stage}-{dtype}": (run_resized, {"stage": stage, "dtype": dtype, "source": source})
        for stage in STAGES
        for dtype in ("Float32", "BFloat16")
    } | {
        f"restaged-{was}-{dtype}": (
            run_resized,
            {"stage": stage, "was": was, "dtype": dtype, "source": source},
        )
        for was, stage, dtype in RESTAGED
    }


def main(model: Path, folder: Path, source: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    scenarios = resized_scenarios(Path(source)) if source else SCENARIOS
    for name, (scenario, arguments) in scenarios.items():
        own = folder / name
        own.mkdir(exist_ok=True)
        result = scenario(model, own, **arguments)
        if dist.get_rank() == 0:
            torch.save(result, own / "result.pt")
    dist.destroy_process_group()


# --- tests ------------------------------------------------------------------------------------------------


class Session:
    """What the ranks found.

    Args:
        source: folder of a session of another size, from whose checkpoints this one goes on.
    """

    def __init__(self, model: Path, folder: Path, num_ranks: int, source: Path | None = None) -> None:
        self.model, self.folder, self.num_ranks = model, folder, num_ranks
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(num_ranks),
            "OMP_NUM_THREADS": "1",
            "TORCH_EXTENSIONS_DIR": str(folder / "compiled"),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, __file__, str(model), str(folder), str(source or "")]
        log = folder / "log.txt"
        with log.open("w") as output:
            ranks = [
                subprocess.Popen(
                    command, env=environment | {"RANK": str(rank)}, stdout=output, stderr=subprocess.STDOUT
                )
                for rank in range(num_ranks)
            ]
            codes = [rank.wait(timeout=240) for rank in ranks]
        self.log = log.read_text()
        assert codes == [0] * num_ranks, self.log

    def __getitem__(self, name: str) -> dict[str, Any]:
        result: dict[str, Any] = torch.load(self.folder / name / "result.pt")
        return result


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def sessions(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Session]:
    return {num: Session(model_folder, tmp_path_factory.mktemp("ranks"), num) for num in (1, 2)}


@pytest.fixture(params=[1, 2], ids=["1 rank", "2 ranks"])
def session(request: pytest.FixtureRequest, sessions: dict[int, Session]) -> Session:
    return sessions[request.param]


@pytest.fixture(scope="module", params=[(1, 2), (2, 1)], ids=["1 to 2 ranks", "2 to 1 rank"])
def resized(
    request: pytest.FixtureRequest,
    model_folder: Path,
    sessions: dict[int, Session],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Session, Session]:
    """A session, and another one that goes on from its checkpoints with a different number of ranks."""
    before, after = request.param
    source = sessions[before]
    folder = tmp_path_factory.mktemp("resized")
    return source, Session(model_folder, folder, after, source.folder)


@pytest.fixture(scope="module")
def naive(model_folder: Path) -> dict[str, Any]:
    return run_naively(model_folder, clip=0.02)


@pytest.fixture(scope="module")
def naive_with_wide_clip(model_folder: Path) -> dict[str, Any]:
    return run_naively(model_folder, clip=0.2)


def run_naively(model_folder: Path, *, clip: float) -> dict[str, Any]:
    """The steps of `run_updates` by plain PyTorch, each sequence by itself."""
    torch.set_num_threads(1)
    trainer = NaiveTrainer(model_folder, weight_decay=0.1, gradient_clipping=0.5, betas=BETAS)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        samples = make_batch(step)
        with torch.no_grad():
            proximal = [trainer.logprobs(sample) for sample in samples]
        for chosen in split_minibatches([s.ticket for s in samples], 3):
            loss, norm = trainer.update(
                [samples[i] for i in chosen],
                [proximal[i] for i in chosen],
                LEARNING_RATE,
                clip=clip,
                max_weight=5.0,
            )
            losses.append(loss)
            norms.append(norm)
    return {"losses": losses, "norms": norms, "weights": dict(trainer.model.named_parameters())}


FLOAT32_RUNS = [name for name, (run, _) in SCENARIOS.items() if run is run_updates and "bf16" not in name]


@pytest.mark.parametrize("name", FLOAT32_RUNS)
def test_nine_updates_are_those_of_plain_pytorch(session: Session, naive: dict[str, Any], name: str) -> None:
    result = session[name]
    assert result["losses"] == pytest.approx(naive["losses"], rel=1e-5, abs=1e-5)
    assert result["norms"] == pytest.approx(naive["norms"], rel=1e-4)
    assert result["weights"].keys() == naive["weights"].keys()
    for key, weight in naive["weights"].items():
        torch.testing.assert_close(result["weights"][key], weight.detach(), rtol=0, atol=1e-5)


def test_activations_are_computed_anew_if_asked(session: Session) -> None:
    assert session["updates-recompute"]["recomputes"] and not session["updates-1"]["recomputes"]


@pytest.mark.parametrize("stage", [0, 3])
def test_what_has_no_gradient_is_left_out_and_the_weights_are_the_same(session: Session, stage: int) -> None:
    """For every loss and advantage, one after the other; also in steps without any gradient."""
    every, few = session[f"zeros-{stage}-all"], session[f"zeros-{stage}-few"]
    assert few["num_tokens"] < every["num_tokens"]
    for number, (expected, found) in enumerate(zip(every["weights"], few["weights"], strict=True)):
        for name, weight in expected.items():
            difference = float((weight - found[name]).abs().max())
            assert difference < 1e-5, (number, name)
    first, second = every["weights"][2], few["weights"][3]
    assert not same(first, second), "momentum and decay act in a step without a gradient"


def test_the_updates_above_clip_gradient_and_ratio(session: Session, naive: dict[str, Any]) -> None:
    assert max(naive["norms"]) > 0.5
    assert session["updates-2"]["clipped"] > 0


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_follows_float32(session: Session, naive_with_wide_clip: dict[str, Any], stage: int) -> None:
    result, naive = session[f"updates-{stage}-bf16"], naive_with_wide_clip
    assert {w.dtype for w in result["weights"].values()} == {torch.bfloat16}
    assert result["losses"] == pytest.approx(naive["losses"], abs=0.05)
    assert result["norms"] == pytest.approx(naive["norms"], rel=0.1)


@pytest.mark.parametrize("dtype", ["Float32", "BFloat16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_is_bit_equal(session: Session, stage: int, dtype: str) -> None:
    expected = {"changed": True, "restored": True, "repeated": True, "random": True}
    result = session[f"resume-{stage}-{dtype}"]
    assert {name: result[name] for name in expected} == expected


@pytest.mark.parametrize(("was", "stage", "dtype"), RESTAGED)
def test_another_zero_stage_goes_on_where_the_last_stopped(
    resized: tuple[Session, Session], was: int, stage: int, dtype: str
) -> None:
    assert_goes_on(resized, f"resume-{was}-{dtype}", f"restaged-{was}-{dtype}", dtype)


@pytest.mark.parametrize("dtype", ["Float32", "BFloat16"])
@pytest.mark.parametrize("stage", STAGES)
def test_another_number_of_ranks_goes_on_where_the_last_stopped(
    resized: tuple[Session, Session], stage: int, dtype: str
) -> None:
    assert_goes_on(resized, f"resume-{stage}-{dtype}", f"resized-{stage}-{dtype}", dtype)


def assert_goes_on(sessions: tuple[Session, Session], before: str, after: str, dtype: str) -> None:
    expected, found = sessions[0][before], sessions[1][after]
    assert same(found["restored"], expected["weights"])
    for name, weight in expected["after"].items():  # sums over ranks are rounded in another order
        tolerance = 1e-5 if dtype == "Float32" else 2e-2
        torch.testing.assert_close(found["after"][name], weight, rtol=0, atol=tolerance)
    assert found["saved"] and not found["left over"]


@pytest.mark.parametrize(("stage", "dtype"), REPEATED)
def test_a_step_has_its_own_settings_whatever_the_policy_began_with(
    session: Session, stage: int, dtype: str
) -> None:
    """A checkpoint brings the optimizer's constants with it: the process's own would not be in force."""
    found = session[f"repeated-{stage}-{dtype}"]
    assert found["repeated"] and found["kl"] == [0, 0, 0]
    assert found["differs"] and found["new kl"] > 0
    assert found["constants"] == [(0.0, 0.8, 0.9, 1e-3), (0.4, 0.8, 0.9, 1e-3)]


@pytest.mark.parametrize(("stage", "dtype"), REPEATED)
def test_edited_settings_of_the_optimizer_are_in_force_after_a_restart(
    session: Session, stage: int, dtype: str
) -> None:
    """So is what else `trainer.deepspeed.config` says: a checkpoint holds nothing of it."""
    found = session[f"edited-{stage}-{dtype}"]
    assert found["settings"] == [{"amsgrad": True, "fused": False, "foreach": False}] * 2
    assert found["peaks"] and all(found["peaks"])
    tolerance = LEARNING_RATE * 3 if dtype == "Float32" else 2e-2  # three updates of a rate each
    for name, weight in found["before"].items():
        torch.testing.assert_close(found["after"][name], weight, rtol=0, atol=tolerance)


def test_a_checkpoint_of_another_zero_stage_is_refused(session: Session) -> None:
    message = session["foreign"]["message"]
    assert re.search(r"has layout {'world_size': \d, 'zero_stage': 3, 'dtype': 'Float32'}, this", message)
    assert message.endswith("spec.trainer.deepspeed.zeroStage may only change between 1 and 2; put it back")


@pytest.mark.parametrize("dtype", ["Float32", "BFloat16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_is_reported_and_not_applied(
    session: Session, stage: int, dtype: str
) -> None:
    """Every rank sees it, whichever rank it comes from; what follows is as if it had never been."""
    result = session[f"not-finite-{stage}-{dtype}"]
    good, bad, next_good = result["norms"]
    assert np.isfinite([*good, *next_good]).all() and not np.isfinite(bad).any()
    assert result["is_traceless"]
    assert all(w.isfinite().all() for w in result["weights"].values())


@pytest.mark.parametrize("stage", [2, 3])
def test_the_reference_is_where_training_began(sessions: dict[int, Session], stage: int) -> None:
    expected = sessions[1]["reference-2"]["kl"]
    assert expected[0] == 0 and all(value > 0 for value in expected[1:])
    for session in sessions.values():
        assert session[f"reference-{stage}"]["kl"] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_under_zero_3_each_rank_holds_its_share_of_the_reference(session: Session) -> None:
    found = session["reference-3"]
    assert found["share"] == pytest.approx(1 / session.num_ranks, rel=0.05)


@pytest.mark.parametrize("stage", [0, 2])
def test_with_adapters_the_reference_is_the_model_without_them(session: Session, stage: int) -> None:
    found = session[f"reference-adapters-{stage}"]
    assert not found["is model"], "no second copy is kept"
    assert found["kl"][0] == 0 and found["kl"][-1] > 0
    assert found["kl"] == pytest.approx(found["kl of a copy"], rel=1e-4, abs=1e-8)
    for name, tensor in found["adapters, kl"].items():
        assert torch.allclose(tensor, found["adapters, kl of a copy"][name], rtol=0, atol=1e-6), name


def test_an_export_is_a_hugging_face_folder(session: Session) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(session.folder / "export" / "exported", dtype="auto")
    assert model.dtype == torch.bfloat16 and model.config.tie_word_embeddings
    expected = session["export"]["weights"]
    assert same(dict(model.named_parameters()), expected), "tied weights once, under Hugging Face's names"
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_adapters_alone_are_trained(session: Session, stage: int) -> None:
    found = session[f"adapters-{stage}"]
    names = {name.removeprefix("base_model.model.model.layers.") for name in found["first"]}
    assert names == {
        f"{layer}.{module}.lora_{factor}.weight"
        for layer in (0, 1)
        for module in ("self_attn.q_proj", "mlp.down_proj")
        for factor in "AB"
    }
    assert found["frozen"]
    first, after = found["first"], found["after"]
    assert all(tensor.any() == ("lora_A" in name) for name, tensor in first.items()), (
        "nothing is added at first"
    )
    assert not any(torch.equal(first[name], after[name]) for name in first)
    assert found["num_bytes"] == sum(tensor.nbytes for tensor in first.values())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_adapters_go_on_from_a_checkpoint(session: Session, stage: int) -> None:
    found = session[f"adapters-{stage}"]
    assert found["restored"] and found["repeated"]
    assert '"rank":4' in found["refused"], "a checkpoint of adapters is none of all weights"


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_all_ranks_and_stages_train_the_same_adapters(sessions: dict[int, Session], stage: int) -> None:
    expected = sessions[1]["adapters-0"]["after"]
    for session in sessions.values():
        for name, tensor in session[f"adapters-{stage}"]["after"].items():
            assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-5), name


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_peft_loads_exported_adapters(session: Session, stage: int) -> None:
    base = AutoModelForCausalLM.from_pretrained(session.model)
    model = PeftModel.from_pretrained(base, session.folder / f"adapters-{stage}" / "exported")
    batch = pack(make_batch(2))
    starts = torch.where(batch.position_ids == 0)[0].tolist()
    sequences = [batch.input_ids[None, a:b] for a, b in pairwise([*starts, len(batch.input_ids)])]
    logits = torch.cat([model(input_ids=each).logits[0] for each in sequences])
    rows = logits[batch.positions] / batch.temperatures[:, None]
    expected = rows.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    assert torch.allclose(session[f"adapters-{stage}"]["logprobs"], expected, atol=1e-5)


def test_buckets_are_filled_up_to_their_size(session: Session) -> None:
    buckets = session["export"]["buckets"]
    sizes = [sum(nbytes for _, nbytes in bucket) for bucket in buckets]
    assert all(size <= 4096 or len(bucket) == 1 for size, bucket in zip(sizes, buckets, strict=True))
    for bucket, following in pairwise(buckets):
        assert sum(nbytes for _, nbytes in bucket) + following[0][1] > 4096


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name.startswith("copy-")])
def test_engines_get_what_was_copied_while_the_next_step_is_trained(session: Session, name: str) -> None:
    found = session[name]
    assert found["is copied"] == found["is kept"] == found["is trained"] == [True, True]
    assert found["shares"][0] == found["shares"][1], "each rank has copied its own share alone"


def test_nothing_is_compiled_and_nobody_chatters(session: Session) -> None:
    assert not (session.folder / "compiled").exists()
    # A warning is followed by the line of code that it is about.
    chatter = [line for line in session.log.splitlines() if not re.search("warning|^  ", line, re.I)]
    assert chatter == [], session.log


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
