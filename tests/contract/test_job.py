"""Jobs whose engines are SGLang: weights come by broadcast while they sample, and two of them are killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from asyncrl_api.run_config import SGLANG_PYTHON

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(SGLANG_PYTHON not in os.environ, reason=f"{SGLANG_PYTHON} is not set: no SGLang"),
]

EXAMPLES = Path(__file__).parents[2] / "examples"
BIN = Path(sys.executable).parent
SECONDS = 1000


class Job:
    """An example, run by the local runner with SGLang as its engine."""

    def __init__(self, folder: Path, example: str, settings: dict[str, Any]) -> None:
        self._folder, self._log = folder / "run", folder / "log"
        settings = {"spec.rollout.engine.type": "SGLang", **settings}
        command = [str(BIN / "asyncrl"), "run", str(EXAMPLES / example), "--out", str(self._folder)]
        command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        lines = [
            line for path in self._folder.rglob("metrics.jsonl") for line in path.read_text().splitlines()
        ]
        return [json.loads(line) for line in lines]

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + SECONDS
        while not self.metrics or self.metrics[-1]["step"] < step:
            assert self.process.poll() is None, f"it has ended early: {self._log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"step {step} was not trained in {SECONDS} s"
            time.sleep(0.5)

    def kill_an_engine(self) -> None:
        """SIGKILL SGLang's server; its other processes follow."""
        processes = psutil.Process(self.process.pid).children()
        engines = [each for each in processes if "sglang.launch_server" in " ".join(each.cmdline())]
        engines[0].send_signal(signal.SIGKILL)

    def finish(self, num_steps: int) -> None:
        """Wait for its end; prove that each ticket was trained once."""
        assert self.process.wait(SECONDS) == 0, self._log.read_text()[-3000:]
        assert self.metrics[-1]["step"] == num_steps
        [ledger] = self._folder.rglob("ledger.jsonl")
        command = [str(BIN / "asyncrl"), "audit", str(ledger.parent)]
        audit = subprocess.run(command, check=True, capture_output=True, text=True)
        assert re.search(r"trained \d+  discarded \d+  missing 0  twice 0", audit.stdout), audit.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for path in tmp_path.rglob("*.safetensors"):  # half a gigabyte each
        path.unlink()


def run(
    folder: Path, example: str, settings: dict[str, Any], num_steps: int, kill_at: tuple[int, ...] = ()
) -> Job:
    job = Job(folder, example, {**settings, "spec.training.maxSteps": num_steps})
    try:
        for step in kill_at:
            job.wait_for_step(step)
            job.kill_an_engine()
        job.finish(num_steps)
    finally:
        job.process.kill()
    names = (
        "staleness_max",
        "ratio_p05",
        "ratio_p95",
        "mismatch_k3",
        "mismatch_absolute_gap",
        "step_seconds",
    )
    for line in job.metrics:
        print({name: line[name] for name in ("step", *names) if name in line})
    return job


QUICKSTART = {
    "spec.evaluation.samples": 32,
    "spec.evaluation.everySteps": 1000,
    "spec.checkpoint.everySteps": 5,
}


def test_a_policy_is_trained_on_samples_of_sglang(folder: Path) -> None:
    job = run(folder, "quickstart.yaml", QUICKSTART, 20, kill_at=(4, 10))
    assert gap(job) < 1e-3


def test_weights_in_shares_reach_sglang(folder: Path) -> None:
    """With ZeRO 3 on two ranks, the policy that is sampled is the one that is trained, to fp32's rounding."""
    settings = QUICKSTART | {
        "spec.gpuBudget": "{total: 3, allocation: None, mode: Manual, split: {trainer: 2, rollout: 1}}",
        "spec.trainer.deepspeed": (
            "{zeroStage: 3, config: {zero_optimization: {stage3_param_persistence_threshold: 0}}}"
        ),
    }
    job = run(folder, "quickstart.yaml", settings, 5)
    assert gap(job) < 1e-3


def test_adapters_reach_sglang(folder: Path) -> None:
    settings = QUICKSTART | {"spec.training.lora.rank": 8, "spec.training.learningRate": 1e-3}
    job = run(folder, "quickstart.yaml", settings, 10, kill_at=(4,))
    assert gap(job) < 1e-3


@pytest.mark.parametrize(("dtype", "most"), [("Float32", 1e-3), ("BFloat16", 0.1)])
def test_smollm2_is_trained_on_samples_of_sglang(folder: Path, dtype: str, most: float) -> None:
    """In bf16, engine and trainer round the same sums in different orders, to three decimal digits."""
    settings = {
        "spec.model.dtype": dtype,
        "spec.training.batchSize": 2,
        "spec.sampling.groupSize": 4,
        "spec.staleness.maxVersions": 0,  # only tokens of the version that trains them tell of the gap
        "spec.evaluation.samples": 4,
        "spec.evaluation.everySteps": 1000,
    }
    job = run(folder, "smollm2.yaml", settings, 5)
    assert gap(job) < most


def gap(job: Job) -> float:
    """Return how far log-probs of engine and trainer are apart under the same weights, in the worst step."""
    gaps = [float(line["mismatch_absolute_gap"]) for line in job.metrics if "mismatch_absolute_gap" in line]
    return max(gaps)
