"""Each rank gets its own part of a step, as arrays, and nothing of the others'."""

import dataclasses
import pickle
from collections import deque
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist

from asyncrl_api.job import AlgorithmSpec
from asyncrl_runtime.trainer.update.packing import TrainingSample
from asyncrl_runtime.trainer.update.policy_api import StepSettings
from asyncrl_runtime.trainer.update.shares import StepShare, outline, receive_share, send_share
from asyncrl_runtime.trainer.update.step import StepPlan

GROUP = cast(Any, None)
SETTINGS = StepSettings(AlgorithmSpec(), 0.1, 1.0, (0.9, 0.95), 1e-8)


def make_sample(ticket: int, index: int, rng: np.random.Generator) -> TrainingSample:
    num_tokens = int(rng.integers(1, 30))
    sampled = rng.random(num_tokens) < 0.8
    return TrainingSample(
        ticket=ticket,
        index=index,
        prompt_ids=rng.integers(0, 99, int(rng.integers(1, 9)), dtype=np.int32),
        response_ids=rng.integers(0, 99, num_tokens, dtype=np.int32),
        behavior_logprobs=-rng.random(num_tokens, dtype=np.float32),
        sampled_mask=sampled,
        loss_mask=sampled & (rng.random(num_tokens) < 0.8),
        advantage=float(rng.normal()),
        temperature=float(rng.uniform(0.5, 1.5)),
        staleness=None if ticket % 3 == 0 else rng.integers(0, 4, num_tokens, dtype=np.int32),
    )


def make_plan(num_groups: int, num_minibatches: int = 2) -> StepPlan:
    rng = np.random.default_rng(7)
    samples = tuple(make_sample(ticket, index, rng) for ticket in range(num_groups) for index in range(3))
    rewards = (0.0,) * len(samples)
    return StepPlan(samples, rewards, num_minibatches, 40, 1e-3, SETTINGS, frozenset({1}))


class Wire:
    """What was sent, to be received in the same order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: deque[torch.Tensor] = deque()
        monkeypatch.setattr(dist, "send", self._send)
        monkeypatch.setattr(dist, "recv", self._receive)

    def _send(self, tensor: torch.Tensor, dst: int, group: Any) -> None:
        self.sent.append(tensor.clone())

    def _receive(self, tensor: torch.Tensor, src: int, group: Any) -> None:
        assert tensor.shape == self.sent[0].shape and tensor.dtype == self.sent[0].dtype
        tensor.copy_(self.sent.popleft())


def plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.tolist()
    if isinstance(value, tuple):
        return [plain(each) for each in value]
    if isinstance(value, StepShare | TrainingSample):
        return {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    return value


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("num_groups", [2, 9])
def test_a_rank_receives_its_share_bit_by_bit(
    monkeypatch: pytest.MonkeyPatch, num_ranks: int, num_groups: int
) -> None:
    wire = Wire(monkeypatch)
    shares = make_plan(num_groups).shares(num_ranks)
    told = outline(shares)
    for rank in range(1, num_ranks):
        send_share(shares[rank], rank, GROUP)
        received = receive_share(told, rank, GROUP)
        assert plain(received) == plain(shares[rank]) and not wire.sent


def test_a_share_without_samples_is_empty_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    Wire(monkeypatch)
    plan = make_plan(1, num_minibatches=1)
    plan = dataclasses.replace(plan, samples=plan.samples[:1], rewards=(0.0,))
    shares = plan.shares(3)
    send_share(shares[2], 2, GROUP)
    received = receive_share(outline(shares), 2, GROUP)
    assert plain(received) == plain(shares[2])
    assert [part.micro_batches for part in received.minibatches] == [((),)]


def test_shares_are_the_step_and_no_sample_goes_to_two_ranks() -> None:
    plan = make_plan(9)
    shares = plan.shares(3)
    got = [
        (sample.ticket, sample.index)
        for share in shares
        for minibatch in share.minibatches
        for samples in minibatch.micro_batches
        for sample in samples
    ]
    assert sorted(got) == [(sample.ticket, sample.index) for sample in plan.samples]
    for parts in zip(*(share.minibatches for share in shares), strict=True):
        assert len({len(part.micro_batches) for part in parts}) == 1, "collectives must stay collective"
        assert len({part.num_tokens for part in parts}) == 1
    total = sum(sample.num_sampled_tokens for sample in plan.samples)
    assert sum(part.num_tokens for part in shares[0].minibatches) == total


def test_what_all_ranks_are_told_does_not_grow_with_the_batch() -> None:
    """Otherwise every rank would unpickle the batch of all."""
    small, large = (len(pickle.dumps(outline(make_plan(n).shares(2)))) for n in (20, 200))
    assert large - small < 4096
