"""One training step, the same on every rank: from a batch of prompt groups to a new policy version."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from asyncrl_api.job import ScheduleSpec
from asyncrl_runtime.contract.messages import floats_from_bytes, ids_from_bytes
from asyncrl_runtime.trainer.books.staleness import LiveGroup
from asyncrl_runtime.trainer.update import diagnostics
from asyncrl_runtime.trainer.update.advantages import compute_advantages, longest_turn
from asyncrl_runtime.trainer.update.failures import MicroBatchWatch
from asyncrl_runtime.trainer.update.loss import POLICY_LOSSES, has_gradient
from asyncrl_runtime.trainer.update.packing import (
    Announced,
    MicroBatch,
    TrainingSample,
    distribute,
    pack,
    split_minibatches,
)
from asyncrl_runtime.trainer.update.policy_api import StepPolicy, StepSettings, Update
from asyncrl_runtime.trainer.update.shares import MicroBatchSamples, MinibatchShare, StepShare


@dataclass(frozen=True, eq=False)
class StepPlan:
    """A whole step, as rank 0 knows it; each rank gets its share."""

    samples: tuple[TrainingSample, ...]
    rewards: tuple[float, ...]
    num_minibatches: int
    tokens_per_micro_batch: int
    learning_rate: float
    settings: StepSettings
    skipped: frozenset[int] = frozenset()
    """The minibatches that an earlier attempt made no update of: it made none, so none is made now."""

    def shares(self, num_ranks: int) -> list[StepShare]:
        """Distribute over the ranks what has a gradient. Pure.

        What has none still counts in the denominator. A minibatch without any is an empty micro-batch on each
        rank: its update is made all the same, since momentum and decay act in it.

        Raises:
            ValueError: a sample is longer than a micro-batch.
        """
        minibatches = [
            [self.samples[index] for index in members]
            for members in split_minibatches([s.ticket for s in self.samples], self.num_minibatches)
        ]
        num_tokens = [sum(s.num_sampled_tokens for s in samples) for samples in minibatches]
        computed = [
            [s for s in samples if has_gradient(s, self.settings.algorithm)] for samples in minibatches
        ]
        bins = [
            distribute([s.num_tokens for s in samples], self.tokens_per_micro_batch, num_ranks)
            for samples in computed
        ]
        return [
            StepShare(
                tuple(
                    MinibatchShare(
                        tuple(tuple(samples[index] for index in members) for members in by_rank[rank]), total
                    )
                    for samples, by_rank, total in zip(computed, bins, num_tokens, strict=True)
                ),
                self.learning_rate,
                self.settings,
                self.skipped,
            )
            for rank in range(num_ranks)
        ]

    def report(self) -> dict[str, float]:
        """Return what there is to report about the batch, whatever comes of its training. Pure."""
        computed = [s for s in self.samples if has_gradient(s, self.settings.algorithm)]
        return {
            **diagnostics.report_batch(self.samples, np.array(self.rewards)),
            "num_computed_samples": len(computed),
            "num_pass_tokens": sum(s.num_tokens for s in computed),
        }


@dataclass(frozen=True)
class StepOutcome:
    """What a step came to, the same on all ranks."""

    report: dict[str, float]
    """What the updates say; `StepPlan.report` says more about the batch."""
    skipped: tuple[int, ...]
    """The minibatches whose update was not applied, since its gradient is not finite."""


def plan_step(
    groups: Sequence[LiveGroup],
    *,
    settings: StepSettings,
    max_new_tokens: int,
    num_minibatches: int,
    tokens_per_micro_batch: int,
    learning_rate: float,
) -> StepPlan:
    """Turn a batch into training samples with advantages. Pure.

    Args:
        max_new_tokens: the bound on a turn of samples that do not say what theirs was.
    """
    live = [(group.ticket, sample) for group in groups for sample in group.samples]
    rewards = np.array([sample.sample.reward for _, sample in live], dtype=np.float64)
    advantages = compute_advantages(
        rewards,
        np.array([ticket for ticket, _ in live]),
        np.array([longest_turn(one.sample) for _, one in live]),
        np.array([one.sample.max_new_tokens or max_new_tokens for _, one in live]),
        settings.algorithm,
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
    return StepPlan(
        samples, tuple(rewards.tolist()), num_minibatches, tokens_per_micro_batch, learning_rate, settings
    )


def _nothing() -> None:
    """Do nothing: the listener for a caller that does not want to hear about progress."""


def _always(num_updates: int) -> None:
    """Go on: for a caller that stops no step."""


def train_step(
    policy: StepPolicy,
    share: StepShare,
    clock: Callable[[], float] = time.perf_counter,
    made: Callable[[], None] = _nothing,
    go_on: Callable[[int], None] = _always,
) -> StepOutcome:
    """Make all optimizer updates of one step; collective.

    The proximal policy is the policy at the start of the step. For the first minibatch it is the policy
    itself, and for the others one pass before the first update computes its log-probs; so a step of a single
    minibatch needs no such pass.

    Args:
        share: this rank's part of the step.
        made: called whenever a minibatch is done, so that the step's progress can be followed.
        go_on: called before each micro-batch with the number of updates made; raises StepStopped to stop.

    Raises:
        StepFailed: a micro-batch, or the whole, raised an exception that is its own fault.
        StepStopped: `go_on` raised it; gradients that were accumulated are of no use any more.
    """
    watch = MicroBatchWatch()
    with watch.naming_failures():
        return _train_step(policy, share, clock, made, go_on, watch)


def _train_step(
    policy: StepPolicy,
    share: StepShare,
    clock: Callable[[], float],
    made: Callable[[], None],
    go_on: Callable[[int], None],
    watch: MicroBatchWatch,
) -> StepOutcome:
    began = clock()
    policy.use(share.settings)
    packed = [_pack(minibatch.micro_batches, watch) for minibatch in share.minibatches]
    needs_proximal = POLICY_LOSSES[share.settings.algorithm.policy_loss].needs_proximal
    proximal, packed_at = [], clock()
    for batches in packed[1:]:
        proximal.append(policy.logprobs(_asking(batches, go_on, 0)) if needs_proximal else None)
        made()
    proximal_at = clock()
    updates: dict[int, Update] = {}
    for number, (batches, proximal_logprobs) in enumerate(zip(packed, [None, *proximal], strict=True)):
        if number not in share.skipped:
            updates[number] = policy.update(
                _asking(batches, go_on, len(updates)),
                proximal_logprobs=proximal_logprobs,
                num_tokens=share.minibatches[number].num_tokens,
                learning_rate=share.learning_rate,
            )
        made()
    applied = [number for number, update in updates.items() if math.isfinite(update.gradient_norm)]
    skipped = tuple(number for number in range(len(packed)) if number not in applied)
    report = _report(policy, packed[0], updates, applied)
    report |= {
        "num_micro_batches": sum(len(packed[number]) for number in updates),
        "learning_rate": share.learning_rate,
        "skipped_updates": len(skipped),
        "num_ranks": policy.world_size,
        "proximal_seconds": proximal_at - packed_at,
        "train_seconds": clock() - began,
    }
    return StepOutcome(report, skipped)


def _asking(
    batches: Sequence[MicroBatch], go_on: Callable[[int], None], num_updates: int
) -> Sequence[MicroBatch]:
    """Return micro-batches before each of which it is asked whether the step goes on."""
    return Announced(batches, lambda place: go_on(num_updates))


def _pack(micro_batches: Sequence[MicroBatchSamples], watch: MicroBatchWatch) -> Sequence[MicroBatch]:
    tickets = [[sample.ticket for sample in samples] for samples in micro_batches]
    return watch.over([pack(samples) for samples in micro_batches], tickets)


def _report(
    policy: StepPolicy,
    first_minibatch: Sequence[MicroBatch],
    updates: Mapping[int, Update],
    applied: Sequence[int],
) -> dict[str, float]:
    """Return the diagnostics of a step; what an update that was not applied would say is left out."""
    tokens = {}
    if applied:
        sums = torch.stack([updates[number].sums for number in applied]).sum(0)
        tokens = diagnostics.report_tokens(sums)
        tokens["loss"] = tokens.get("loss", 0.0) / len(applied)
        tokens["gradient_norm"] = float(np.mean([updates[number].gradient_norm for number in applied]))
    first_logprobs = updates[0].logprobs if 0 in updates else []
    mismatch = sum(
        (
            diagnostics.mismatch_sums(logprobs, batch.behavior_logprobs, batch.staleness)
            for batch, logprobs in zip([*first_minibatch], first_logprobs, strict=False)
        ),
        start=torch.zeros(4, dtype=torch.float64),
    )
    return {
        **tokens,
        **diagnostics.report_mismatch(policy.reduce(mismatch)),
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
