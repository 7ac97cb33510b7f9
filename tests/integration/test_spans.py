"""Samples that span several policy versions: what the server attests is what sampled the tokens."""

import asyncio
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncrl_runtime.contract.messages import Sample, floats_from_bytes, ids_from_bytes
from asyncrl_runtime.transport.audit import audit
from job_harness import JobHarness, Recorder, build_job, until
from nats_server_fixture import NatsServer
from replay import replay
from tiny_models import tiny_model

RETRACT_BOUND = 1e-4
"""KV is recomputed under the new weights, so only float32 rounding of another batch shape is left."""
IN_PLACE_BOUND = 0.05
"""The prefix's KV stays that of older weights. At 8 steps of learning rate 1e-4 (AdamW: each weight moves by
at most that a step) log-probs of this model move by up to 0.02 between versions; measured 0.003 and less."""


@pytest.mark.slow
@pytest.mark.parametrize(("interrupt", "bound"), [("Retract", RETRACT_BOUND), ("InPlace", IN_PLACE_BOUND)])
async def test_logprobs_are_those_of_the_attested_versions(
    own_nats: NatsServer, tmp_path: Path, process_group: None, interrupt: str, bound: float
) -> None:
    job = build_job(
        sampling={"groupSize": 2, "maxNewTokens": 40},
        training={"batchSize": 2, "maxSteps": 8, "learningRate": 1e-4},
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
        model = AutoModelForCausalLM.from_pretrained(tiny_model())
        distances = [distance(model, versions, sample) for sample in samples]
        others = [distance(model, versions, sample, shift=1) for sample in samples]
        print(f"{interrupt}: {len(samples)} samples, largest difference {max(distances):.2e}")
        assert max(distances) < bound
        if interrupt == "Retract":  # the test can tell versions apart
            assert np.median(others) > 10 * bound


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
def distance(
    model: torch.nn.Module, versions: list[dict[str, torch.Tensor]], sample: Sample, shift: int = 0
) -> float:
    """Largest difference of a sample's log-probs from those of its versions (or of others, for contrast)."""
    prompt, response = ids_from_bytes(sample.prompt_ids), ids_from_bytes(sample.response_ids)
    behavior = floats_from_bytes(sample.behavior_logprobs)
    ids = torch.tensor(np.concatenate([prompt, response]))[None].long()
    start, largest = 0, 0.0
    for span in sample.version_spans:
        model.load_state_dict(versions[max(0, span.version - shift)], strict=False)
        predicted = torch.log_softmax(model(ids).logits[0], -1)
        for place in range(start, span.end):
            logprob = predicted[len(prompt) + place - 1, int(response[place])]
            largest = max(largest, abs(float(logprob) - float(behavior[place])))
        start = span.end
    return largest
