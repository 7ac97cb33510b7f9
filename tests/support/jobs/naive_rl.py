"""Policy-gradient training the slow and obvious way, with which the trainer is compared.

Losses loop over tokens in Python floats; the training reference runs each sequence by itself through a plain
Hugging Face model. Nothing here imports what it checks, except the type of a sample.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from asyncrl_api.job import AlgorithmSpec
from asyncrl_runtime.trainer.update.packing import TrainingSample


@dataclass
class Token:
    """One sampled token; log-probs are Python floats."""

    logprob: float
    entropy: float
    proximal: float
    behavior: float
    reference: float
    advantage: float
    live: bool
    sequence: int


def naive_loss(
    algorithm: AlgorithmSpec, tokens: Sequence[Token], logprobs: Sequence[float], *, with_reference: bool
) -> float:
    """Return the mean loss per token at `logprobs`.

    Values without a gradient stay at `token.logprob`, so that moving `logprobs` a little gives the gradient.
    """
    total = 0.0
    for token, logprob in zip(tokens, logprobs, strict=True):
        if not token.live:
            continue
        loss = -_objective(algorithm, token, logprob, tokens, logprobs)
        if with_reference:
            gap = token.reference - logprob
            loss += algorithm.kl_coefficient * (math.exp(gap) - gap - 1)
        total += loss - algorithm.entropy_coefficient * token.entropy
    return total / len(tokens)


def _objective(
    algorithm: AlgorithmSpec, token: Token, logprob: float, tokens: Sequence[Token], logprobs: Sequence[float]
) -> float:
    bounds = algorithm.clip_bounds
    low, high = 1 - bounds.low, 1 + bounds.high
    cap = algorithm.importance_weight.max
    frozen = math.exp(token.logprob - token.behavior)
    match algorithm.policy_loss:
        case "DecoupledPPO":
            weight = _bounded(algorithm, math.exp(token.proximal - token.behavior))
            return weight * _clipped(algorithm, math.exp(logprob - token.proximal), token.advantage)
        case "PPO":
            return _clipped(algorithm, math.exp(logprob - token.behavior), token.advantage)
        case "GSPO":
            mates = [
                (t, p)
                for t, p in zip(tokens, logprobs, strict=True)
                if t.sequence == token.sequence and t.live
            ]
            ratio = math.prod(math.exp(p - t.proximal) for t, p in mates) ** (1 / len(mates))
            weight = math.prod(math.exp(t.proximal - t.behavior) for t, _ in mates) ** (1 / len(mates))
            return _bounded(algorithm, weight) * _clipped(algorithm, ratio, token.advantage)
        case "CISPO":
            return max(low, min(high, frozen)) * token.advantage * logprob
        case "TIS":
            return min(cap, frozen) * token.advantage * logprob


def _clipped(algorithm: AlgorithmSpec, ratio: float, advantage: float) -> float:
    bounds = algorithm.clip_bounds
    low, high = 1 - bounds.low, 1 + bounds.high
    objective = min(ratio * advantage, max(low, min(high, ratio)) * advantage)
    if algorithm.clip.dual is not None and advantage < 0:
        objective = max(objective, algorithm.clip.dual * advantage)
    return objective


def _bounded(algorithm: AlgorithmSpec, weight: float) -> float:
    if weight <= algorithm.importance_weight.max:
        return weight
    return 0.0 if algorithm.importance_weight.on_exceed == "Mask" else algorithm.importance_weight.max


class NaiveTrainer:
    """Decoupled PPO by plain PyTorch: no packing, no DeepSpeed, no ranks, float32."""

    def __init__(
        self, folder: Path, *, weight_decay: float, gradient_clipping: float, betas: tuple[float, float]
    ) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            betas=betas,
        )
        self.gradient_clipping = gradient_clipping

    def logprobs(self, sample: TrainingSample) -> Tensor:
        """Return [sampled tokens of the response]."""
        prompt, response = torch.tensor(sample.prompt_ids), torch.tensor(sample.response_ids)
        logits = self.model(input_ids=torch.cat([prompt, response])[None].long()).logits[0]
        predicted = torch.log_softmax(logits[len(prompt) - 1 : -1] / sample.temperature, -1)
        chosen = predicted.gather(1, response.long()[:, None])[:, 0]
        return chosen[torch.tensor(sample.sampled_mask)]

    def update(
        self,
        samples: Sequence[TrainingSample],
        proximal: Sequence[Tensor],
        learning_rate: float,
        *,
        clip: float,
        max_weight: float,
    ) -> tuple[float, float]:
        """Return loss and gradient norm of one update."""
        num_tokens = sum(int(s.sampled_mask.sum()) for s in samples)
        total = torch.tensor(0.0)
        for sample, old in zip(samples, proximal, strict=True):
            behavior = torch.tensor(sample.behavior_logprobs[sample.sampled_mask])
            live = torch.tensor(sample.loss_mask[sample.sampled_mask])
            ratio, weight = (self.logprobs(sample) - old).exp(), (old - behavior).exp()
            bounded = torch.minimum(
                ratio * sample.advantage, ratio.clamp(1 - clip, 1 + clip) * sample.advantage
            )
            keep = live & (weight <= max_weight)
            total = total - (weight * bounded)[keep].sum() / num_tokens
        self.optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.gradient_clipping)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        return float(total.detach()), float(norm)
