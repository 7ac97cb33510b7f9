"""Emulated engines as a real process of this machine, started by the product's own command."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx

from asyncrl_api.marks import merge
from asyncrl_api.names import NatsAddress
from asyncrl_api.parsing import parse_spec
from asyncrl_api.run_config import RunConfig
from asyncrl_runtime.emulation.device import MODELS
from support.engines.tiny_models import EngineProcess
from support.manifests.smallest import SMALLEST

LONG_RESPONSES = {
    "medianTokens: 7000, sigma: 0.85": "medianTokens: 5000, sigma: 0",
    "joinSeconds: 1.0": "joinSeconds: 0",
}


class EmulatedProcess(EngineProcess):
    """One engine whose responses go on until they are cut.

    Args:
        step_seconds: the duration of a decoding step.
    """

    computes = False

    def __init__(self, model_folder: Path, folder: Path, step_seconds: float) -> None:
        config = folder / "config.json"
        text = (MODELS / "areal-1.5b.yaml").read_text()
        for before, after in {**LONG_RESPONSES, "stepSeconds: 0.010": f"stepSeconds: {step_seconds}"}.items():
            assert before in text
            text = text.replace(before, after, 1)
        device_model = folder / "device.yaml"
        device_model.write_text(text)
        run_config(model_folder, device_model, folder).save(config)
        program = str(Path(sys.executable).parent / "asyncrl-runtime")
        self.process = subprocess.Popen(
            [program, "emulated-engine", "--config", str(config), "--port", "0"],
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log = []
        self.url = self._wait_for_url()
        threading.Thread(target=self._drain, daemon=True).start()
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)


def run_config(model_folder: Path, device_model: Path, folder: Path) -> RunConfig:
    """Return the run configuration of a job whose engines are emulated, at their own speed."""
    changes: dict[str, Any] = {
        "model": {"source": f"file://{model_folder}", "contextLength": 1024},
        "sampling": {"maxNewTokens": 512},
        "gpuBudget": {"total": 2, "allocation": "None"},
        "rollout": {"engine": {"type": "Emulated"}},
        "trainer": {"backend": "Emulated"},
        "emulation": {"deviceModel": str(device_model)},
    }
    return RunConfig(
        namespace="contract",
        name="contract",
        uid="contract",
        spec=parse_spec(merge(SMALLEST["spec"], changes)),
        nats=NatsAddress(url="nats://127.0.0.1:4222"),
        job_folder=folder,
        live_file=folder / "live.json",
        report_file=folder / "report.json",
        model_cache=folder / "cache",
    )
