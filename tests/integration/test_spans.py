"""Samples that span several policy versions: what the server attests is what sampled the tokens."""

import asyncio
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncrl_runtime.contract.messages import Sample, floats_from_bytes, ids_from_bytes
from asyncrl_runtime.history.audit import audit
from asyncrl_runtime.trainer.update.policy import ResponseModel, add_adapters
from support.engines.tiny_models import tiny_model
from support.jobs.job_harness import JobHarness, Recorder, build_job, until
from support.jobs.nats_server import NatsServer
from support.jobs.replay import replay

EXACT = 1e-4
"""KV was computed under the weights that sampled, so only float32 rounding of another batch shape is left."""
IN_PLACE_DRIFTS = 2.0
"""In place the prefix's KV stays that of older weights, so a token is sampled by something between the policy
of its own version and that of the sample's first: it may be off by about as much as these two differ (the
drift, measured on the same tokens), and twice that is the bound."""


ADAPTERS = {"lora": {"rank": 4, "targetModules": ["q_proj", "v_proj", "down_proj"]}, "learningRate": 1e-2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("interrupt", "training"),
    [("Retract", {}), ("InPlace", {}), ("Retract", ADAPTERS)],
    ids=["retract", "in place", "adapters"],
)
async def test_logprobs_are_those_of_the_attested_versions(
    own_nats: NatsServer, tmp_path: Path, process_group: None, interrupt: str, training: dict[str, Any]
) -> None:
    job = build_job(
        sampling={"groupSize": 2, "maxNewTokens": 40},
        training={"batchSize": 2, "maxSteps": 8, "learningRate": 1e-4, **training},
        staleness={"maxVersions": 4},
        rollout={"interrupt": interrupt},
    )
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        async with Recorder(harness) as recorder:
            harness.start_rollout(0)
            await slow_down(harness, seconds=0.02)  # so that a sample outlasts a step
            trainer = harness.start_trainer()
            assert await asyncio.to_thread(trainer.wait, 180) == 0, harness.log_tail("trainer")
            history = harness.history
            await until(lambda: all(t in recorder.groups for s in history.steps for t in s.tickets))
        assert audit(history).is_clean
        versions = list(replay(job.spec, tiny_model(), history, recorder.groups))
        samples = [s for g in recorder.groups.values() for s in g.samples if len(s.version_spans) > 1]
        assert len(samples) >= 4, "too few samples span versions; is the engine slow enough?"
        model = ResponseModel(AutoModelForCausalLM.from_pretrained(tiny_model()))
        if job.spec.training.trains_adapters:
            add_adapters(model, job.spec.training.lora, seed=0)
        off = [compare(model.causal_lm, versions, sample) for sample in samples]
        print(f"{interrupt}: {len(samples)} samples; {max(o.first for o in off):.1e} in first spans, ")
        print(f"  {max(o.later for o in off):.1e} in later ones, drift {max(o.drift for o in off):.1e}")
        assert max(o.first for o in off) < EXACT
        if interrupt == "Retract":
            assert max(o.later for o in off) < EXACT
        else:
            assert all(o.later < IN_PLACE_DRIFTS * o.drift + EXACT for o in off)
        assert max(o.drift for o in off) > 10 * EXACT  # the test can tell versions apart


class Off(NamedTuple):
    """Largest differences between a sample's log-probs and those computed again, whole prefix included."""

    first: float
    """The difference in its first span, which no update preceded."""
    later: float
    drift: float
    """The difference of the later spans' tokens between the sample's first version and their own."""


async def slow_down(harness: JobHarness, seconds: float) -> None:
    port = harness.engine_port(0)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        for _ in range(600):
            try:
                await http.post("/slow_down", json={"forward_sleep_time": seconds})
                return
            except httpx.HTTPError:
                await asyncio.sleep(0.1)
    raise AssertionError(harness.log_tail("rollout-0-engine"))


@torch.no_grad()
def compare(model: torch.nn.Module, versions: list[dict[str, torch.Tensor]], sample: Sample) -> Off:
    prompt, response = ids_from_bytes(sample.prompt_ids), ids_from_bytes(sample.response_ids)
    behavior = torch.tensor(floats_from_bytes(sample.behavior_logprobs))
    ids = torch.tensor(np.concatenate([prompt, response]))[None].long()

    def logprobs(version: int) -> torch.Tensor:
        model.load_state_dict(versions[version], strict=False)
        predicted = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1], -1)
        return predicted.gather(1, ids[0, len(prompt) :, None])[:, 0]

    oldest, *spans = sample.version_spans
    before = logprobs(oldest.version)
    first = (before - behavior)[: oldest.end].abs().max()
    later, drift, start = torch.tensor(0.0), torch.tensor(0.0), oldest.end
    for span in spans:
        own = logprobs(span.version)[start : span.end]
        later = torch.maximum(later, (own - behavior[start : span.end]).abs().max())
        drift = torch.maximum(drift, (own - before[start : span.end]).abs().max())
        start = span.end
    return Off(float(first), float(later), float(drift))
