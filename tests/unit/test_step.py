"""A training step on a policy that only remembers what it was asked."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from asyncrl_api.job import AlgorithmSpec
from asyncrl_runtime.trainer.update.diagnostics import NUM_BINS, SCALARS
from asyncrl_runtime.trainer.update.loss import POLICY_LOSSES
from asyncrl_runtime.trainer.update.packing import MicroBatch, TrainingSample
from asyncrl_runtime.trainer.update.policy_api import Update
from asyncrl_runtime.trainer.update.step import NumbersUnusable, StepPlan, StepStopped, train_step

NUM_MINIBATCHES = 3


class RecordingPolicy:
    """One rank, whose log-probs are the number of updates made before they were asked for."""

    world_size = 1

    def __init__(self, gradient_norm: float = 1.0) -> None:
        self.gradient_norm = gradient_norm
        self.proximal: list[list[Tensor] | None] = []
        """The proximal log-probs that each update was given."""
        self.num_tokens: list[int] = []

    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        return [torch.full((batch.num_sampled_tokens,), float(len(self.proximal))) for batch in micro_batches]

    def update(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        proximal_logprobs: Sequence[Tensor] | None,
        num_tokens: int,
        learning_rate: float,
    ) -> Update:
        logprobs = self.logprobs(micro_batches)
        self.proximal.append(None if proximal_logprobs is None else list(proximal_logprobs))
        self.num_tokens.append(num_tokens)
        sums = torch.zeros(len(SCALARS) + 2 * NUM_BINS, dtype=torch.float64)
        return Update(sums, self.gradient_norm, logprobs)

    def reduce(self, sums: Tensor) -> Tensor:
        return sums


def sample(ticket: int, num_tokens: int) -> TrainingSample:
    everything = np.ones(num_tokens, np.bool_)
    return TrainingSample(
        ticket=ticket,
        index=0,
        prompt_ids=np.array([1], np.int32),
        response_ids=np.full(num_tokens, 7, np.int32),
        behavior_logprobs=np.full(num_tokens, -1.0, np.float32),
        sampled_mask=everything,
        loss_mask=everything,
        advantage=1.0,
        temperature=1.0,
        staleness=np.zeros(num_tokens, np.int32),
    )


def step(policy: RecordingPolicy, policy_loss: str) -> dict[str, float]:
    plan = StepPlan(
        tuple(sample(ticket, 2 + ticket) for ticket in range(6)), (0.0,) * 6, NUM_MINIBATCHES, 16, 0.5
    )
    algorithm = AlgorithmSpec.model_validate({"policyLoss": policy_loss})
    seconds = iter((10.0, 12.5))
    return train_step(policy, plan, algorithm, rank=0, clock=lambda: next(seconds))


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_all_minibatches_but_the_first_know_where_the_step_began_if_the_loss_needs_it(name: str) -> None:
    policy = RecordingPolicy()
    step(policy, name)
    first, *others = policy.proximal
    assert first is None and len(others) == NUM_MINIBATCHES - 1
    for given in others:
        assert (given is not None) == POLICY_LOSSES[name].needs_proximal
        assert all((logprobs == 0).all() for logprobs in given or []), "asked for before the first update"


def test_each_token_is_of_one_minibatch_and_the_report_is_of_the_step() -> None:
    policy = RecordingPolicy()
    report = step(policy, "PPO")
    assert sum(policy.num_tokens) == sum(2 + ticket for ticket in range(6))
    assert (report["train_seconds"], report["num_samples"], report["learning_rate"]) == (2.5, 6, 0.5)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_ends_the_step(norm: float) -> None:
    policy = RecordingPolicy(gradient_norm=norm)
    with pytest.raises(NumbersUnusable, match=r"the gradient of 2 samples is (nan|inf); lower"):
        step(policy, "DecoupledPPO")
    assert len(policy.proximal) == 1


@pytest.mark.parametrize("stop_at", range(7))
def test_it_is_asked_before_each_micro_batch_whether_the_step_goes_on(stop_at: int) -> None:
    """First before those of the proximal pass, which are two: the first minibatch needs none."""
    plan = StepPlan(tuple(sample(t, 2 + t) for t in range(6)), (0.0,) * 6, NUM_MINIBATCHES, 16, 0.5)
    policy, asked = RecordingPolicy(), list[int]()

    def go_on(num_updates: int) -> None:
        if len(asked) == stop_at:
            raise StepStopped(num_updates)
        asked.append(num_updates)

    expected = [0, 0, 0, 1, 2]
    if stop_at >= len(expected):
        train_step(policy, plan, AlgorithmSpec(), rank=0, go_on=go_on)
        assert asked == expected and len(policy.proximal) == NUM_MINIBATCHES
        return
    with pytest.raises(StepStopped) as stopped:
        train_step(policy, plan, AlgorithmSpec(), rank=0, go_on=go_on)
    assert asked == expected[:stop_at] and stopped.value.num_updates == expected[stop_at]
    assert len(policy.proximal) == expected[stop_at], "updates that were made"
