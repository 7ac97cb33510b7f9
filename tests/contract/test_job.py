"""A job whose engines are SGLang: weights come by broadcast while they sample, and two of them are killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from asyncrl_api.run import SGLANG_PYTHON

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(SGLANG_PYTHON not in os.environ, reason=f"{SGLANG_PYTHON} is not set: no SGLang"),
]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
STEPS = 20
SECONDS = 800


def test_a_policy_is_trained_on_samples_of_sglang(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {
        "spec.rollout.engine.type": "SGLang",
        "spec.training.maxSteps": STEPS,
        "spec.evaluation.samples": 32,
        "spec.evaluation.everySteps": 1000,
        "spec.checkpoint.everySteps": 5,
    }
    command = [str(BIN / "asyncrl"), "run", str(ROOT / "examples" / "quickstart.yaml"), "--out", str(run)]
    command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    with (tmp_path / "log").open("wb") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for step in (4, 10):
            wait_for_step(job, run, step)
            kill_an_engine(job)
        assert job.wait(SECONDS) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        job.kill()
    [metrics] = run.rglob("metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert lines[-1]["step"] == STEPS
    print({name: lines[-1][name] for name in lines[-1] if "logprob" in name or "ratio" in name})
    audit = subprocess.run(
        [BIN / "asyncrl", "audit", metrics.parent], check=True, capture_output=True, text=True
    )
    assert re.search(rf"trained {STEPS * 32}  discarded \d+  missing 0  twice 0", audit.stdout)


def wait_for_step(job: "subprocess.Popen[bytes]", run: Path, step: int) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        assert job.poll() is None, "it has ended early"
        assert time.monotonic() < deadline, f"step {step} was not trained in {SECONDS} s"
        lines = [line for path in run.rglob("metrics.jsonl") for line in path.read_text().splitlines()]
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.5)


def kill_an_engine(job: "subprocess.Popen[bytes]") -> None:
    """SIGKILL SGLang's server; its other processes follow."""
    engines = [
        each
        for each in psutil.Process(job.pid).children()
        if "sglang.launch_server" in " ".join(each.cmdline())
    ]
    engines[0].send_signal(signal.SIGKILL)
