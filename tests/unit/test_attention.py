"""Attention over packed sequences equals that over each alone."""

from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from asyncrl_runtime.model.attention import IMPLEMENTATION, MAX_PADDED_AREA, plan_attention
from asyncrl_runtime.trainer.update.token_logprobs import token_logprobs

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
LENGTHS = {
    "mixed": [17, 11, 10, 10, 9, 3, 1],
    "equal": [6, 6, 6],
    "one": [5],
    "unsorted": [2, 13, 1, 12],
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def build(name: str, **changes: Any) -> Any:
    config, model = MODELS[name]
    torch.manual_seed(0)
    built = model(config(**SIZES | changes))
    with torch.no_grad():  # norms and biases that matter
        for parameter in built.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return built


def packed_logits(model: Any, ids: Tensor, lengths: list[int]) -> Tensor:
    model.set_attn_implementation(IMPLEMENTATION)
    positions = torch.cat([torch.arange(n) for n in lengths])
    output = model(
        input_ids=ids[None],
        position_ids=positions[None],
        attention_plan=plan_attention(lengths),
        use_cache=False,
    )
    logits: Tensor = output.logits[0]
    return logits


def padded_logits(model: Any, ids: Tensor, lengths: list[int]) -> Tensor:
    """Return the logits of the real tokens, with one sequence per row, by transformers' own attention."""
    model.set_attn_implementation("eager")
    rows = torch.nn.utils.rnn.pad_sequence(list(torch.split(ids, lengths)), batch_first=True)
    mask = torch.arange(rows.shape[1])[None, :] < torch.tensor(lengths)[:, None]
    logits: Tensor = model(input_ids=rows, attention_mask=mask.long(), use_cache=False).logits
    return logits[mask]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("name", MODELS)
def test_packed_logits_and_gradients_are_those_of_the_padded_model(name: str, lengths: list[int]) -> None:
    model = build(name)
    ids = torch.randint(0, 48, (sum(lengths),))
    pull = torch.randn(sum(lengths), 48)
    results = []
    for logits in (packed_logits(model, ids, lengths), padded_logits(model, ids, lengths)):
        model.zero_grad()
        torch.autograd.backward((logits * pull).sum())
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for packed, padded in zip(*results, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5 * float(padded.abs().max()))


def test_bfloat16_is_as_close_as_bfloat16_is() -> None:
    lengths = LENGTHS["mixed"]
    model = build("qwen3").to(torch.bfloat16)
    ids = torch.randint(0, 48, (sum(lengths),))
    packed, padded = packed_logits(model, ids, lengths), padded_logits(model, ids, lengths)
    assert packed.dtype == torch.bfloat16
    exact = padded_logits(model.float(), ids, lengths)
    assert (packed - exact).abs().mean() < 1.5 * (padded - exact).abs().mean()
    torch.autograd.backward(packed.float().sum())


def test_multi_head_attention_without_groups() -> None:
    lengths = LENGTHS["mixed"]
    model = build("llama", num_key_value_heads=4)
    ids = torch.randint(0, 48, (sum(lengths),))
    torch.testing.assert_close(
        packed_logits(model, ids, lengths), padded_logits(model, ids, lengths), rtol=1e-4, atol=1e-4
    )


@given(st.lists(st.integers(1, 300), min_size=1, max_size=50), st.booleans())
def test_a_plan_covers_every_token_within_its_area(lengths: list[int], in_order: bool) -> None:
    lengths = sorted(lengths, reverse=True) if in_order else lengths
    plan = plan_attention(lengths)
    assert sum(b.num_segments for b in plan.buckets) == len(lengths)
    first = 0
    for bucket in plan.buckets:
        own = lengths[first : first + bucket.num_segments]
        first += bucket.num_segments
        assert bucket.num_tokens == sum(own) and bucket.length == max(own)
        assert len(own) * bucket.length**2 <= MAX_PADDED_AREA * sum(n * n for n in own)
        if bucket.pad is None or bucket.unpad is None:
            assert min(own) == max(own)
        else:
            assert bucket.pad[bucket.unpad].tolist() == list(range(bucket.num_tokens))


def test_hundreds_of_segments_need_few_calls() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(7, 14, (400,), generator=generator).sort(descending=True).values.tolist()
    assert len(plan_attention(lengths).buckets) <= 4


def test_a_window_that_would_cut_is_refused() -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**cast(Any, SIZES), sliding_window=8))
    ids = torch.randint(0, 48, (12,))
    packed_logits(model, ids, [8, 4])
    with pytest.raises(ValueError, match="sequence of 9 tokens under a sliding window of 8"):
        packed_logits(model, ids, [9, 3])


@pytest.mark.parametrize("block", [1 << 24, 40])
def test_token_logprobs_are_those_of_log_softmax(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncrl_runtime.trainer.update.token_logprobs.BLOCK_ELEMENTS", block)
    torch.manual_seed(0)
    logits = (3 * torch.randn(7, 13, dtype=torch.float64)).requires_grad_()
    targets, temperatures = torch.randint(0, 13, (7,)), 0.5 + torch.rand(7, dtype=torch.float64)
    logprobs, entropies = token_logprobs(logits, targets, temperatures)
    expected = torch.log_softmax(logits / temperatures[:, None], -1)
    picked, spread = expected.gather(1, targets[:, None])[:, 0], -(expected.exp() * expected).sum(-1)
    torch.testing.assert_close(logprobs, picked)
    torch.testing.assert_close(entropies, spread)
    for wanted in ([0], [1], [0, 1]):

        def chosen(values: Tensor, wanted: list[int] = wanted) -> tuple[Tensor, ...]:
            both = token_logprobs(values, targets, temperatures)
            return tuple(both[i] for i in wanted)

        assert torch.autograd.gradcheck(chosen, (logits,))
    both = [(2 * one - 3 * two).sum() for one, two in ((logprobs, entropies), (picked, spread))]
    torch.testing.assert_close(*(torch.autograd.grad(total, logits)[0] for total in both))


def test_token_logprobs_of_bfloat16_logits_are_float32_and_their_gradient_is_not() -> None:
    logits = torch.randn(3, 11, dtype=torch.bfloat16, requires_grad=True)
    targets, temperatures = torch.tensor([1, 2, 3]), torch.ones(3)
    logprobs, entropies = token_logprobs(logits, targets, temperatures)
    assert logprobs.dtype == entropies.dtype == torch.float32
    expected = torch.log_softmax(logits.float(), -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected)
    (gradient,) = torch.autograd.grad(logprobs.sum(), logits)
    assert gradient.dtype == torch.bfloat16
