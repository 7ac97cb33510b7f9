"""Real engine processes that start in a moment: each is forked from one that has imported everything."""

import asyncio
import logging
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import httpx

from asyncrl_api.processes import die_with_parent
from asyncrl_runtime.engine.server import serve
from support.engines.posing_engine import pose
from support.jobs.nats_server import free_port

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["asyncrl_runtime.engine.server", "transformers.models.llama.modeling_llama", "httpx", "pytest"]
)


class ForkedEngine:
    """An engine on a port of its own, which it keeps when it is started again.

    Args:
        tp_size: the number of GPUs that the engine pretends to have.
        port: its port; 0: any.
    """

    def __init__(self, model_folder: Path, tp_size: int = 1, port: int = 0) -> None:
        self._model_folder = model_folder
        self._tp_size = tp_size
        self._port = port or free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._http = httpx.AsyncClient(base_url=self.url, timeout=30, trust_env=False)
        self._start()

    def _start(self) -> None:
        log = self._model_folder.with_name(f"engine-{self._port}.log")
        self._process = _context.Process(
            target=_serve, args=(self._model_folder, self._port, log, self._tp_size), daemon=True
        )
        self._process.start()

    def freeze(self) -> None:
        """Stop it, so that it is like a process that hangs: it exists and does not answer."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill it, and wait for its end."""
        self._process.kill()
        self._process.join()

    def restart(self) -> None:
        """Restart it as the kubelet does when a liveness probe fails."""
        self.kill()
        self._start()

    def _signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    async def close(self) -> None:
        await self._http.aclose()
        self.kill()

    async def wait_until_it_answers(self, seconds: float = 60) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            try:
                await self._http.get("/model_info")
                return
            except httpx.TransportError as error:
                assert self._process.is_alive(), f"{self.url} ended with {self._process.exitcode}"
                assert asyncio.get_running_loop().time() < deadline, f"{self.url}: {error!r}"
                await asyncio.sleep(0.02)

    async def post(self, path: str, body: Any = None) -> Any:
        """Return the answer to a control call, which must be a 200."""
        response = await self._http.post(path, json={} if body is None else body)
        assert response.status_code == 200, response.text
        return response.json() if response.content else None

    async def load(self, model_folder: Path) -> None:
        """Replace its weights without anybody's knowledge."""
        await self.post("/update_weights_from_disk", {"model_path": str(model_folder)})

    async def slow_down(self, seconds: float) -> None:
        """Make each forward pass last this much longer."""
        await self.post("/slow_down", {"forward_sleep_time": seconds})

    async def label(self) -> str:
        """Return the label of the weights that it samples with."""
        label: str = (await self._http.get("/model_info")).json()["weight_version"]
        return label

    async def is_paused(self) -> bool:
        return (await self._http.get("/ready")).status_code == 503

    async def wait_until_it_goes_on(self, seconds: float = 60) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        while await self.is_paused():
            assert asyncio.get_running_loop().time() < deadline, f"{self.url} is paused after {seconds} s"
            await asyncio.sleep(0.02)

    async def checksums(self) -> dict[str, str]:
        """Return the SHA-256 of each parameter's bytes."""
        answer = await self.post("/weights_checker", {"action": "checksum"})
        checksums: dict[str, str] = answer["ranks"][0]["checksums"]
        return checksums


def _serve(model_folder: Path, port: int, log: Path, tp_size: int) -> None:
    die_with_parent()
    if tp_size > 1:
        pose(tp_size)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    logging.basicConfig(filename=log, level=logging.INFO)
    serve(model_folder, "127.0.0.1", port)
