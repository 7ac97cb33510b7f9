"""A job that trains adapters: its engines are killed, its policy is handed out in PEFT's form."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from asyncrl_runtime.history.audit import audit
from support.engines.tiny_models import tiny_model
from support.jobs.cli_runs import asyncrl
from support.jobs.job_harness import JobHarness, build_job
from support.jobs.job_witness import Engine, Witness, finish
from support.jobs.nats_server import NatsServer
from support.jobs.replay import replay

TRAINING = {
    "batchSize": 3,
    "maxSteps": 6,
    "learningRate": 1e-2,
    "lora": {"rank": 4, "alpha": 8.0, "targetModules": ["q_proj", "down_proj"]},
}


@pytest.mark.slow
async def test_an_engine_that_is_killed_comes_back_with_the_newest_adapter(
    own_nats: NatsServer, tmp_path: Path, process_group: None
) -> None:
    evaluation = {"source": "harness_data:rows", "everySteps": 6, "samples": 8}
    job = build_job(training=TRAINING, evaluation=evaluation)
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        async with Witness(harness) as witness:
            harness.start_rollout(0)
            await Engine(harness, 0).slow_down(0.05)
            harness.start_trainer()
            await witness.until("step 2", lambda: harness.step >= 2)
            harness.kill("rollout-0-engine")
            killed_at = harness.step
            harness.start("rollout-0-engine")
            await finish(harness)
            history, groups = harness.history, witness.groups
            trained = {ticket for step in history.steps for ticket in step.tickets}
            await witness.until("all is recorded", lambda: trained <= groups.keys())
        assert audit(history).is_clean
        samples = [sample for group in groups.values() for sample in group.samples]
        assert max(span.version for sample in samples for span in sample.version_spans) >= killed_at
        check_export(harness, list(replay(job.spec, tiny_model(), history, groups))[-1])
        check_evaluation(harness)


def check_export(harness: JobHarness, weights: dict[str, torch.Tensor]) -> None:
    """What was exported is what the recorded batches make of adapters, and PEFT loads it."""
    folder = harness.folder.path / "export" / "final"
    exported = load_file(folder / "adapter_model.safetensors")
    expected = {name.replace(".default.", "."): each for name, each in weights.items() if ".lora_" in name}
    assert exported.keys() == expected.keys()
    for name, tensor in exported.items():
        assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-5), name
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    base = AutoModelForCausalLM.from_pretrained(tiny_model())
    ids = torch.tensor([[5, 6, 7]])
    before = base(ids).logits
    assert not torch.allclose(PeftModel.from_pretrained(base, folder)(ids).logits, before, atol=1e-3)


def check_evaluation(harness: JobHarness) -> None:
    """`asyncrl eval`, which merges the adapter, says what the engines said that sampled with it."""
    report = harness.report
    assert report is not None and report.last_evaluation is not None
    ended = asyncrl("eval", harness.folder.path, seconds=240)
    accuracy = f"{report.last_evaluation.accuracy:.1%}"
    assert ended.stdout == f"step 6: held-out accuracy {accuracy} of 8 prompts\n", ended.stderr
