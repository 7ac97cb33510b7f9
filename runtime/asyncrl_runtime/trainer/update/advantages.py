"""Turns rewards into advantages: one float per sample, for the whole step's batch at once. Pure.

gamma = lambda = 1 and there is no critic, so each token's advantage is its response's.

To add one, write a function, enter it in `ADVANTAGES` below, and add its name to `AlgorithmSpec.advantage`.
If it needs no group to compare with, also name it in the API's rule about `sampling.groupSize`.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from asyncrl_api.job import AlgorithmSpec, OverlongPenaltySpec
from asyncrl_runtime.contract.messages import Sample
from asyncrl_runtime.contract.numbers import MAX_FLOAT32

EPSILON = 1e-6
"""The number added to a standard deviation, so that a group of equal rewards has advantage 0, not 0/0."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def compute_advantages(
    rewards: Floats, tickets: Ints, longest_turns: Ints, max_new_tokens: Ints, algorithm: AlgorithmSpec
) -> Floats:
    """Return the advantage of each sample of a step.

    Args:
        rewards: [N] as the verifier gave them.
        tickets: [N] the prompt group that each sample belongs to. Groups may be of different sizes: a sample
            that failed is absent, and not part of any baseline.
        longest_turns: [N] the length of the longest answer within the sample, for the overlong penalty.
        max_new_tokens: [N] the bound on the length of an answer under which the sample was made.

    Returns:
        [N] of `(reward - penalty + rewardShift) * rewardScale`, bounded by `rewardClip`, compared as
        `algorithm.advantage` says. What float32 cannot hold, as the loss will, is its largest number.
    """
    shaped = rewards
    if algorithm.overlong_penalty is not None:
        shaped = shaped - overlong_penalty(longest_turns, max_new_tokens, algorithm.overlong_penalty)
    shaped = (shaped + algorithm.reward_shift) * algorithm.reward_scale
    if algorithm.reward_clip is not None:
        shaped = np.clip(shaped, -algorithm.reward_clip, algorithm.reward_clip)
    _, groups = np.unique(tickets, return_inverse=True)
    return np.clip(ADVANTAGES[algorithm.advantage](shaped, groups), -MAX_FLOAT32, MAX_FLOAT32)


def overlong_penalty(longest_turns: Ints, max_new_tokens: Ints, rule: OverlongPenaltySpec) -> Floats:
    """Return [N] what to subtract from the rewards (DAPO, arXiv 2503.14476, eq. 13, with the sign reversed).

    0 up to `max_new_tokens - buffer_tokens`, then growing linearly to `penalty` at `max_new_tokens`. In the
    paper a response has one turn, and the bound is that of a response. Here the bound is that of a turn, so
    of several turns the longest counts: it is the one that came nearest to being cut off.
    """
    buffer = np.minimum(rule.buffer_tokens, max_new_tokens)
    excess = longest_turns - (max_new_tokens - buffer)
    penalty: Floats = rule.penalty * np.clip(excess / buffer, 0.0, 1.0)
    return penalty


def longest_turn(sample: Sample) -> int:
    """Return the number of tokens of a sample's longest answer.

    Samples of older workers do not say it; theirs is the longest run of sampled tokens, which is the same
    wherever something was told between the answers.
    """
    if sample.longest_turn:
        return sample.longest_turn
    edges = np.flatnonzero(np.diff(sample.mask().astype(np.int8), prepend=0, append=0))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def group_centered(rewards: Floats, groups: Ints) -> Floats:
    """Return reward minus the group's mean (Dr. GRPO, arXiv 2503.20783, section 3.2); 0 in a group of one.

    Args:
        rewards: [N].
        groups: [N] in 0 .. number of groups - 1.
    """
    centered, exponents = _centered(rewards, groups)
    return np.ldexp(centered, exponents)


def group_normalized(rewards: Floats, groups: Ints) -> Floats:
    """Return `group_centered` over the group's population deviation (GRPO, arXiv 2402.03300, 4.1.2)."""
    centered, exponents = _centered(rewards, groups)
    deviations = np.sqrt(_group_means(centered**2, groups))
    normalized: Floats = centered / (deviations[groups] + np.ldexp(EPSILON, -exponents))
    return normalized


def leave_one_out(rewards: Floats, groups: Ints) -> Floats:
    """Return reward minus the mean of the group's other samples (RLOO, arXiv 2402.14740).

    That is `group_centered` times n / (n - 1). In a group of one, with nothing to compare with, it is 0.
    """
    sizes = np.bincount(groups)[groups]
    return group_centered(rewards, groups) * sizes / np.maximum(sizes - 1, 1)


def batch_normalized(rewards: Floats, _: Ints) -> Floats:
    """Return reward minus batch mean, over the standard deviation (AReaL, arXiv 2505.24298, appendix B.1).

    Each sample counts once, whatever its length. The batch is the step's, over all ranks and minibatches.
    """
    return group_normalized(rewards, np.zeros(len(rewards), dtype=np.int64))


def _centered(rewards: Floats, groups: Ints) -> tuple[Floats, Ints]:
    """Return rewards minus the group's mean, [N], divided by 2 to the power of the exponents, [N].

    So the rewards of a group are below 1 before they are added up and squared: 1e200 squared is infinite,
    and a deviation that is infinite would make every advantage 0. Powers of two change no other bit.
    """
    largest = np.zeros(groups.max() + 1)
    np.maximum.at(largest, groups, np.abs(rewards))
    exponents = np.maximum(np.frexp(largest)[1], 0).astype(np.int64)[groups]
    scaled = np.ldexp(rewards, -exponents)
    centered = scaled - _group_means(scaled, groups)[groups]
    # The mean of equal numbers may differ from them by a rounding error.
    lowest, highest = np.full(len(largest), np.inf), np.full(len(largest), -np.inf)
    np.minimum.at(lowest, groups, rewards)
    np.maximum.at(highest, groups, rewards)
    return np.where((lowest == highest)[groups], 0.0, centered), exponents


def _group_means(values: Floats, groups: Ints) -> Floats:
    """Return the mean of each group, [number of groups]."""
    means: Floats = np.bincount(groups, weights=values) / np.bincount(groups)
    return means


ADVANTAGES: Mapping[str, Callable[[Floats, Ints], Floats]] = {
    "GroupNormalized": group_normalized,
    "GroupCentered": group_centered,
    "LeaveOneOut": leave_one_out,
    "BatchNormalized": batch_normalized,
}
"""The values of `spec.algorithm.advantage`; each turns rewards and groups, both [N], into advantages, [N]."""
