"""`asyncrl calibrate`, as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from asyncrl_runtime.emulation.device import MODELS, DeviceModel, load_device_model, parse_device_model
from support.engines.emulated_process import EmulatedProcess
from support.engines.tiny_models import EngineProcess, running_engine, tiny_model
from support.jobs.cli_runs import CliRun, write_job
from support.jobs.job_harness import build_job
from support.manifests.smallest import SMALLEST

SLOW_TRAINER = {
    "medianTokens: 7000": "medianTokens: 6",
    "shortestTokens: 64": "shortestTokens: 1",
    "updateTokensPerSecond: 14725, forwardTokensPerSecond: 58900": (
        "updateTokensPerSecond: 50, forwardTokensPerSecond: 200"
    ),
}
PROGRAM = str(Path(sys.executable).with_name("asyncrl"))


def asyncrl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, timeout=400, check=False)


def calibrated(engine: EngineProcess) -> tuple[str, DeviceModel]:
    """The device model that is made of an engine, as text and read."""
    result = asyncrl("calibrate", "--engine", engine.url, "--base", "areal-1.5b")
    assert result.returncode == 0, result.stderr
    return result.stdout, parse_device_model(result.stdout, "stdout")


def test_a_model_of_the_cpu_engine_can_be_simulated_with(tmp_path: Path) -> None:
    with running_engine(tiny_model()) as engine:
        text, model = calibrated(engine)
    assert model.engine.step_seconds < 0.2
    assert "fit of" in model.sources["engine.stepSeconds"]
    assert model.trainer == load_device_model("areal-1.5b").trainer
    assert model.sources["trainer.checkpointSeconds"].startswith("not measured")
    (tmp_path / "mine.yaml").write_text(text)
    with (tmp_path / "job.yaml").open("w") as stream:
        YAML().dump(SMALLEST, stream)
    short = ("sampling.maxNewTokens=200", "sampling.groupSize=4", "training.batchSize=4")
    settings = [word for each in (*short, "gpuBudget.total=3") for word in ("--set", f"spec.{each}")]
    arguments = ["--device-model", str(tmp_path / "mine.yaml"), "--steps", "1", "--json", *settings]
    result = asyncrl("simulate", str(tmp_path / "job.yaml"), *arguments)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["steps_per_hour"] > 0


@pytest.mark.slow
def test_an_emulated_engine_behind_http_has_about_the_rates_of_its_model(tmp_path: Path) -> None:
    """About: it takes real time, which the machine's load makes longer; tests/unit has it exactly."""
    engine = EmulatedProcess(tiny_model(), tmp_path, 0.008)
    try:
        _, found = calibrated(engine)
    finally:
        engine.kill()
    assert found.engine.step_seconds > 0.0075  # no machine is faster than its model
    wanted = load_device_model("areal-1.5b").engine
    assert (found.engine.kv_tokens, found.engine.max_running) == (wanted.kv_tokens, wanted.max_running)


@pytest.mark.slow
def test_a_model_of_an_emulated_run_has_about_the_rates_of_the_runs_model(tmp_path: Path) -> None:
    """About: the run takes real time; tests/unit has it exactly."""
    text = (MODELS / "areal-1.5b.yaml").read_text()
    for before, after in SLOW_TRAINER.items():
        assert before in text
        text = text.replace(before, after, 1)
    (tmp_path / "device.yaml").write_text(text)
    job = build_job(
        sampling={"groupSize": 4},
        training={"batchSize": 4, "maxSteps": 14},
        algorithm={"entropyCoefficient": 0.001},  # so that every sample goes through the model
        trainer={"backend": "Emulated"},
        rollout={"engine": {"type": "Emulated"}},
        emulation={"deviceModel": str(tmp_path / "device.yaml"), "speedup": 5},
    )
    with CliRun(write_job(tmp_path, job), tmp_path / "run") as run:
        assert run.wait() == 0, run.output
    result = asyncrl("calibrate", str(tmp_path / "run"), "--base", "areal-1.5b")
    assert result.returncode == 0, result.stderr
    found = parse_device_model(result.stdout, "stdout")
    assert 100 < found.trainer.forward_tokens_per_second < 220
    assert "14 steps on 1 rank(s)" in found.sources["trainer.updateTokensPerSecond"]
    assert found.responses.longest_tokens <= 8, "the job has that bound"
    assert found.sources["engine.stepSeconds"].startswith("not measured; of device model areal-1.5b")


def test_what_cannot_be_derived_is_refused_in_words(tmp_path: Path) -> None:
    nothing = asyncrl("calibrate")
    assert nothing.returncode == 64
    assert "--engine URL" in nothing.stderr
    no_run = asyncrl("calibrate", str(tmp_path))
    assert no_run.returncode == 64
    assert "holds no run" in no_run.stderr
    nobody = asyncrl("calibrate", "--engine", "http://127.0.0.1:9")
    assert nobody.returncode == 78
    assert "is an engine there?" in nobody.stderr
    with running_engine(tiny_model()) as engine:
        alone = asyncrl("calibrate", "--engine", engine.url)
    assert alone.returncode == 78
    assert "trainer.updateTokensPerSecond: no run was named" in alone.stderr
    assert "engine.stepSeconds" not in alone.stderr
