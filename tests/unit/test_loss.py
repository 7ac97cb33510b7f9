"""Policy losses against a naive loop, finite differences and hand-worked bounds."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from asyncrl_api.doubts import doubts_about
from asyncrl_api.job import AlgorithmSpec
from asyncrl_runtime.trainer.update.diagnostics import SCALARS
from asyncrl_runtime.trainer.update.loss import (
    POLICY_LOSSES,
    Loss,
    clipped_objective,
    compute_loss,
    has_gradient,
)
from asyncrl_runtime.trainer.update.packing import MicroBatch, TrainingSample, pack
from support.jobs.naive_rl import Token, naive_loss
from support.manifests.api_values import values_of

VARIANTS: list[dict[str, Any]] = [
    {"policyLoss": "DecoupledPPO"},
    {"policyLoss": "DecoupledPPO", "importanceWeight": {"max": 1.1, "onExceed": "Mask"}},
    {"policyLoss": "DecoupledPPO", "importanceWeight": {"max": 1.1, "onExceed": "Clamp"}},
    {"policyLoss": "DecoupledPPO", "clip": {"low": 0.1, "high": 0.4, "dual": 1.3}},
    {"policyLoss": "DecoupledPPO", "klCoefficient": 0.3, "entropyCoefficient": 0.2},
    {"policyLoss": "PPO"},
    {"policyLoss": "PPO", "clip": {"low": 0.4, "high": 0.1}},
    {"policyLoss": "PPO", "clip": {"low": 0.2, "high": 0.2, "dual": 1.3}, "klCoefficient": 0.1},
    {"policyLoss": "GSPO", "clip": {"low": 0.05, "high": 0.05}},
    {"policyLoss": "GSPO", "importanceWeight": {"max": 1.02, "onExceed": "Mask"}},
    {"policyLoss": "GSPO", "importanceWeight": {"max": 1.02, "onExceed": "Clamp"}},
    {"policyLoss": "CISPO", "entropyCoefficient": 0.1},
    {"policyLoss": "CISPO", "clip": {"low": 0.1, "high": 0.4}},
    {"policyLoss": "TIS", "importanceWeight": {"max": 1.1, "onExceed": "Mask"}},
]


def algorithm_of(variant: dict[str, Any]) -> AlgorithmSpec:
    return AlgorithmSpec.model_validate(variant)


def test_every_policy_loss_of_the_api_is_registered_and_compared_with_the_naive_one() -> None:
    assert set(POLICY_LOSSES) == values_of(AlgorithmSpec, "policy_loss")
    assert {variant["policyLoss"] for variant in VARIANTS} == set(POLICY_LOSSES)


def make_samples(lengths: list[int], seed: int = 0) -> list[TrainingSample]:
    """Return samples in which some tokens were not sampled, and some are masked as stale."""
    rng = np.random.default_rng(seed)
    samples = []
    for number, length in enumerate(lengths):
        sampled = rng.random(length) < 0.8
        sampled[0] = True
        samples.append(
            TrainingSample(
                ticket=number,
                index=0,
                prompt_ids=np.array([1], np.int32),
                response_ids=rng.integers(0, 9, length).astype(np.int32),
                behavior_logprobs=rng.normal(-1.5, 0.3, length).astype(np.float32),
                sampled_mask=sampled,
                loss_mask=sampled & (rng.random(length) < 0.8),
                advantage=float(rng.normal()),
                temperature=1.0,
            )
        )
    return samples


class Case:
    """A micro-batch and float64 log-probs around its behavior policy, the same for equal micro-batches."""

    def __init__(self, batch: MicroBatch) -> None:
        self.batch = batch
        generator = torch.Generator().manual_seed(1)
        behavior = batch.behavior_logprobs.double()

        def near(center: Tensor) -> Tensor:
            return center + 0.3 * torch.randn(len(center), generator=generator, dtype=torch.float64)

        self.proximal = near(behavior)
        self.logprobs = near(self.proximal).requires_grad_()
        self.reference = near(behavior)
        self.entropies = torch.rand(len(behavior), generator=generator, dtype=torch.float64).requires_grad_()

    def loss(
        self, algorithm: AlgorithmSpec, rows: slice = slice(None), batch: MicroBatch | None = None
    ) -> Loss:
        return compute_loss(
            algorithm,
            batch or self.batch,
            self.logprobs[rows],
            self.entropies[rows],
            proximal_logprobs=self.proximal[rows],
            reference_logprobs=self.reference[rows] if algorithm.kl_coefficient else None,
            num_tokens=self.batch.num_sampled_tokens,
        )

    def tokens(self) -> list[Token]:
        columns = (
            self.logprobs,
            self.entropies,
            self.proximal,
            self.batch.behavior_logprobs,
            self.reference,
            self.batch.advantages,
            self.batch.loss_mask,
            self.batch.sequences,
        )
        return [Token(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]


@pytest.fixture
def case() -> Case:
    return Case(pack(make_samples([5, 3, 7, 1, 6])))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_loss_and_gradient_agree_with_a_loop_over_tokens(case: Case, variant: dict[str, Any]) -> None:
    algorithm = algorithm_of(variant)
    loss = case.loss(algorithm).value
    gradient = torch.autograd.grad(loss, case.logprobs)[0]
    tokens, at = case.tokens(), case.logprobs.tolist()

    def naive(moved: list[float]) -> float:
        return naive_loss(algorithm, tokens, moved, with_reference=algorithm.kl_coefficient > 0)

    assert loss.item() == pytest.approx(naive(at), rel=1e-7)  # advantages are float32
    step = 1e-6
    for index in range(len(at)):
        up, down = list(at), list(at)
        up[index] += step
        down[index] -= step
        slope = (naive(up) - naive(down)) / (2 * step)
        assert gradient[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_the_variants_meet_their_bounds_in_the_case_above(case: Case) -> None:
    """Otherwise the comparison with the naive loss would say nothing about clip, cap and mask."""
    assert not case.batch.loss_mask.all()
    for variant in VARIANTS:
        algorithm = algorithm_of(variant)
        sums = dict(zip(SCALARS, case.loss(algorithm).sums.tolist(), strict=False))
        bounded = sums["capped"] if algorithm.policy_loss == "TIS" else sums["clipped"]
        assert 0 < bounded < sums["live"], variant
        if algorithm.importance_weight.max < 2:
            assert 0 < sums["capped"] < sums["live"], variant


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_splitting_into_micro_batches_changes_neither_loss_nor_gradient(variant: dict[str, Any]) -> None:
    algorithm, samples = algorithm_of(variant), make_samples([7, 6, 5, 3, 1])
    case = Case(pack(samples))
    whole = case.loss(algorithm)
    gradient = torch.autograd.grad(whole.value, case.logprobs)[0]
    # Longest first is how they are packed, so parts are runs of rows.
    total, sums, row = torch.zeros((), dtype=torch.float64), torch.zeros_like(whole.sums), 0
    for part in (samples[:2], [], samples[2:3], samples[3:]):
        batch = pack(part)
        loss = case.loss(algorithm, slice(row, row + batch.num_sampled_tokens), batch)
        total, sums, row = total + loss.value, sums + loss.sums, row + batch.num_sampled_tokens
    torch.testing.assert_close(total, whole.value, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(sums, whole.sums, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(total, case.logprobs)[0], gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["DecoupledPPO", "GSPO"])
def test_without_proximal_logprobs_the_policy_is_its_own(case: Case, name: str) -> None:
    algorithm = algorithm_of({"policyLoss": name})
    case.proximal = case.logprobs.detach()
    explicit = case.loss(algorithm)
    implicit = compute_loss(
        algorithm,
        case.batch,
        case.logprobs,
        case.entropies,
        proximal_logprobs=None,
        reference_logprobs=None,
        num_tokens=case.batch.num_sampled_tokens,
    )
    gradients = [torch.autograd.grad(loss.value, case.logprobs)[0] for loss in (explicit, implicit)]
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(explicit.sums, implicit.sums)
    assert implicit.sums[SCALARS.index("clipped")] == 0, "with a single minibatch the clip never binds"


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_loss_needs_the_proximal_policy_if_it_depends_on_it(case: Case, name: str) -> None:
    """If registered as not needing it, it would lose its trust region from the second minibatch on."""
    algorithm = algorithm_of({"policyLoss": name})
    before = case.loss(algorithm)
    gradient = torch.autograd.grad(before.value, case.logprobs)[0]
    case.proximal = case.proximal + 0.3
    after = case.loss(algorithm)
    depends = not torch.equal(gradient, torch.autograd.grad(after.value, case.logprobs)[0])
    depends |= not torch.equal(before.sums, after.sums)
    assert depends == POLICY_LOSSES[name].needs_proximal


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_only_the_policy_being_updated_has_a_gradient(case: Case, variant: dict[str, Any]) -> None:
    case.proximal.requires_grad_()
    loss = case.loss(algorithm_of(variant)).value
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(loss, case.proximal, allow_unused=True)
    assert gradients == (None,)


def one_token(
    algorithm: AlgorithmSpec, *, ratio: float, weight: float, advantage: float
) -> tuple[float, float]:
    """Return loss and its derivative by the log-prob for one token, behavior probability 1/8."""
    sample = make_samples([1])[0]
    batch = pack([sample])
    for name, value in (
        ("behavior_logprobs", math.log(1 / 8)),
        ("advantages", advantage),
        ("loss_mask", True),
    ):
        getattr(batch, name).fill_(value)
    proximal = torch.tensor([math.log(weight / 8)], dtype=torch.float64)
    logprobs = (proximal + math.log(ratio)).requires_grad_()
    loss = compute_loss(
        algorithm,
        batch,
        logprobs,
        torch.zeros(1),
        proximal_logprobs=proximal,
        reference_logprobs=None,
        num_tokens=4,
    ).value
    return loss.item(), torch.autograd.grad(loss, logprobs)[0].item()


@pytest.mark.parametrize(
    ("variant", "ratio", "weight", "advantage", "loss", "gradient"),
    [
        # -w u A / 4 = -2 * 1.1 * 3 / 4
        ({}, 1.1, 2.0, 3.0, -1.65, -1.65),
        # Clipped at 1.2 from above: no gradient.
        ({}, 1.5, 2.0, 3.0, -1.8, 0.0),
        # A negative advantage is clipped from below only ...
        ({}, 0.5, 2.0, -3.0, 1.2, 0.0),
        # ... and unbounded above ...
        ({}, 4.0, 2.0, -3.0, 6.0, 6.0),
        # ... but for the dual clip, at 3.
        ({"clip": {"dual": 3.0}}, 4.0, 2.0, -3.0, 4.5, 0.0),
        # A weight of 6 leaves the loss, or counts as 5.
        ({}, 1.0, 6.0, 3.0, 0.0, 0.0),
        ({"importanceWeight": {"onExceed": "Clamp"}}, 1.0, 6.0, 3.0, -3.75, -3.75),
        # PPO's ratio is to the behavior policy: 1.1 * 2 is beyond the clip, 1.1 * 0.9 is not.
        ({"policyLoss": "PPO"}, 1.1, 2.0, 4.0, -1.2, 0.0),
        ({"policyLoss": "PPO"}, 1.1, 0.9, 4.0, -0.99, -0.99),
        # CISPO: a weight of 2.2 counts as 1.2, and the gradient stays. log(2.2 / 8) = -1.290984.
        ({"policyLoss": "CISPO"}, 1.1, 2.0, 4.0, 1.2 * 1.290984, -1.2),
        # Each side has its own bound: 2.2 counts as 1.5, 0.55 as 0.9. log(0.55 / 8) = -2.677279.
        (
            {"policyLoss": "CISPO", "clip": {"low": 0.1, "high": 0.5}},
            *(1.1, 2.0, 4.0, 1.5 * 1.290984, -1.5),
        ),
        (
            {"policyLoss": "CISPO", "clip": {"low": 0.1, "high": 0.5}},
            *(1.1, 0.5, 4.0, 0.9 * 2.677279, -0.9),
        ),
        # TIS: the weight is truncated at 2. log(4.4 / 8) = -0.597837.
        ({"policyLoss": "TIS", "importanceWeight": {"max": 2.0}}, 1.1, 4.0, 4.0, 2 * 0.597837, -2.0),
        # One token is a sequence.
        ({"policyLoss": "GSPO", "clip": {"high": 0.2}}, 1.1, 2.0, 3.0, -1.65, -1.65),
        # By default GSPO clips at 1.0004: -2 * 1.0004 * 3 / 4, and no gradient.
        ({"policyLoss": "GSPO"}, 1.1, 2.0, 3.0, -1.5006, 0.0),
        # By default CISPO lets small weights be: 0.55 counts as 0.55.
        ({"policyLoss": "CISPO"}, 1.1, 0.5, 4.0, 0.55 * 2.677279, -0.55),
    ],
)
def test_one_token_by_hand(
    variant: dict[str, Any], ratio: float, weight: float, advantage: float, loss: float, gradient: float
) -> None:
    result = one_token(algorithm_of(variant), ratio=ratio, weight=weight, advantage=advantage)
    assert result == pytest.approx((loss, gradient), rel=1e-5, abs=1e-12)


def test_masked_tokens_stay_in_the_denominator(case: Case) -> None:
    algorithm = algorithm_of({"policyLoss": "PPO"})
    before = case.loss(algorithm).value
    keep = case.batch.loss_mask.clone()
    case.batch.loss_mask[keep.nonzero()[0]] = False
    lost = one_row_loss(case, algorithm, int(keep.nonzero()[0]))
    torch.testing.assert_close(case.loss(algorithm).value, before - lost)


def one_row_loss(case: Case, algorithm: AlgorithmSpec, row: int) -> Tensor:
    ratio = (case.logprobs[row] - case.batch.behavior_logprobs[row]).exp()
    advantage = case.batch.advantages[row]
    low, high = algorithm.clip_bounds
    clipped = ratio.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio * advantage, clipped * advantage) / case.batch.num_sampled_tokens


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_ratios_beyond_floats_leave_the_gradient_finite(variant: dict[str, Any]) -> None:
    batch = pack(make_samples([4, 4]))
    logprobs = torch.tensor([0.0, -200.0] * 4)[: batch.num_sampled_tokens].requires_grad_()
    proximal = torch.tensor([-200.0, 0.0] * 4)[: batch.num_sampled_tokens]
    loss = compute_loss(
        algorithm_of(variant),
        batch,
        logprobs,
        torch.zeros(len(logprobs)),
        proximal_logprobs=proximal,
        reference_logprobs=proximal,
        num_tokens=8,
    ).value
    assert loss.isfinite() and torch.autograd.grad(loss, logprobs)[0].isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("what", ["no advantage", "no token in the loss"])
def test_what_is_not_computed_has_a_gradient_of_exactly_zero(variant: dict[str, Any], what: str) -> None:
    algorithm = algorithm_of(variant)
    changes: dict[str, Any] = {"advantage": 0.0}
    if what == "no token in the loss":
        changes = {"loss_mask": np.zeros(40, np.bool_)}
    samples = [replace(sample, **changes) for sample in make_samples([40] * 6)]
    case = Case(pack(samples))
    loss = case.loss(algorithm).value
    gradients = torch.autograd.grad(loss, [case.logprobs, case.entropies], allow_unused=True)
    is_zero = all(gradient is None or not gradient.any() for gradient in gradients)
    has_regularizer = bool(algorithm.kl_coefficient or algorithm.entropy_coefficient)
    assert is_zero == (what == "no token in the loss" or not has_regularizer)
    assert [has_gradient(sample, algorithm) for sample in samples] == [not is_zero] * 6
    assert not is_zero or loss.item() == 0


def test_an_empty_micro_batch_has_a_loss_of_zero_with_a_gradient() -> None:
    logprobs = torch.zeros(0, requires_grad=True)
    for variant in VARIANTS:
        loss = compute_loss(
            algorithm_of(variant),
            pack([]),
            logprobs,
            torch.zeros(0),
            proximal_logprobs=None,
            reference_logprobs=torch.zeros(0),
            num_tokens=8,
        )
        assert loss.value.item() == 0 and loss.value.requires_grad
        assert loss.sums.sum() == 0


@pytest.mark.parametrize(
    ("spec", "low", "high"),
    [
        ({}, 0.2, 0.2),
        ({"policyLoss": "PPO"}, 0.2, 0.2),
        ({"policyLoss": "GSPO"}, 3e-4, 4e-4),
        ({"policyLoss": "CISPO"}, 1.0, 0.2),
        ({"policyLoss": "GSPO", "clip": {"low": 0.2}}, 0.2, 4e-4),
        ({"policyLoss": "CISPO", "clip": {"low": 0.2, "high": 4.0}}, 0.2, 4.0),
    ],
)
def test_the_clip_is_that_of_the_policy_loss_unless_it_is_written(
    spec: dict[str, Any], low: float, high: float
) -> None:
    algorithm = AlgorithmSpec.model_validate(spec)
    assert algorithm.clip_bounds == (low, high)
    written = algorithm.resolved.clip
    assert (written.low, written.high) == (low, high), "in the ledger, where no later default may change it"


def test_by_default_gspo_clips_sequences_that_moved_by_a_thousandth() -> None:
    moved, advantages = torch.tensor([1.001, 0.999]), torch.tensor([1.0, -1.0])
    for policy_loss, is_clipped in (("GSPO", True), ("DecoupledPPO", False)):
        algorithm = AlgorithmSpec.model_validate({"policyLoss": policy_loss})
        assert clipped_objective(moved, advantages, algorithm)[1].tolist() == [is_clipped] * 2


@pytest.mark.parametrize("policy_loss", ["GSPO", "CISPO"])
def test_a_clip_that_an_earlier_version_has_stored_is_doubted(policy_loss: str) -> None:
    """An API server stores defaults as values, so objects from before have 0.2, and nobody wrote it."""
    stored = {"policyLoss": policy_loss, "clip": {"low": 0.2, "high": 0.2}}
    assert "clip" in doubts_about(AlgorithmSpec.model_validate(stored))
    for fine in ({"policyLoss": policy_loss}, {"clip": {"low": 0.2, "high": 0.2}}):
        assert doubts_about(AlgorithmSpec.model_validate(fine)) == ""
