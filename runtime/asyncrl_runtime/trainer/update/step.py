"""One training step, the same on every rank: from a batch of prompt groups to a new policy version."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import overload

import numpy as np
import torch

from asyncrl_api.job import AlgorithmSpec, ScheduleSpec
from asyncrl_runtime.contract.messages import floats_from_bytes, ids_from_bytes
from asyncrl_runtime.trainer.books.staleness import LiveGroup
from asyncrl_runtime.trainer.update import diagnostics
from asyncrl_runtime.trainer.update.advantages import compute_advantages
from asyncrl_runtime.trainer.update.loss import POLICY_LOSSES
from asyncrl_runtime.trainer.update.packing import (
    MicroBatch,
    TrainingSample,
    distribute,
    pack,
    split_minibatches,
)
from asyncrl_runtime.trainer.update.policy_api import StepPolicy, Update


class NumbersUnusable(Exception):
    """The weights or gradients are no longer finite, so going on would train nothing."""


class StepStopped(Exception):
    """The step was stopped between two micro-batches, on all ranks at the same one.

    Args:
        num_updates: how many minibatches had been applied. With none the weights are still the step's first.
    """

    def __init__(self, num_updates: int) -> None:
        super().__init__(f"stopped within a step, after {num_updates} updates of it")
        self.num_updates = num_updates


@dataclass(frozen=True)
class StepPlan:
    """Everything that every rank needs for a step; small enough to be sent to each."""

    samples: tuple[TrainingSample, ...]
    rewards: tuple[float, ...]
    num_minibatches: int
    tokens_per_micro_batch: int
    learning_rate: float


def plan_step(
    groups: Sequence[LiveGroup],
    *,
    algorithm: AlgorithmSpec,
    max_new_tokens: int,
    num_minibatches: int,
    tokens_per_micro_batch: int,
    learning_rate: float,
) -> StepPlan:
    """Turn a batch into training samples with advantages. Pure."""
    live = [(group.ticket, sample) for group in groups for sample in group.samples]
    rewards = np.array([sample.sample.reward for _, sample in live], dtype=np.float64)
    advantages = compute_advantages(
        rewards,
        np.array([ticket for ticket, _ in live]),
        np.array([int(sample.sample.mask().sum()) for _, sample in live]),
        max_new_tokens,
        algorithm,
    )
    samples = tuple(
        TrainingSample(
            ticket=ticket,
            index=one.sample.index,
            prompt_ids=ids_from_bytes(one.sample.prompt_ids),
            response_ids=ids_from_bytes(one.sample.response_ids),
            behavior_logprobs=floats_from_bytes(one.sample.behavior_logprobs),
            sampled_mask=one.sample.mask(),
            loss_mask=one.loss_mask,
            advantage=float(advantage),
            temperature=one.sample.temperature,
            staleness=one.staleness,
        )
        for (ticket, one), advantage in zip(live, advantages, strict=True)
    )
    return StepPlan(samples, tuple(rewards.tolist()), num_minibatches, tokens_per_micro_batch, learning_rate)


def _nothing() -> None:
    """Do nothing: the listener for a caller that does not want to hear about progress."""


def _always(num_updates: int) -> None:
    """Go on: for a caller that stops no step."""


class _Asking(Sequence[MicroBatch]):
    """Micro-batches before each of which it is asked whether the step goes on."""

    def __init__(self, batches: Sequence[MicroBatch], ask: Callable[[], None]) -> None:
        self._batches, self._ask = batches, ask

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, place: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[MicroBatch]: ...
    def __getitem__(self, place: int | slice) -> MicroBatch | Sequence[MicroBatch]:
        return self._batches[place]

    def __iter__(self) -> Iterator[MicroBatch]:
        for batch in self._batches:
            self._ask()
            yield batch


def train_step(
    policy: StepPolicy,
    plan: StepPlan,
    algorithm: AlgorithmSpec,
    rank: int,
    clock: Callable[[], float] = time.perf_counter,
    made: Callable[[], None] = _nothing,
    go_on: Callable[[int], None] = _always,
) -> dict[str, float]:
    """Make all optimizer updates of one step; collective. Return its diagnostics, the same on all ranks.

    The proximal policy is the policy at the start of the step. For the first minibatch it is the policy
    itself, and for the others one pass before the first update computes its log-probs; so a step of a single
    minibatch needs no such pass.

    Args:
        made: called whenever a minibatch is done, so that the step's progress can be followed.
        go_on: called before each micro-batch with the number of updates made; raises StepStopped to stop.

    Raises:
        StepStopped: `go_on` raised it; gradients that were accumulated are of no use any more.
        NumbersUnusable: a gradient is not finite.
    """
    began = clock()
    minibatches = [
        [plan.samples[index] for index in members]
        for members in split_minibatches([s.ticket for s in plan.samples], plan.num_minibatches)
    ]
    packed = [_pack_for_rank(m, plan.tokens_per_micro_batch, policy.world_size, rank) for m in minibatches]
    needs_proximal = POLICY_LOSSES[algorithm.policy_loss].needs_proximal
    proximal = []
    for batches in packed[1:]:
        proximal.append(policy.logprobs(_Asking(batches, partial(go_on, 0))) if needs_proximal else None)
        made()
    updates: list[Update] = []
    for samples, batches, proximal_logprobs in zip(minibatches, packed, [None, *proximal], strict=True):
        update = policy.update(
            _Asking(batches, partial(go_on, len(updates))),
            proximal_logprobs=proximal_logprobs,
            num_tokens=sum(s.num_sampled_tokens for s in samples),
            learning_rate=plan.learning_rate,
        )
        if not np.isfinite(update.gradient_norm):
            raise NumbersUnusable(
                f"the gradient of {len(samples)} samples is {update.gradient_norm}; lower "
                "training.learningRate, or look for rewards or log-probs that are not finite"
            )
        updates.append(update)
        made()
    return _report(policy, plan, packed[0], updates, clock() - began)


def _pack_for_rank(
    samples: Sequence[TrainingSample], capacity: int, num_ranks: int, rank: int
) -> list[MicroBatch]:
    bins = distribute([sample.num_tokens for sample in samples], capacity, num_ranks)[rank]
    return [pack([samples[index] for index in members]) for members in bins]


def _report(
    policy: StepPolicy,
    plan: StepPlan,
    first_minibatch: Sequence[MicroBatch],
    updates: Sequence[Update],
    seconds: float,
) -> dict[str, float]:
    sums = torch.stack([update.sums for update in updates]).sum(0)
    tokens = diagnostics.report_tokens(sums)
    tokens["loss"] = tokens.get("loss", 0.0) / len(updates)
    mismatch = sum(
        (
            diagnostics.mismatch_sums(logprobs, batch.behavior_logprobs, batch.staleness)
            for batch, logprobs in zip(first_minibatch, updates[0].logprobs, strict=True)
        ),
        start=torch.zeros(4, dtype=torch.float64),
    )
    return {
        **diagnostics.report_batch(plan.samples, np.array(plan.rewards)),
        **tokens,
        **diagnostics.report_mismatch(policy.reduce(mismatch)),
        "gradient_norm": float(np.mean([update.gradient_norm for update in updates])),
        "learning_rate": plan.learning_rate,
        "num_samples": len(plan.samples),
        "num_micro_batches": len(first_minibatch) * len(updates),
        "train_seconds": seconds,
    }


def learning_rate(schedule: ScheduleSpec, step: int, max_steps: int, base: float) -> float:
    """Return the learning rate of step `step`, 0 <= step < `max_steps`; all its minibatches share it.

    No step has a rate of zero, since that would waste the step: the warm-up begins at `base / warmup_steps`
    and reaches `base` with its last step, and a decay would reach zero at `max_steps`, the step after the
    last.

    Args:
        max_steps: the value in force. It may grow, and the decay then stretches from that step on.
        base: `spec.training.learningRate`.
    """
    if step < schedule.warmup_steps:
        return base * (step + 1) / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / max(1, max_steps - schedule.warmup_steps)
    match schedule.type:
        case "Constant":
            return base
        case "Linear":
            return base * (1 - progress)
        case "Cosine":
            return base * (1 + math.cos(math.pi * progress)) / 2
