"""Device models: what is read from YAML, and what is refused."""

import statistics
from pathlib import Path

import pytest

from asyncrl_runtime.emulation.device import (
    MODELS,
    DeviceModel,
    DeviceModelError,
    load_device_model,
    parse_device_model,
)

BUILT_IN = sorted(path.stem for path in MODELS.glob("*.yaml"))


@pytest.fixture
def model() -> DeviceModel:
    return load_device_model("areal-1.5b")


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_model_loads_and_says_where_each_number_is_from(name: str) -> None:
    model = load_device_model(name)
    assert all(len(source) > len("assumed") - 1 for source in model.sources.values())


def test_a_file_is_loaded_like_a_built_in_model(tmp_path: Path, model: DeviceModel) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text((MODELS / "areal-1.5b.yaml").read_text())
    assert load_device_model(str(file)) == model


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("kvTokens: 2000000", "kvTokens: 0", "engine.kvTokens"),
        ("stepSeconds: 0.010", "stepSeconds: -1", "engine.stepSeconds"),
        ("stepSeconds: 0.010", "stepSeconds: .nan", "engine.stepSeconds"),
        ("stepSeconds: 0.010", "stepSeconds: .inf", "engine.stepSeconds"),
        ("  gpus: 1\n", "", "missing required field `gpus`"),
        ("  gpus: 1\n", "  gpus: 1\n  gpu: 1\n", "unknown field `gpu`"),
        ("  engine.gpus: ", "  engine.gpu: ", "sources says nothing of engine.gpus"),
        ("sources:\n", "sources:\n  engine.colour: red\n", "sources names engine.colour"),
        ("sources:", "sources: [", "expected"),
    ],
)
def test_what_is_wrong_is_named(before: str, after: str, said: str) -> None:
    text = (MODELS / "areal-1.5b.yaml").read_text()
    assert before in text
    with pytest.raises(DeviceModelError, match="mine") as error:
        parse_device_model(text.replace(before, after, 1), "mine")
    assert said in str(error.value)


def test_a_model_that_is_not_there_is_answered_with_those_that_are() -> None:
    with pytest.raises(DeviceModelError, match=r"no-such.*areal-1\.5b"):
        load_device_model("no-such")


def test_lengths_are_those_of_the_distribution_and_a_function_of_the_seed(model: DeviceModel) -> None:
    responses = model.responses
    lengths = [responses.length(seed) for seed in range(20_000)]
    assert lengths == [responses.length(seed) for seed in range(20_000)]
    assert statistics.median(lengths) == pytest.approx(responses.median_tokens, rel=0.03)
    assert max(lengths) == responses.longest_tokens
    mean, square = responses.moments(responses.longest_tokens)
    assert statistics.mean(lengths) == pytest.approx(mean, rel=0.02)
    assert statistics.mean(length**2 for length in lengths) == pytest.approx(square, rel=0.05)


def test_the_mean_length_is_what_the_source_says(model: DeviceModel) -> None:
    mean, _ = model.responses.moments(model.responses.longest_tokens)
    assert mean == pytest.approx(76e6 / 8192, rel=0.01)


def test_a_step_takes_what_the_paper_measured_at_unbounded_staleness(model: DeviceModel) -> None:
    tokens = 76e6
    seconds = model.trainer.step_seconds(tokens, minibatches=4, gpus=32)
    passes = seconds - 4 * model.trainer.seconds_per_update
    assert tokens / passes == pytest.approx(396_800, rel=0.001)


@pytest.mark.parametrize(("name", "published"), [("h100", 9_305), ("h200", 12_194)])
def test_the_fitted_step_gives_the_published_rate_in_fp8(name: str, published: float) -> None:
    """2048 prompt and 2048 response tokens, with weights and cache of one byte instead of two."""
    engine, weights = load_device_model(name).engine, load_device_model(name).weights
    kv_bytes = 131_072
    bandwidth = kv_bytes / engine.step_seconds_per_token
    step = engine.step_seconds - weights.num_bytes / 2 / bandwidth
    tokens = (engine.kv_tokens * kv_bytes + weights.num_bytes / 2) / (kv_bytes / 2)
    running = tokens / (2048 + 2048 / 2)
    step += tokens * engine.step_seconds_per_token / 2
    assert 1 / (step / running + 1 / (2 * engine.prefill_tokens_per_second)) == pytest.approx(
        published, rel=0.01
    )


def test_more_room_and_fewer_tokens_raise_the_generation_rate(model: DeviceModel) -> None:
    assert model.generation_rate(8_192) > model.generation_rate(27_648)
    assert model.generation_rate(27_648, max_concurrency=64) < model.generation_rate(27_648)
