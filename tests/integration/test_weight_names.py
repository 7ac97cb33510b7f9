"""Weights go to SGLang under names that it knows, or not at all."""

from pathlib import Path

import pytest

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_api.job import LoRASpec
from asyncrl_runtime.trainer.assemble import check_names
from asyncrl_runtime.trainer.update.policy import Policy, add_adapters, load_model
from support.engines.rollout_scene import SPEC
from support.engines.tiny_models import Family, tiny_model


def load(folder: Path) -> Policy:
    return Policy(
        folder,
        dtype="Float32",
        training=SPEC.training,
        algorithm=SPEC.algorithm,
        deepspeed=SPEC.trainer.deepspeed,
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_families_whose_names_are_those_of_the_files(family: Family, process_group: None) -> None:
    folder = tiny_model(family, tie_word_embeddings=True)
    check_names(load(folder), folder)


def test_adapters_of_layers_that_are_not_there_are_refused() -> None:
    model = load_model(tiny_model(), "Float32")
    with pytest.raises(ExitError, match=r"spec\.training\.lora\.targetModules: .*c_attn") as refused:
        add_adapters(model, LoRASpec(rank=2, target_modules=["c_attn"]), seed=0)
    assert refused.value.code == ExitCode.REFUSED


def test_experts_that_are_merged_are_refused(process_group: None) -> None:
    folder = tiny_model("qwen3_moe")
    with pytest.raises(ExitError, match=r"experts\.gate_up_proj has another name in .* SGLang") as refused:
        check_names(load(folder), folder)
    assert refused.value.code == ExitCode.REFUSED
