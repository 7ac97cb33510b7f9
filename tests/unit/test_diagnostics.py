"""What a training step says about itself, and the learning rate of each step."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from asyncrl_api.job import ScheduleSpec
from asyncrl_runtime.trainer.update.deepspeed_config import (
    deep_merge,
    derive_config,
    recomputes_activations,
)
from asyncrl_runtime.trainer.update.diagnostics import (
    LENGTH_QUANTILES,
    finite,
    histogram,
    mismatch_sums,
    report_batch,
    report_mismatch,
    report_tokens,
    staleness_histogram,
    token_sums,
)
from asyncrl_runtime.trainer.update.packing import TrainingSample
from asyncrl_runtime.trainer.update.step import learning_rate


def sums_of(
    ratios: list[float],
    weights: list[float],
    *,
    live: list[bool] | None = None,
    clipped: list[bool] | None = None,
) -> Tensor:
    size = len(ratios)
    weight = torch.tensor(weights)
    return token_sums(
        loss=torch.tensor(0.5),
        log_ratios=torch.tensor(ratios).log(),
        log_weights=weight.log(),
        weights=weight,
        clipped=torch.tensor(clipped or [False] * size),
        capped=torch.tensor([False] * size),
        entropies=torch.full((size,), 2.0),
        kl=torch.zeros(size),
        loss_mask=torch.tensor(live or [True] * size),
    )


def test_token_report_by_hand() -> None:
    report = report_tokens(
        sums_of([1, 1, 9], [1, 2, 7], live=[True, True, False], clipped=[False, True, True])
    )
    assert report["num_computed_tokens"] == 3 and report["num_computed_live_tokens"] == 2
    assert report["clip_fraction"] == 0.5, "a masked token is not counted"
    assert report["importance_weight_mean"] == 1.5
    assert report["effective_sample_size"] == pytest.approx(3**2 / (2 * 5))
    assert report["entropy"] == 2
    assert report["ratio_min"] == report["ratio_max"] == pytest.approx(1, abs=1e-6)
    assert report["importance_weight_max"] == pytest.approx(2, rel=0.06)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=200))
def test_quantiles_are_within_a_bin_of_the_true_ones(log_ratios: list[float]) -> None:
    report = report_tokens(sums_of([math.exp(x) for x in log_ratios], [1.0] * len(log_ratios)))
    for name, q in (("min", 0), ("p05", 0.05), ("p50", 0.5), ("p99", 0.99), ("max", 1)):
        near = [np.quantile(log_ratios, q, method=method) for method in ("lower", "higher")]
        slack = 0.07 * max(abs(x) for x in near) + 2e-6
        assert near[0] - slack <= math.log(report[f"ratio_{name}"]) <= near[1] + slack


@given(st.lists(st.floats(-25, 25), min_size=2, max_size=50), st.data())
def test_histograms_add_up(values: list[float], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(values)))
    tensor, mask = torch.tensor(values), torch.tensor([i % 3 != 0 for i in range(len(values))])
    parts = histogram(tensor[:cut], mask[:cut]) + histogram(tensor[cut:], mask[cut:])
    assert torch.equal(parts, histogram(tensor, mask))
    assert parts.sum() == mask.sum()


def test_what_cannot_be_had_is_absent_and_never_nan() -> None:
    nothing = report_tokens(sums_of([2.0], [3.0], live=[False]))
    assert "ratio_p50" not in nothing and "effective_sample_size" not in nothing
    spoiled = report_tokens(sums_of([1.0], [math.nan]))
    json.dumps([nothing, spoiled], allow_nan=False)
    assert finite({"a": 1.0, "b": math.nan, "c": math.inf}) == {"a": 1.0}
    assert report_mismatch(torch.zeros(4)) == {}


def test_mismatch_is_of_tokens_sampled_at_the_version_that_trains() -> None:
    logprobs, behavior = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -1.0, 9.0])
    report = report_mismatch(mismatch_sums(logprobs, behavior, torch.tensor([0, 0, 1])))
    gaps = [0.5, -1.0]  # trainer minus engine
    assert report["mismatch_tokens"] == 2
    assert report["mismatch_k1"] == pytest.approx(-sum(gaps) / 2)
    assert report["mismatch_k3"] == pytest.approx(sum(math.exp(g) - 1 - g for g in gaps) / 2)
    assert report["mismatch_absolute_gap"] == pytest.approx(0.75)


def test_mismatch_estimates_the_divergence() -> None:
    engine, trainer = (
        torch.log_softmax(torch.randn(8, generator=torch.Generator().manual_seed(s)), 0) for s in (1, 2)
    )
    tokens = torch.multinomial(
        engine.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(3)
    )
    report = report_mismatch(mismatch_sums(trainer[tokens], engine[tokens], torch.zeros(len(tokens))))
    true = float((engine.exp() * (engine - trainer)).sum())
    assert report["mismatch_k1"] == pytest.approx(true, rel=0.03)
    assert report["mismatch_k3"] == pytest.approx(true, rel=0.03)


def sample(ticket: int, staleness: list[int] | None, *, num_tokens: int = 3) -> TrainingSample:
    sampled = np.array([True] * (num_tokens - 1) + [False])
    return TrainingSample(
        ticket=ticket,
        index=0,
        prompt_ids=np.array([1, 2], np.int32),
        response_ids=np.arange(num_tokens, dtype=np.int32),
        behavior_logprobs=np.zeros(num_tokens, np.float32),
        sampled_mask=sampled,
        loss_mask=sampled,
        advantage=0.0,
        temperature=1.0,
        staleness=None if staleness is None else np.array(staleness, np.int32),
    )


def test_staleness_counts_sampled_tokens_by_version() -> None:
    samples = [sample(1, [0, 2, 7]), sample(1, [2, 2, 7]), sample(2, None)]
    assert staleness_histogram(samples) == {0: 1, 2: 3}
    report = report_batch(samples, np.array([1.0, 0.0, 0.0]))
    assert report["staleness_mean"] == 1.5 and report["staleness_max"] == 2
    assert report["reward_mean"] == pytest.approx(1 / 3)
    assert report["uniform_group_fraction"] == 0.5
    assert report["response_tokens_mean"] == 2 and report["masked_token_share"] == 0
    assert "staleness_mean" not in report_batch([sample(2, None)], np.array([0.0]))
    json.dumps(report, allow_nan=False)


def test_quantiles_of_response_lengths_are_over_samples_and_prompts_do_not_count() -> None:
    masks = [np.arange(12) < length for length in range(1, 12)]
    tokens, logprobs = np.zeros(12, np.int32), np.zeros(12, np.float32)
    samples = [
        replace(
            sample(1, None),
            response_ids=tokens,
            behavior_logprobs=logprobs,
            sampled_mask=sampled,
            loss_mask=sampled,
        )
        for sampled in masks
    ]
    report = report_batch(samples, np.zeros(len(samples)))
    found = {name: report[f"response_tokens_{name}"] for name in LENGTH_QUANTILES}
    assert found.pop("p99") == pytest.approx(10.9)
    assert found == {"min": 1, "p10": 2, "p50": 6, "p90": 10, "max": 11}


def test_tokens_that_are_too_old_count_as_masked() -> None:
    old = replace(sample(1, [0, 2, 7]), loss_mask=np.array([True, False, False]))
    report = report_batch([old, sample(1, [0, 0, 7])], np.array([1.0, 0.0]))
    assert report["masked_token_share"] == 0.25


def test_staleness_quantiles_are_versions_that_were_sampled_at() -> None:
    """Of 20 tokens: half are at most 1 version old, 19 of them at most 3; one straggler moves neither."""
    ages = [0] * 8 + [1] * 5 + [3] * 6 + [9]
    report = report_batch([sample(1, [*ages, 7], num_tokens=21)], np.array([0.0]))
    assert (report["staleness_p50"], report["staleness_p95"], report["staleness_max"]) == (1, 3, 9)
    assert "staleness_p95" not in report_batch([sample(2, None)], np.array([0.0]))


def rates(kind: str, warmup: int, max_steps: int) -> list[float]:
    schedule = ScheduleSpec.model_validate({"type": kind, "warmupSteps": warmup})
    return [learning_rate(schedule, step, max_steps, 8.0) for step in range(max_steps)]


def test_learning_rates_by_hand() -> None:
    assert rates("Constant", 0, 3) == [8, 8, 8]
    assert rates("Constant", 2, 4) == [4, 8, 8, 8]
    assert rates("Linear", 2, 6) == [4, 8, 8, 6, 4, 2]
    assert rates("Cosine", 0, 4) == pytest.approx([8, 4 + 4 / 2**0.5, 4, 4 - 4 / 2**0.5])


@given(st.sampled_from(["Constant", "Linear", "Cosine"]), st.integers(0, 30), st.integers(1, 30))
def test_no_step_has_a_rate_of_zero_or_above_the_base(kind: str, warmup: int, max_steps: int) -> None:
    assert all(0 < rate <= 8 for rate in rates(kind, warmup, max_steps))


def test_the_users_config_is_merged_over_ours() -> None:
    config = derive_config(
        zero_stage=2,
        dtype="BFloat16",
        gradient_clipping=1.0,
        num_parameters=1000,
        overrides={
            "optimizer": {"params": {"betas": [0.9, 0.999]}},
            "zero_optimization": {"overlap_comm": True},
        },
    )
    assert config["optimizer"]["params"]["betas"] == [0.9, 0.999]
    assert config["optimizer"]["params"]["torch_adam"] is True, "what was not named stays"
    assert config["zero_optimization"]["stage"] == 2 and config["zero_optimization"]["overlap_comm"] is True


def test_merging_changes_neither_side() -> None:
    base, over = {"a": {"b": 1}, "c": [1]}, {"a": {"d": 2}, "c": [2]}
    assert deep_merge(base, over) == {"a": {"b": 1, "d": 2}, "c": [2]}
    assert (base, over) == ({"a": {"b": 1}, "c": [1]}, {"a": {"d": 2}, "c": [2]})


def test_activations_are_kept_on_cpus_unless_the_manifest_says_otherwise() -> None:
    devices = ("cuda", "cpu")
    assert [recomputes_activations("Auto", device) for device in devices] == [True, False]
    assert [recomputes_activations("Always", device) for device in devices] == [True, True]
    assert [recomputes_activations("Never", device) for device in devices] == [False, False]
