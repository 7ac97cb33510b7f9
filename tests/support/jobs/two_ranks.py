"""A job whose trainer has two ranks, and what its weights must be."""

from typing import Any

from transformers import AutoModelForCausalLM

from asyncrl_api.job import AsyncRLJob
from asyncrl_api.marks import merge
from support.engines.tiny_models import tiny_model
from support.jobs.job_harness import JobHarness, build_job
from support.jobs.job_witness import Witness
from support.jobs.replay import replay

ALL_IN_SHARES = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def build_job_of_two_ranks(zero_stage: int, **overrides: Any) -> AsyncRLJob:
    deepspeed = {"zeroStage": zero_stage, "config": ALL_IN_SHARES if zero_stage == 3 else {}}
    spec = {
        "training": {"batchSize": 3, "maxSteps": 6, "learningRate": 1e-4},
        "trainer": {"deepspeed": deepspeed},
        "gpuBudget": {"total": 3, "mode": "Manual", "split": {"trainer": 2, "rollout": 1}},
    }
    return build_job(**merge(spec, overrides))


async def check_weights(harness: JobHarness, witness: Witness) -> None:
    """Compare what two ranks have trained with what one rank makes of the same batches.

    One weight in a thousand may differ: where a gradient cancels to rounding noise, Adam divides noise by its
    own size, and the weight moves by a whole learning rate in either direction.
    """
    history, groups = harness.history, witness.groups
    await witness.until("all is recorded", lambda: all(t in groups for s in history.steps for t in s.tickets))
    *_, reference = replay(harness.job.spec, tiny_model(), history, groups)
    exported = AutoModelForCausalLM.from_pretrained(harness.folder.path / "export" / "final")
    for name, weight in exported.named_parameters():
        differs = (weight - reference[name]).abs() > 1e-5
        assert differs.float().mean() < 1e-3, f"{name}: {differs.sum()} of {differs.numel()} weights differ"
