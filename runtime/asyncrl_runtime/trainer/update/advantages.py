"""From rewards to advantages. Pure; one float per sample, over the whole step's batch at once.

gamma = lambda = 1 and there is no critic, so each token's advantage is its response's.

A new one is a function and its entry in `ADVANTAGES`, here, and a name in `AlgorithmSpec.advantage`; one that
needs no group to compare with is also named in the rule of the API about `sampling.groupSize`.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from asyncrl_api.job import AlgorithmSpec, OverlongPenaltySpec

EPSILON = 1e-6
"""Added to a standard deviation: a group of equal rewards has advantage 0, not 0/0."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def compute_advantages(
    rewards: Floats, tickets: Ints, num_sampled_tokens: Ints, max_new_tokens: int, algorithm: AlgorithmSpec
) -> Floats:
    """Return the advantage of each sample of a step.

    Args:
        rewards: [N] as the verifier gave them.
        tickets: [N] which prompt group each belongs to. Groups have the size they have: a sample that failed
            is absent and nobody else's baseline.
        num_sampled_tokens: [N] length of the response as the policy sampled it.
        max_new_tokens: bound on that length, for the overlong penalty.

    Returns:
        [N] of `(reward - penalty + rewardShift) * rewardScale`, compared as `algorithm.advantage` says.
    """
    shaped = rewards
    if algorithm.overlong_penalty is not None:
        shaped = shaped - overlong_penalty(num_sampled_tokens, max_new_tokens, algorithm.overlong_penalty)
    shaped = (shaped + algorithm.reward_shift) * algorithm.reward_scale
    _, groups = np.unique(tickets, return_inverse=True)
    return ADVANTAGES[algorithm.advantage](shaped, groups)


def overlong_penalty(num_sampled_tokens: Ints, max_new_tokens: int, rule: OverlongPenaltySpec) -> Floats:
    """Return [N] what to subtract from the rewards (DAPO, arXiv 2503.14476, eq. 13, with its sign turned).

    0 up to `max_new_tokens - buffer_tokens`, then growing linearly to `penalty` at `max_new_tokens`.
    """
    excess = num_sampled_tokens - (max_new_tokens - rule.buffer_tokens)
    return rule.penalty * np.clip(excess / rule.buffer_tokens, 0.0, 1.0)


def group_centered(rewards: Floats, groups: Ints) -> Floats:
    """Reward minus the group's mean (Dr. GRPO, arXiv 2503.20783, section 3.2). A group of one gets 0.

    Args:
        rewards: [N].
        groups: [N] in 0 .. number of groups - 1.
    """
    centered: Floats = rewards - _group_means(rewards, groups)[groups]
    return centered


def group_normalized(rewards: Floats, groups: Ints) -> Floats:
    """`group_centered` over the group's population standard deviation (GRPO, arXiv 2402.03300, 4.1.2)."""
    centered = group_centered(rewards, groups)
    deviations = np.sqrt(_group_means(centered**2, groups))
    return centered / (deviations[groups] + EPSILON)


def leave_one_out(rewards: Floats, groups: Ints) -> Floats:
    """Reward minus the mean of the group's others (RLOO, arXiv 2402.14740).

    That is `group_centered` times n / (n - 1). In a group of one there is nobody to compare with: 0.
    """
    sizes = np.bincount(groups)[groups]
    return group_centered(rewards, groups) * sizes / np.maximum(sizes - 1, 1)


def batch_normalized(rewards: Floats, _: Ints) -> Floats:
    """Reward minus the batch's mean, over its standard deviation (AReaL, arXiv 2505.24298, appendix B.1).

    Each sample counts once, whatever its length. The batch is the step's, of all ranks and minibatches.
    """
    normalized: Floats = (rewards - rewards.mean()) / (rewards.std() + EPSILON)
    return normalized


def _group_means(values: Floats, groups: Ints) -> Floats:
    """Return [number of groups]."""
    means: Floats = np.bincount(groups, weights=values) / np.bincount(groups)
    return means


ADVANTAGES: Mapping[str, Callable[[Floats, Ints], Floats]] = {
    "GroupNormalized": group_normalized,
    "GroupCentered": group_centered,
    "LeaveOneOut": leave_one_out,
    "BatchNormalized": batch_normalized,
}
"""The values of `spec.algorithm.advantage`: from rewards, [N], and their groups, [N], to advantages, [N]."""
