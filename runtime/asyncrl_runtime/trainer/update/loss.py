"""Policy losses on flat tensors of R sampled tokens. Pure; each says which paper's equation it is.

All losses have the same denominator: the sampled tokens of the minibatch over all micro-batches and ranks,
counted before anything is masked. So a token that leaves the loss (because it is stale, or its weight exceeds
the cap) dilutes the gradient and does not inflate that of the others, and the split into micro-batches
changes nothing.

| loss | objective per token, to be maximized |
|---|---|
| DecoupledPPO | w min(u A, clip(u) A), u = pi_theta / pi_prox, w = bound(pi_prox / pi_behav) |
| GSPO | the same with u and w per sequence: geometric means over its tokens |
| PPO | min(u A, clip(u) A), u = pi_theta / pi_behav |
| CISPO | sg(clip(u)) A log pi_theta, u = pi_theta / pi_behav |
| TIS | sg(min(u, max)) A log pi_theta, u = pi_theta / pi_behav |

An advantage of 0 leaves no objective, so what has none is not computed at all (`has_gradient`).

To add a loss, write a function, enter it in `POLICY_LOSSES` below, and add its name to
`AlgorithmSpec.policy_loss`. Its objective must be 0 where the advantage is.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from asyncrl_api.job import AlgorithmSpec, ImportanceWeightSpec
from asyncrl_runtime.trainer.update.diagnostics import token_sums
from asyncrl_runtime.trainer.update.packing import MicroBatch, TrainingSample

MAX_LOG_RATIO = 20.0
"""The bound at which log-ratios are cut off, with no gradient beyond it: exp(90) is infinite, and infinity
times 0 is no gradient."""


class Loss(NamedTuple):
    value: Tensor
    """A scalar; summed over the micro-batches and ranks of a minibatch it is the mean per sampled token."""
    sums: Tensor
    """The micro-batch's diagnostics, detached; see diagnostics.token_sums."""


class Surrogate(NamedTuple):
    """A policy objective per token, all [R]; only `objective` carries a gradient."""

    objective: Tensor
    log_ratios: Tensor
    log_weights: Tensor
    weights: Tensor
    clipped: Tensor
    capped: Tensor


def compute_loss(
    algorithm: AlgorithmSpec,
    batch: MicroBatch,
    logprobs: Tensor,
    entropies: Tensor,
    *,
    proximal_logprobs: Tensor | None,
    reference_logprobs: Tensor | None,
    num_tokens: int,
) -> Loss:
    """Return the loss of one micro-batch and its diagnostics.

    Args:
        logprobs: [R] under the policy being updated; carries the gradient.
        entropies: [R] of the same distributions.
        proximal_logprobs: [R] under the policy at the step's start; None if that is the policy itself, as in
            a step's first minibatch, and for losses that do not need it (`POLICY_LOSSES`).
        reference_logprobs: [R]; None without a KL term.
        num_tokens: the sampled tokens of the minibatch over all ranks and micro-batches.

    Regularizers see every token of the loss mask, whatever its importance weight: they compare the policy
    with the reference or with itself, not with the behavior policy.
    """
    # Detached, since neither the trust region's center nor an importance weight carries a gradient.
    proximal = (logprobs if proximal_logprobs is None else proximal_logprobs).detach()
    surrogate = POLICY_LOSSES[algorithm.policy_loss].surrogate(algorithm, batch, logprobs, proximal)
    per_token = -surrogate.objective
    kl = torch.zeros_like(entropies)
    if reference_logprobs is not None:
        kl = k3(logprobs, reference_logprobs)
        per_token = per_token + algorithm.kl_coefficient * kl
    if algorithm.entropy_coefficient:
        per_token = per_token - algorithm.entropy_coefficient * entropies
    value = torch.where(batch.loss_mask, per_token, 0.0).sum() / num_tokens
    sums = token_sums(
        loss=value,
        log_ratios=surrogate.log_ratios,
        log_weights=surrogate.log_weights,
        weights=surrogate.weights,
        clipped=surrogate.clipped,
        capped=surrogate.capped,
        entropies=entropies,
        kl=kl,
        loss_mask=batch.loss_mask,
    )
    return Loss(value, sums)


def has_gradient(sample: TrainingSample, algorithm: AlgorithmSpec) -> bool:
    """Return whether the gradient of a sample may differ from zero, whatever the policy is.

    It is zero if no token is in the loss, and, without KL and entropy terms, if the advantage is 0, as in a
    group whose rewards are all equal. A token that is clipped does not count: that depends on the policy.
    """
    has_regularizer = algorithm.kl_coefficient != 0 or algorithm.entropy_coefficient != 0
    has_advantage = np.float32(sample.advantage) != 0  # as the loss will see it
    return bool(sample.loss_mask.any()) and bool(has_advantage or has_regularizer)


def decoupled_ppo(
    algorithm: AlgorithmSpec, batch: MicroBatch, logprobs: Tensor, proximal: Tensor
) -> Surrogate:
    """Decoupled PPO (AReaL, arXiv 2505.24298, eq. 5; Hilton et al., arXiv 2110.00641, section 2).

    The weight corrects for the policy that sampled the token; the clip limits movement from this step's
    start. The paper does not bound the weight.
    """
    return _decoupled(
        algorithm,
        batch.advantages,
        log_ratios=_log_ratio(logprobs, proximal),
        log_weights=_log_ratio(proximal, batch.behavior_logprobs),
    )


def gspo(algorithm: AlgorithmSpec, batch: MicroBatch, logprobs: Tensor, proximal: Tensor) -> Surrogate:
    """GSPO's length-normalized sequence ratio (arXiv 2507.18071, eq. 5 and 7) in the decoupled form.

    The paper's pi_old samples and centers the clip at once. Its clip is so narrow (3e-4) that measured
    from a stale behavior policy it would bind on nearly everything, so it stays at the proximal policy, and
    the behavior policy is corrected for by a weight of the same kind, the geometric mean of
    pi_prox / pi_behav over the sequence, bounded like that of a token (so `Mask` drops whole sequences).
    Means are over the tokens in the loss. The paper averages over sequences; here, as in AReaL, each
    counts by its tokens, which gives every token's score the same factor and no length an advantage.
    """
    return _decoupled(
        algorithm,
        batch.advantages,
        log_ratios=_sequence_mean(_log_ratio(logprobs, proximal), batch),
        log_weights=_sequence_mean(_log_ratio(proximal, batch.behavior_logprobs), batch),
    )


def ppo(algorithm: AlgorithmSpec, batch: MicroBatch, logprobs: Tensor, _: Tensor) -> Surrogate:
    """PPO (arXiv 1707.06347, eq. 7) with the behavior policy as pi_old, which is also the clip's center."""
    log_ratios = _log_ratio(logprobs, batch.behavior_logprobs)
    ratios = log_ratios.exp()
    objective, clipped = clipped_objective(ratios, batch.advantages, algorithm)
    return Surrogate(
        objective, log_ratios, log_ratios, ratios.detach(), clipped, capped=torch.zeros_like(clipped)
    )


def cispo(algorithm: AlgorithmSpec, batch: MicroBatch, logprobs: Tensor, _: Tensor) -> Surrogate:
    """CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5): the weight is clipped, no token loses its gradient.

    The ratio is to the behavior policy, which pi_old is in the paper. By default only the upper bound binds,
    as there.
    """
    log_ratios = _log_ratio(logprobs, batch.behavior_logprobs).detach()
    ratios = log_ratios.exp()
    low, high = algorithm.clip_bounds
    weights = ratios.clamp(1 - low, 1 + high)
    objective = weights * batch.advantages * logprobs
    return Surrogate(
        objective,
        log_ratios,
        log_ratios,
        weights,
        weights != ratios,
        capped=torch.zeros_like(batch.loss_mask),
    )


def tis(algorithm: AlgorithmSpec, batch: MicroBatch, logprobs: Tensor, _: Tensor) -> Surrogate:
    """REINFORCE with truncated importance sampling (IMPALA, arXiv 1802.01561, section 4.2; Ionides 2008).

    rho = min(pi_theta / pi_behav, importanceWeight.max). Truncation is the method itself, so `onExceed` plays
    no part in it. (Truncating pi_prox / pi_behav in front of PPO's objective is DecoupledPPO with `Clamp`.)
    """
    log_ratios = _log_ratio(logprobs, batch.behavior_logprobs).detach()
    ratios = log_ratios.exp()
    weights = ratios.clamp(max=algorithm.importance_weight.max)
    objective = weights * batch.advantages * logprobs
    return Surrogate(
        objective, log_ratios, log_ratios, weights, torch.zeros_like(batch.loss_mask), weights != ratios
    )


def clipped_objective(ratios: Tensor, advantages: Tensor, algorithm: AlgorithmSpec) -> tuple[Tensor, Tensor]:
    """Return min(u A, clip(u) A), [R], and where the bound removed the gradient, [R] bool.

    With `dual`, the cost of a negative advantage is bounded too: max(that, dual A) where A < 0 (dual-clip
    PPO, arXiv 1912.09729, eq. 5).
    """
    free = ratios * advantages
    low, high = algorithm.clip_bounds
    objective = torch.minimum(free, ratios.clamp(1 - low, 1 + high) * advantages)
    if (dual := algorithm.clip.dual) is not None:
        objective = torch.where(advantages < 0, objective.maximum(dual * advantages), objective)
    return objective, (objective != free).detach()


def bounded_weights(log_weights: Tensor, rule: ImportanceWeightSpec) -> tuple[Tensor, Tensor]:
    """Return importance weights within their cap, [R], and where they exceeded it, [R] bool.

    With `Mask` such a token leaves the loss (weight 0), as in AReaL's code; with `Clamp` it gets the cap.
    """
    weights = log_weights.exp()
    exceeded = weights > rule.max
    return weights.masked_fill(exceeded, 0.0 if rule.on_exceed == "Mask" else rule.max), exceeded


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Return [R] estimates of KL(pi_theta || pi_ref), never negative (GRPO, arXiv 2402.03300, eq. 4)."""
    gap = _log_ratio(reference_logprobs, logprobs)
    return gap.exp() - gap - 1


def _decoupled(
    algorithm: AlgorithmSpec, advantages: Tensor, *, log_ratios: Tensor, log_weights: Tensor
) -> Surrogate:
    objective, clipped = clipped_objective(log_ratios.exp(), advantages, algorithm)
    weights, capped = bounded_weights(log_weights, algorithm.importance_weight)
    return Surrogate(weights * objective, log_ratios.detach(), log_weights.detach(), weights, clipped, capped)


def _log_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    # clamp would not do: its gradient at NaN is 0, so a broken model would seem to have nothing to learn.
    return F.hardtanh(numerator - denominator, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def _sequence_mean(values: Tensor, batch: MicroBatch) -> Tensor:
    """Return [R]: for each token, the mean of `values` over its sequence's tokens in the loss."""
    live = batch.loss_mask.to(values.dtype)
    totals = values.new_zeros(batch.num_sequences).index_add(0, batch.sequences, values * live)
    counts = live.new_zeros(batch.num_sequences).index_add(0, batch.sequences, live)
    return (totals / counts.clamp(min=1))[batch.sequences]


class PolicyLoss(NamedTuple):
    """A value of `spec.algorithm.policyLoss`."""

    surrogate: Callable[[AlgorithmSpec, MicroBatch, Tensor, Tensor], Surrogate]
    """The function, called with algorithm, micro-batch, log-probs [R] and detached proximal log-probs [R]."""
    needs_proximal: bool
    """Whether it compares with the proximal policy, so that a step of several minibatches needs the log-probs
    under it. Without them the policy itself would be a minibatch's proximal policy, with no trust region."""


POLICY_LOSSES: Mapping[str, PolicyLoss] = {
    "DecoupledPPO": PolicyLoss(decoupled_ppo, needs_proximal=True),
    "GSPO": PolicyLoss(gspo, needs_proximal=True),
    "PPO": PolicyLoss(ppo, needs_proximal=False),
    "CISPO": PolicyLoss(cispo, needs_proximal=False),
    "TIS": PolicyLoss(tis, needs_proximal=False),
}
