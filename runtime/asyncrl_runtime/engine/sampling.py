"""Turns logits into tokens and their log-probs, for all rows at once.

The noise of a seeded request is a pure function of its seed and the token's absolute position, so the same
seed gives the same tokens whatever else is in the batch, after a retraction, and if the request is continued
elsewhere with its prompt and partial output. The logits themselves depend on the batch in their last bits
(some 1e-6 in float32): a token changes only if its random number falls that close to the edge between two
tokens, about once in a million tokens; in bfloat16, about once in a thousand.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class SamplingPlan(NamedTuple):
    """How each of n rows is sampled; made anew when the rows change, not in every step."""

    temperature: Tensor | None
    """[n, 1] float32; 1 for greedy rows, whose log-probs are those of the raw logits. None if all are 1."""
    greedy: Tensor | None
    """[n] bool; None if no row is greedy."""
    all_greedy: bool
    filtered: Tensor | None
    """[m] int64, the rows with top-k or top-p; None if there are none."""
    top_k: NDArray[np.int64]
    """[m, 1]; larger than any vocabulary where it is off."""
    top_p: NDArray[np.float64]
    """[m, 1]."""
    seeded: NDArray[np.bool_] | None
    """[n]; None if no row is seeded."""
    seeds: NDArray[np.uint64]
    """[n]."""


def plan_sampling(
    temperature: NDArray[np.float32],
    top_k: NDArray[np.int64],
    top_p: NDArray[np.float64],
    seeded: NDArray[np.bool_],
    seeds: NDArray[np.uint64],
) -> SamplingPlan:
    """Sort out what n rows need; temperature 0 means greedy, top_k 0 and top_p 1 mean off."""
    greedy = temperature == 0.0
    filtered = np.flatnonzero(~greedy & ((top_k > 0) | (top_p < 1.0)))
    scale = np.where(greedy, np.float32(1.0), temperature)
    k = np.where(top_k > 0, top_k, np.iinfo(np.int64).max)
    return SamplingPlan(
        temperature=torch.from_numpy(scale)[:, None] if (scale != 1.0).any() else None,
        greedy=torch.from_numpy(greedy) if greedy.any() else None,
        all_greedy=bool(greedy.all()),
        filtered=torch.from_numpy(filtered) if len(filtered) else None,
        top_k=k[filtered, None],
        top_p=top_p[filtered, None],
        seeded=seeded.copy() if seeded.any() else None,
        seeds=seeds.copy(),
    )


def sample(
    logits: Tensor, plan: SamplingPlan, positions: NDArray[np.int64], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Choose a token for each row.

    Args:
        logits: [n, vocabulary] float32, not used afterwards.
        positions: [n] index, within prompt and output, of the token that is to be sampled.
        rng: source of the noise for rows without a seed.

    Returns:
        [n] tokens, and [n] natural log-probs: those of logits / temperature before top-k and top-p, or
        those of the raw logits for greedy rows.
    """
    if plan.temperature is not None:
        logits = logits / plan.temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    if plan.all_greedy:
        tokens = _argmax(logprobs)
    else:
        tokens = _invert_cdf(logprobs, plan, torch.from_numpy(_noise(plan, positions, rng)))
        if plan.greedy is not None:
            tokens = torch.where(plan.greedy, _argmax(logprobs), tokens)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]
    return tokens.numpy(), chosen.numpy()


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each pair of seed and position, by two rounds of splitmix64.

    They have 52 bits, so that in float64 even the largest one times a total stays below that total.
    """
    bits = _splitmix64(_splitmix64(seeds) ^ positions.astype(np.uint64))
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _noise(plan: SamplingPlan, positions: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float64]:
    if plan.seeded is None:
        return rng.random(len(positions))
    seeded = uniforms(plan.seeds, positions)
    if plan.seeded.all():
        return seeded
    return np.where(plan.seeded, seeded, rng.random(len(positions)))


def _argmax(values: Tensor) -> Tensor:
    return torch.from_numpy(values.numpy().argmax(axis=-1))  # many times faster than torch's on a CPU


def _invert_cdf(logprobs: Tensor, plan: SamplingPlan, noise: Tensor) -> Tensor:
    """Return, [n], the first token at which the cumulative probability, in float64, passes noise * total."""
    probs = logprobs.exp()
    if plan.filtered is not None:
        probs[plan.filtered] = _truncate(probs[plan.filtered], plan.top_k, plan.top_p)
    cdf = probs.cumsum(dim=-1, dtype=torch.float64)
    # right=True skips tokens of probability 0, whose cumulative value equals the one before.
    tokens = torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True)[:, 0]
    return tokens.clamp_(max=logprobs.shape[1] - 1)  # NaN logits compare as larger than anything


def _truncate(probs: Tensor, top_k: NDArray[np.int64], top_p: NDArray[np.float64]) -> Tensor:
    """Set to zero what is outside the k likeliest tokens or the smallest set that reaches probability p.

    As in SGLang, both bounds are taken on the full distribution, and the token that crosses p is kept;
    unlike there, all tokens that tie with the last one kept are kept too, so that order does not matter.
    """
    ordered = -np.sort(-probs.numpy(), axis=-1)  # values only: numpy sorts these with AVX512
    before = ordered.cumsum(axis=-1, dtype=np.float64) - ordered
    kept = ((before <= top_p) & (np.arange(probs.shape[1]) < top_k)).sum(axis=-1, keepdims=True)
    smallest = torch.from_numpy(np.take_along_axis(ordered, kept - 1, axis=-1))
    return probs.masked_fill(probs < smallest, 0.0)
