"""Sampling: noise is a function of seed and position, tokens follow the distribution, log-probs are exact."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from asyncrl_runtime.engine.sampling import SamplingPlan, plan_sampling, sample, uniforms

VOCABULARY = 40


def make_plan(
    n: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, first_seed: int | None = 0
) -> SamplingPlan:
    seeds = np.arange(n, dtype=np.uint64) + np.uint64(first_seed or 0)
    return plan_sampling(
        np.full(n, temperature, np.float32),
        np.full(n, top_k, np.int64),
        np.full(n, top_p),
        np.full(n, first_seed is not None),
        seeds,
    )


def draw(logits: torch.Tensor, plan: SamplingPlan) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    positions = np.full(len(logits), 7, np.int64)
    return sample(logits, plan, positions, np.random.default_rng(0))


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3)) * 2


def test_noise_is_two_rounds_of_the_published_splitmix64() -> None:
    # The reference implementation's first output for the seed 1234567 is 6457827717110365317.
    noise = uniforms(np.array([1234567], dtype=np.uint64), np.array([5]))
    assert noise[0] == splitmix64(6457827717110365317 ^ 5) // 2**12 / 2**52


def splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_noise_is_uniform_over_seeds_and_over_positions() -> None:
    every, one = np.arange(20000), np.full(20000, 11)
    for noise in (uniforms(every.astype(np.uint64), one), uniforms(one.astype(np.uint64), every)):
        assert noise.min() >= 0 and noise.max() < 1
        counts = np.histogram(noise, bins=20, range=(0, 1))[0]
        assert abs(counts - 1000).max() < 5 * 1000**0.5


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_tokens_follow_the_distribution(logits: torch.Tensor, temperature: float) -> None:
    n = 20000
    tokens, _ = draw(logits.repeat(n, 1), make_plan(n, temperature=temperature))
    expected = torch.softmax(logits.double() / temperature, -1).numpy() * n
    counts = np.bincount(tokens, minlength=VOCABULARY)
    assert (abs(counts - expected) < 5 * (expected + 1) ** 0.5).all()


def test_a_seeded_row_does_not_depend_on_its_neighbors(logits: torch.Tensor) -> None:
    batch = torch.stack([logits.roll(i) for i in range(16)])
    together, together_logprobs = draw(batch, make_plan(16))
    for row in range(16):
        alone, alone_logprobs = draw(batch[row : row + 1], make_plan(1, first_seed=row))
        assert alone[0] == together[row]
        assert alone_logprobs[0] == pytest.approx(together_logprobs[row], abs=1e-6)


def test_rows_without_a_seed_use_the_generator(logits: torch.Tensor) -> None:
    batch, plan = logits.repeat(50, 1), make_plan(50, first_seed=None)
    positions = np.zeros(50, np.int64)
    first = sample(batch, plan, positions, np.random.default_rng(1))[0]
    assert (sample(batch, plan, positions, np.random.default_rng(1))[0] == first).all()
    assert (sample(batch, plan, positions, np.random.default_rng(2))[0] != first).any()


def test_greedy_takes_the_likeliest_and_its_raw_logprob(logits: torch.Tensor) -> None:
    tokens, logprobs = draw(logits[None], make_plan(1, temperature=0.0))
    assert tokens[0] == int(logits.argmax())
    assert logprobs[0] == pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-6)


def test_logprobs_are_at_temperature_before_top_k(logits: torch.Tensor) -> None:
    tokens, logprobs = draw(logits.repeat(100, 1), make_plan(100, temperature=0.7, top_k=3))
    expected = (logits / 0.7).log_softmax(-1)[torch.from_numpy(tokens)].numpy()
    assert abs(logprobs - expected).max() < 1e-6
    assert set(tokens) == set(logits.topk(3).indices.tolist())


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_top_p_keeps_the_smallest_set_that_reaches_it(logits: torch.Tensor, top_p: float) -> None:
    probs = logits.softmax(-1).double()
    ordered, order = probs.sort(descending=True)
    size = int((ordered.cumsum(0) < top_p).sum()) + 1
    tokens, _ = draw(logits.repeat(5000, 1), make_plan(5000, top_p=top_p))
    assert set(tokens) <= set(order[:size].tolist())
    shares = np.bincount(tokens, minlength=VOCABULARY)[order[:size].numpy()] / 5000
    assert abs(shares - (ordered[:size] / ordered[:size].sum()).numpy()).max() < 0.04


def test_greedy_sampled_and_truncated_rows_mix(logits: torch.Tensor) -> None:
    plan = plan_sampling(
        np.array([0.0, 1.0, 1.0, 0.5], np.float32),
        np.array([0, 0, 1, 0], np.int64),
        np.array([1.0, 1.0, 1.0, 1e-9]),
        np.array([False, True, True, False]),
        np.array([0, 5, 6, 0], np.uint64),
    )
    tokens, _ = draw(logits.repeat(4, 1), plan)
    best = int(logits.argmax())
    alone, _ = draw(logits[None], make_plan(1, first_seed=5))
    assert tokens.tolist() == [best, int(alone[0]), best, best]


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.full((2000, VOCABULARY), float("-inf"))
    logits[:, [7, 30]] = 0.0
    tokens, _ = draw(logits, make_plan(2000))
    assert set(tokens) == {7, 30}
