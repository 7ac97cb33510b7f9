"""A job whose weights are staged: its receivers and engines are killed, and it trains what it would have."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from asyncrl_runtime.history.audit import audit
from support.engines.tiny_models import tiny_model
from support.jobs.job_harness import JobHarness, build_job
from support.jobs.job_witness import Engine, Witness, finish
from support.jobs.nats_server import NatsServer
from support.jobs.replay import replay

TRAINING = {"batchSize": 3, "maxSteps": 6, "learningRate": 1e-3}
STAGED = {"mode": "Staged", "stagingMegabytes": 8}


@pytest.mark.slow
async def test_receivers_and_engines_that_are_killed_come_back_with_the_whole(
    own_nats: NatsServer, tmp_path: Path, process_group: None
) -> None:
    job = build_job(training=TRAINING, weightSync=STAGED)
    with JobHarness(tmp_path / "run", own_nats, job) as harness:
        async with Witness(harness) as witness:
            harness.start_rollout(0)
            await Engine(harness, 0).slow_down(0.05)
            harness.start_trainer()
            await witness.until("step 1", lambda: harness.step >= 1)
            harness.kill("rollout-0-receiver")
            harness.start("rollout-0-receiver")
            await witness.until("step 3", lambda: harness.step >= 3)
            harness.kill("rollout-0-engine")
            killed_at = harness.step
            harness.start("rollout-0-engine")
            await finish(harness)
            history, groups = harness.history, witness.groups
            trained = {ticket for step in history.steps for ticket in step.tickets}
            await witness.until("all is recorded", lambda: trained <= groups.keys())
        assert audit(history).is_clean
        samples = [sample for group in groups.values() for sample in group.samples]
        versions = {span.version for sample in samples for span in sample.version_spans}
        assert max(versions) >= killed_at
        log = harness.folder.log("rollout-0-receiver").read_text()
        assert "1.0 is here" in log and log.count("receiver of") == 2
        expected = list(replay(job.spec, tiny_model(), history, groups))[-1]
        exported = load_file(harness.folder.path / "export" / "final" / "model.safetensors")
        for name, tensor in exported.items():
            assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-5), name
        pauses = [
            line["update_pause_seconds"]
            for line in map(json.loads, harness.folder.metrics.read_text().splitlines())
            if line.get("update_pause_seconds")
        ]
        assert pauses
