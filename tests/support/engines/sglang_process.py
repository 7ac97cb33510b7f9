"""SGLang as a real process of this machine, started by the product's own command."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from asyncrl_api.marks import merge
from asyncrl_api.names import NatsAddress
from asyncrl_api.parsing import parse_spec
from asyncrl_api.run_config import RunConfig
from support.engines.tiny_models import EngineProcess
from support.manifests.smallest import SMALLEST

START_SECONDS = 300


class SGLangProcess(EngineProcess):
    """Its log is `sglang.log` in `folder`."""

    def __init__(self, model_folder: Path, folder: Path, *arguments: str, dtype: str = "Float32") -> None:
        config = folder / "config.json"
        run_config(model_folder, folder, dtype).save(config)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.path = folder / "sglang.log"
        command = [str(Path(sys.executable).parent / "asyncrl-runtime"), "sglang", "--config", str(config)]
        command += ["--port", str(port), *arguments]
        with self.path.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self.process.poll() is None, self.path.read_text()[-5000:]
            assert time.monotonic() < deadline, self.path.read_text()[-5000:]
            try:
                if self.http.get("/model_info", timeout=2).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)

    def close(self) -> int:
        raise NotImplementedError("it is killed")

    def kill(self) -> None:
        """End it with all its processes."""
        self.http.close()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run_config(model_folder: Path, folder: Path, dtype: str) -> RunConfig:
    """Return the run configuration of a job whose engines are SGLang on CPUs."""
    changes: dict[str, Any] = {
        "model": {"source": f"file://{model_folder}", "dtype": dtype, "contextLength": 1024},
        "sampling": {"maxNewTokens": 512},
        "gpuBudget": {"total": 2, "allocation": "None"},
        "rollout": {"engine": {"type": "SGLang"}},
        "weightSync": {"backend": "Gloo"},
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
