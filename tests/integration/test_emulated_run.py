"""`asyncrl run` on emulated devices: every process is a real one, and only the devices are not."""

import json
from pathlib import Path

import pytest

from asyncrl_runtime.emulation.device import MODELS
from support.jobs.cli_runs import CliRun, asyncrl, write_job
from support.jobs.job_harness import build_job

pytestmark = pytest.mark.slow

CHANGES = {
    "medianTokens: 7000": "medianTokens: 6",
    "longestTokens: 27648": "longestTokens: 12",
    "shortestTokens: 64": "shortestTokens: 1",
    "numBytes: 3090000000": "numBytes: 30000000",
    "checkpointSeconds: 5": "checkpointSeconds: 0",
}


def device_model(folder: Path) -> Path:
    """A device whose responses are as short as the harness's prompts allow."""
    text = (MODELS / "areal-1.5b.yaml").read_text()
    for before, after in CHANGES.items():
        assert before in text
        text = text.replace(before, after, 1)
    file = folder / "device.yaml"
    file.write_text(text)
    return file


def test_a_job_on_emulated_devices_runs_to_its_end_and_its_books_close(tmp_path: Path) -> None:
    job = build_job(
        trainer={"backend": "Emulated"},
        rollout={"engine": {"type": "Emulated"}},
        emulation={"deviceModel": str(device_model(tmp_path)), "speedup": 20},
        training={"maxSteps": 60},
        gpuBudget={"total": 4, "mode": "Manual", "split": {"trainer": 2, "rollout": 2}},
    )
    with CliRun(write_job(tmp_path, job), tmp_path / "run") as run:
        assert run.wait() == 0, run.output
        folder = run.folder
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, job.spec.training.max_steps + 1))
    per_update = 0.5 / 20  # of the device model, at that speed-up
    updates = min(job.spec.training.minibatches, job.spec.training.batch_size)
    assert all(line["train_seconds"] >= updates * per_update for line in lines)
    assert lines[-1]["num_engines"] == 2
    # Not `loop_lag_seconds`: a busy machine, which lets the loop's thread wait for a CPU, adds to that.
    assert all(line["loop_lag_seconds"] >= line["loop_own_lag_seconds"] for line in lines)
    assert 0 < max(line["loop_own_lag_seconds"] for line in lines) <= 0.05
    assert max(line["staleness_max"] for line in lines) <= job.spec.staleness.max_versions
    assert asyncrl("audit", folder.path).returncode == 0
