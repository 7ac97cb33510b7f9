"""The diagnostics of a training step, as numbers that JSON can represent.

Values per token are kept as sums: a float64 vector that adds up over micro-batches and, by one all-reduce,
over ranks. Quantiles come from histograms in such a vector. A number that does not exist (because there are
no tokens, or it is not finite) is absent from a report, never NaN.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncrl_runtime.trainer.update.packing import TrainingSample

SCALARS = ("loss", "tokens", "live", "clipped", "capped", "weight", "squared_weight", "entropy", "kl")

_MAGNITUDES = torch.logspace(-6, math.log10(20), 147, dtype=torch.float64)
_EDGES = torch.cat([-_MAGNITUDES.flip(0), _MAGNITUDES])
"""The edges of the histogram's bins, as log-ratios: 20 bins per decade on either side, and one bin for what
is within 1e-6 of 0."""
_CENTERS = torch.cat([_EDGES[:1], (_EDGES[:-1] + _EDGES[1:]) / 2, _EDGES[-1:]])
NUM_BINS = len(_CENTERS)

QUANTILES = {"min": 0.0, "p05": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
LENGTH_QUANTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
"""The quantiles of response lengths that are reported; between two responses they are interpolated."""

Numbers = dict[str, float]


def token_sums(
    *,
    loss: Tensor,
    log_ratios: Tensor,
    log_weights: Tensor,
    weights: Tensor,
    clipped: Tensor,
    capped: Tensor,
    entropies: Tensor,
    kl: Tensor,
    loss_mask: Tensor,
) -> Tensor:
    """Return one micro-batch's vector of sums, [len(SCALARS) + 2 * NUM_BINS] float64, detached.

    Args:
        loss: scalar, the micro-batch's share of the minibatch's mean.
        log_ratios: [R] current policy against the policy that the update is measured from.
        log_weights: [R] logarithms of the importance weights before they are bounded.
        weights: [R] importance weights as applied.
        clipped: [R] bool, tokens whose gradient the clip removes or bounds.
        capped: [R] bool, tokens whose importance weight reached its bound.
        entropies: [R].
        kl: [R] to the reference policy; zeros if there is none.
        loss_mask: [R] bool; masked tokens count in `tokens` only.
    """
    live = loss_mask.to(torch.float64)
    columns = torch.stack([live, clipped, capped, weights, weights.square(), entropies, kl]).double()
    sums = (columns * live).sum(1)
    head = torch.stack([loss.double(), live.new_tensor(float(len(live)))])
    histograms = [histogram(log_ratios, loss_mask), histogram(log_weights, loss_mask)]
    return torch.cat([head, sums, *histograms]).detach()


def histogram(values: Tensor, mask: Tensor) -> Tensor:
    """Return [NUM_BINS] float64 counts of `values` where `mask`, both [R]."""
    bins = torch.bucketize(values.detach().double(), _EDGES.to(values.device))
    counts = torch.zeros(NUM_BINS, dtype=torch.float64, device=values.device)
    return counts.index_add_(0, bins, mask.double())


def report_tokens(sums: Tensor) -> Numbers:
    """Turn the summed vector of a minibatch or step into a report.

    `loss` is the sum over the minibatches, which the caller divides by their number. Everything else is over
    the tokens that were computed, those of samples with a gradient (loss.has_gradient). The effective sample
    size (Kish) is a share of the tokens in the loss: (sum w)^2 / (n sum w^2).
    """
    values = dict(zip(SCALARS, sums.tolist(), strict=False))
    ratios, weights = sums[len(SCALARS) :].cpu().view(2, NUM_BINS)
    report = {
        "loss": values["loss"],
        "num_computed_tokens": values["tokens"],
        "num_computed_live_tokens": values["live"],
    }
    if (live := values["live"]) > 0:
        report |= {
            "clip_fraction": values["clipped"] / live,
            "capped_fraction": values["capped"] / live,
            "importance_weight_mean": values["weight"] / live,
            "entropy": values["entropy"] / live,
            "reference_kl": values["kl"] / live,
        }
        report |= {f"ratio_{name}": value for name, value in _quantiles(ratios).items()}
        report |= {f"importance_weight_{name}": value for name, value in _quantiles(weights).items()}
        if values["squared_weight"] > 0:
            report["effective_sample_size"] = values["weight"] ** 2 / (live * values["squared_weight"])
    return finite(report)


def _quantiles(counts: Tensor) -> Numbers:
    """Return quantiles of exp(x) from a histogram of x; each is off by at most half a bin."""
    cumulative = counts.cumsum(0)
    ranks = torch.tensor(list(QUANTILES.values()), dtype=torch.float64) * (cumulative[-1] - 1) + 1
    bins = torch.searchsorted(cumulative, ranks).clamp(max=NUM_BINS - 1)
    return dict(zip(QUANTILES, _CENTERS[bins].exp().tolist(), strict=True))


def mismatch_sums(logprobs: Tensor, behavior_logprobs: Tensor, staleness: Tensor) -> Tensor:
    """Return [4] float64 sums for `report_mismatch`, on the CPU.

    Args:
        logprobs: [R] under the trainer's weights at the version that trains, before any update.
        behavior_logprobs: [R] as the engine gave them when it sampled.
        staleness: [R]; only tokens with 0 were sampled with these weights, so the others do not count.
    """
    same = (staleness == 0).cpu().double()
    gap = (logprobs.detach().cpu().double() - behavior_logprobs.cpu().double()).clamp(-20, 20)
    columns = torch.stack([torch.ones_like(gap), -gap, gap.expm1() - gap, gap.abs()])
    return (columns * same).sum(1)


def report_mismatch(sums: Tensor) -> Numbers:
    """Return the KL of the engine's policy from the trainer's at one version, from the engine's tokens.

    Only tokens of the first minibatch that were computed count, of samples with a gradient.

    It is zero if both computed the same numbers. k1 is unbiased and may be negative; k3 is unbiased, never
    negative, and less noisy (Schulman 2020, http://joschu.net/blog/kl-approx.html).
    """
    num_tokens, k1, k3, gap = sums.tolist()
    if num_tokens == 0:
        return {}
    report = {"k1": k1 / num_tokens, "k3": k3 / num_tokens, "absolute_gap": gap / num_tokens}
    return finite(
        {f"mismatch_{name}": value for name, value in report.items()} | {"mismatch_tokens": num_tokens}
    )


def report_batch(samples: Sequence[TrainingSample], rewards: NDArray[np.float64]) -> Numbers:
    """Return what there is to report about a step's batch: sizes, rewards, lengths and staleness.

    Args:
        samples: the N samples of the batch.
        rewards: [N] as the verifier gave them.
    """
    lengths = np.array([s.num_sampled_tokens for s in samples])
    tickets = np.array([s.ticket for s in samples])
    uniform = [np.ptp(rewards[tickets == ticket]) == 0 for ticket in np.unique(tickets)]
    num_live = sum(int(s.loss_mask.sum()) for s in samples)
    report = {
        "num_samples": len(samples),
        "num_tokens": int(lengths.sum()),
        "num_live_tokens": num_live,
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "reward_min": float(rewards.min()),
        "reward_max": float(rewards.max()),
        "uniform_group_fraction": float(np.mean(uniform)),
        "response_tokens_mean": float(lengths.mean()),
        **{
            f"response_tokens_{name}": float(tokens)
            for name, tokens in zip(
                LENGTH_QUANTILES, np.quantile(lengths, [*LENGTH_QUANTILES.values()]), strict=True
            )
        },
        "prompt_tokens_mean": float(np.mean([len(s.prompt_ids) for s in samples])),
        "masked_token_share": float(1 - num_live / lengths.sum()),
    }
    if histogram := staleness_histogram(samples):
        total = sum(histogram.values())
        report["staleness_mean"] = sum(versions * count for versions, count in histogram.items()) / total
        report["staleness_p50"] = float(_staleness_quantile(histogram, 0.5))
        report["staleness_p95"] = float(_staleness_quantile(histogram, 0.95))
        report["staleness_max"] = float(max(histogram))
    return finite(report)


def _staleness_quantile(histogram: dict[int, int], share: float) -> int:
    """Return the lowest staleness that `share` of the tokens do not exceed."""
    total, seen = sum(histogram.values()), 0
    for versions in sorted(histogram):
        seen += histogram[versions]
        if seen >= share * total:
            return versions
    return max(histogram)


def staleness_histogram(samples: Iterable[TrainingSample]) -> dict[int, int]:
    """Return the sampled tokens' number by staleness, ascending, over samples whose staleness is known."""
    counts: Counter[int] = Counter()
    for sample in samples:
        if sample.staleness is None or not sample.sampled_mask.any():
            continue
        versions = sample.staleness[sample.sampled_mask]
        lowest = int(versions.min())
        by_place = np.bincount(versions - lowest)  # there are millions, and to sort them takes seconds
        counts.update({lowest + int(place): int(by_place[place]) for place in np.flatnonzero(by_place)})
    return dict(sorted(counts.items()))


def finite(values: Mapping[str, float]) -> Numbers:
    """Return the finite numbers of `values`, which are those that JSON can represent."""
    return {name: value for name, value in values.items() if math.isfinite(value)}
