"""A training step on a policy that only remembers what it was asked."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from asyncrl_api.job import AlgorithmSpec, StalenessSpec
from asyncrl_runtime.contract.messages import Group
from asyncrl_runtime.trainer.books.staleness import LiveGroup, assess
from asyncrl_runtime.trainer.update.diagnostics import NUM_BINS, SCALARS
from asyncrl_runtime.trainer.update.failures import StepFailed, StepStopped
from asyncrl_runtime.trainer.update.loss import POLICY_LOSSES
from asyncrl_runtime.trainer.update.packing import MicroBatch, TrainingSample
from asyncrl_runtime.trainer.update.policy_api import StepPolicy, StepSettings, Update
from asyncrl_runtime.trainer.update.step import StepOutcome, StepPlan, plan_step, train_step
from support.messages.samples import make_sample

NUM_MINIBATCHES = 3


class RecordingPolicy:
    """One rank, whose log-probs are the number of updates made before they were asked for."""

    world_size = 1

    def __init__(self, gradient_norms: Sequence[float] = (1.0,) * NUM_MINIBATCHES) -> None:
        self.gradient_norms = list(gradient_norms)
        """The norms that the updates have, in their order."""
        self.proximal: list[list[Tensor] | None] = []
        """The proximal log-probs that each update was given."""
        self.num_tokens: list[int] = []

    def use(self, settings: StepSettings) -> None:
        self.settings = settings

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
        norm = self.gradient_norms.pop(0)
        sums[0] = norm  # the loss
        return Update(sums, norm, logprobs)

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


def step(
    policy: StepPolicy, policy_loss: str, skipped: Sequence[int] = (), capacity: int = 16
) -> StepOutcome:
    algorithm = AlgorithmSpec.model_validate({"policyLoss": policy_loss})
    settings = StepSettings(algorithm, 0.1, 1.0, (0.9, 0.95), 1e-8)
    samples = tuple(sample(ticket, 2 + ticket) for ticket in range(6))
    plan = StepPlan(samples, (0.0,) * 6, NUM_MINIBATCHES, capacity, 0.5, settings, frozenset(skipped))
    seconds = iter((10.0, 10.5, 11.75, 12.5))
    return train_step(policy, plan.shares(1)[0], clock=lambda: next(seconds))


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
    report = step(policy, "PPO").report
    assert sum(policy.num_tokens) == sum(2 + ticket for ticket in range(6))
    assert (report["train_seconds"], report["learning_rate"]) == (2.5, 0.5)
    assert (report["proximal_seconds"], report["num_ranks"]) == (1.25, 1)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_an_update_whose_gradient_is_not_finite_is_counted_and_the_others_are_reported(norm: float) -> None:
    policy = RecordingPolicy([2.0, norm, 4.0])
    outcome = step(policy, "DecoupledPPO")
    assert outcome.skipped == (1,) and len(policy.proximal) == NUM_MINIBATCHES
    report = outcome.report
    assert (report["skipped_updates"], report["gradient_norm"], report["loss"]) == (1, 3.0, 3.0)


def test_a_step_none_of_whose_gradients_is_finite_has_a_report_all_the_same() -> None:
    outcome = step(RecordingPolicy([math.nan] * 3), "DecoupledPPO")
    assert outcome.skipped == (0, 1, 2)
    assert outcome.report["skipped_updates"] == 3 and "gradient_norm" not in outcome.report
    assert all(map(math.isfinite, outcome.report.values()))


@pytest.mark.parametrize("known", [(0,), (1, 2)])
def test_an_update_that_was_skipped_before_is_not_made_when_the_step_is_repeated(
    known: tuple[int, ...],
) -> None:
    policy = RecordingPolicy()
    outcome = step(policy, "DecoupledPPO", known)
    assert outcome.skipped == known and len(policy.proximal) == NUM_MINIBATCHES - len(known)


def test_what_is_raised_after_the_last_micro_batch_names_no_ticket() -> None:
    class CannotReduce(RecordingPolicy):
        def reduce(self, sums: Tensor) -> Tensor:
            raise ValueError("no sums")

    for skipped in ((), (0,)):
        with pytest.raises(StepFailed, match="ValueError: no sums") as failed:
            step(CannotReduce(), "DecoupledPPO", skipped)
        assert failed.value.tickets == ()


def test_what_has_no_gradient_is_not_computed_and_counts_in_the_denominator() -> None:
    algorithm = AlgorithmSpec.model_validate({"policyLoss": "PPO"})
    settings = StepSettings(algorithm, 0.1, 1.0, (0.9, 0.95), 1e-8)
    samples = tuple(replace(sample(n, 4), advantage=float(n % 2)) for n in range(8))
    plan = StepPlan(samples, (0.0,) * 8, 2, 16, 0.5, settings)
    for num_ranks in (1, 2, 3):
        shares = plan.shares(num_ranks)
        tickets = [
            [s.ticket for share in shares for group in share.minibatches[number].micro_batches for s in group]
            for number in range(2)
        ]
        assert [sorted(each) for each in tickets] == [[1, 3], [5, 7]]
        assert {part.num_tokens for share in shares for part in share.minibatches} == {16}
        assert len({len(part.micro_batches) for share in shares for part in share.minibatches}) == 1
    report = plan.report()
    assert (report["num_samples"], report["num_computed_samples"], report["num_tokens"]) == (8, 4, 32)
    regularized = replace(
        plan, settings=replace(settings, algorithm=algorithm.model_copy(update={"kl_coefficient": 0.1}))
    )
    assert regularized.report()["num_computed_samples"] == 8


def test_an_update_of_uniform_groups_alone_is_made_all_the_same() -> None:
    settings = StepSettings(AlgorithmSpec(), 0.1, 1.0, (0.9, 0.95), 1e-8)
    samples = tuple(replace(sample(n, 4), advantage=0.0) for n in range(6))
    plan = StepPlan(samples, (0.0,) * 6, NUM_MINIBATCHES, 16, 0.5, settings)
    policy = RecordingPolicy()
    outcome = train_step(policy, plan.shares(1)[0])
    assert policy.num_tokens == [8, 8, 8] and outcome.skipped == ()
    assert outcome.report["num_micro_batches"] == NUM_MINIBATCHES, "each with an empty one"


class FailingPolicy(RecordingPolicy):
    """Works on its micro-batches one by one, as the real one does, until the one of ticket 5."""

    def __init__(self, error: Exception, where: str) -> None:
        super().__init__()
        self._error, self._where = error, where

    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        return [self._forward(batch, "logprobs") for batch in micro_batches]

    def update(self, micro_batches: Sequence[MicroBatch], **arguments: Any) -> Update:
        for batch in micro_batches:
            self._forward(batch, "update")
        if self._where == "optimizer":
            raise self._error
        return super().update(micro_batches, **arguments)

    def _forward(self, batch: MicroBatch, place: str) -> Tensor:
        if place == self._where and batch.num_sampled_tokens == 7:  # ticket 5, alone in its micro-batch
            raise self._error
        return torch.zeros(batch.num_sampled_tokens)


POISON = IndexError("index out of range in self")


@pytest.mark.parametrize(
    ("error", "where", "tickets", "is_out_of_memory"),
    [
        (POISON, "update", (5,), False),
        (POISON, "logprobs", (5,), False),
        (POISON, "optimizer", (), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "update", (5,), True),
        (MemoryError(), "update", (5,), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "update", (5,), True),
        (RuntimeError("CUDA error: device-side assert triggered"), "update", (), False),
    ],
)
def test_what_a_step_raises_by_its_own_fault_names_the_tickets_of_the_micro_batch(
    error: Exception, where: str, tickets: tuple[int, ...], is_out_of_memory: bool
) -> None:
    with pytest.raises(StepFailed) as failed:
        step(FailingPolicy(error, where), "DecoupledPPO", capacity=8)
    assert (failed.value.tickets, failed.value.is_out_of_memory) == (tickets, is_out_of_memory)
    assert failed.value.cause.startswith(f"{type(error).__name__}: ") and failed.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        OSError("No space left on device"),
        ConnectionResetError(),
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
        torch.distributed.DistBackendError("NCCL error"),
        KeyboardInterrupt(),
        asyncio.CancelledError(),
    ],
)
def test_what_is_not_the_steps_fault_is_passed_on_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        step(FailingPolicy(error, "update"), "DecoupledPPO", capacity=8)
    assert raised.value is error


@pytest.mark.parametrize("stop_at", range(7))
def test_it_is_asked_before_each_micro_batch_whether_the_step_goes_on(stop_at: int) -> None:
    """First before those of the proximal pass, which are two: the first minibatch needs none."""
    settings = StepSettings(AlgorithmSpec(), 0.1, 1.0, (0.9, 0.95), 1e-8)
    samples = tuple(sample(ticket, 2 + ticket) for ticket in range(6))
    plan = StepPlan(samples, (0.0,) * 6, NUM_MINIBATCHES, 16, 0.5, settings)
    policy, asked = RecordingPolicy(), list[int]()

    def go_on(num_updates: int) -> None:
        if len(asked) == stop_at:
            raise StepStopped(num_updates)
        asked.append(num_updates)

    expected = [0, 0, 0, 1, 2]
    if stop_at >= len(expected):
        train_step(policy, plan.shares(1)[0], go_on=go_on)
        assert asked == expected and len(policy.proximal) == NUM_MINIBATCHES
        return
    with pytest.raises(StepStopped) as stopped:
        train_step(policy, plan.shares(1)[0], go_on=go_on)
    assert asked == expected[:stop_at] and stopped.value.num_updates == expected[stop_at]


def test_the_overlong_penalty_of_a_sample_is_that_of_its_longest_turn_under_its_own_bound() -> None:
    """Twelve tokens in two turns of six are far from a bound of ten; a turn of six is at a bound of six."""
    turns = make_sample(0, spans=[(1, 0, 13)], mask=[True] * 6 + [False] + [True] * 6)
    near = msgspec.structs.replace(make_sample(1, spans=[(1, 0, 6)]), max_new_tokens=6)
    groups = [
        assess(Group(ticket=1, group_size=2, samples=(turns, near)), 0, StalenessSpec(), {1: 0}, "None")
    ]
    algorithm = AlgorithmSpec.model_validate(
        {"advantage": "GroupCentered", "overlongPenalty": {"bufferTokens": 2, "penalty": 1.0}}
    )
    plan = plan_step(
        [group for group in groups if isinstance(group, LiveGroup)],
        settings=StepSettings(algorithm, 0.0, 0.0, (0.9, 0.95), 1e-8),
        max_new_tokens=10,
        num_minibatches=1,
        tokens_per_micro_batch=64,
        learning_rate=0.0,
    )
    assert [sample.advantage for sample in plan.samples] == [0.5, -0.5]
