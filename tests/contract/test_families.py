"""Updates of every supported family, whose weights are called as transformers does, and of several ranks."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from asyncrl_api.run_config import SGLANG_PYTHON
from support.engines.sglang_process import SGLangProcess
from support.engines.tiny_models import EngineProcess, Family, running_engine, tiny_model
from support.engines.weight_trainer import PROMPT, Trainer, logprobs_of_model, output_logprobs, weights_of


class Kind(NamedTuple):
    server: str
    family: Family
    is_tied: bool = False
    tp_size: int = 1

    def folder(self, seed: int) -> Path:
        return tiny_model(self.family, seed, tie_word_embeddings=self.is_tied)


FAMILIES: list[tuple[Family, bool]] = [("qwen2", True), ("qwen3", True), ("qwen3", False)]
KINDS = [
    *(Kind("cpu", family, is_tied) for family, is_tied in FAMILIES),
    *(Kind("sglang", family, is_tied) for family, is_tied in FAMILIES),
    Kind("sglang", "llama", tp_size=2),
]


@pytest.fixture
def engine(kind: Kind, tmp_path: Path) -> Iterator[EngineProcess]:
    if kind.server == "cpu":
        with running_engine(kind.folder(0)) as engine:
            yield engine
        return
    if SGLANG_PYTHON not in os.environ:
        pytest.skip(f"{SGLANG_PYTHON} is not set: not tried on SGLang (make contract-sglang)")
    sglang = SGLangProcess(kind.folder(0), tmp_path, "--gpus", str(kind.tp_size))
    try:
        yield sglang
    finally:
        sglang.kill()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_new_weights_are_what_is_sampled_with(
    kind: Kind, engine: EngineProcess, pool: ThreadPoolExecutor
) -> None:
    """All of them: each tensor of the new model is another one."""
    assert engine.http.get("/server_info").json()["tp_size"] == kind.tp_size
    assert_samples_with(engine, kind.folder(0))
    trainer = Trainer([engine], f"families-{kind}", pool, kind.tp_size)
    trainer.control("/pause_generation", {"mode": "retract"})
    trainer.control("/begin_weight_update", {"selector": "all"})
    weights = weights_of(1, kind.family, tie_word_embeddings=kind.is_tied)
    [answer] = trainer.send(weights, flat=True, weight_version="1.1")
    assert answer.json()["success"], answer.text
    trainer.control("/end_weight_update")
    trainer.control("/continue_generation", {})
    assert_samples_with(engine, kind.folder(1))
    trainer.leave()


def assert_samples_with(engine: EngineProcess, model_folder: Path) -> None:
    params = {"max_new_tokens": 20, "temperature": 1.0, "ignore_eos": True, "sampling_seed": 1}
    answer = engine.generate(input_ids=PROMPT, sampling_params=params, return_logprob=True)
    ids = PROMPT + answer["output_ids"]
    expected = logprobs_of_model(model_folder, ids)[len(PROMPT) - 1 :]
    assert output_logprobs(answer) == pytest.approx(expected, abs=1e-3)
