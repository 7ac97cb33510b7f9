"""An engine that is probed over SGLang's native HTTP API."""

import random
from collections.abc import Callable
from typing import Any

import aiohttp

from asyncrl_runtime.calibration.findings import CalibrationError
from asyncrl_runtime.calibration.measured_engine import EngineFacts, ProbedBatch
from asyncrl_runtime.contract.refused import one_line

PROBE_SECONDS = 600
"""How long an engine may take to answer one probe."""
TOKEN_IDS = (5, 60)
"""The ids that prompts are made of, from and to: every vocabulary has them."""
DEFAULT_CONTEXT = 1024
"""The context length that is presumed of an engine that does not say its own."""


class HttpProbedEngine:
    """Implements ProbedEngine.

    Args:
        clock: returns seconds.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession, clock: Callable[[], float]) -> None:
        self._url = url.rstrip("/")
        self._session = session
        self._clock = clock
        self._noise = random.Random(1)

    async def facts(self) -> EngineFacts:
        info = await self._ask("GET", "/server_info", None)
        try:
            [state, *_] = info["internal_states"]
            return EngineFacts(
                gpus=int(info["tp_size"]),
                kv_tokens=int(info["max_total_num_tokens"]),
                max_running=int(state["effective_max_running_requests_per_dp"]),
                context_length=int(info.get("context_length") or DEFAULT_CONTEXT),
                version=str(info.get("version", "")),
            )
        except (KeyError, TypeError, ValueError) as error:
            why = one_line(f"{type(error).__name__}: {error}")
            raise CalibrationError(f"{self._url}/server_info: the answer is not SGLang's: {why}") from error

    async def seconds(self, probe: ProbedBatch) -> float:
        prompts = [
            [self._noise.randrange(*TOKEN_IDS) for _ in range(probe.prompt_tokens)]
            for _ in range(probe.num_prompts)
        ]
        settings = {"max_new_tokens": probe.new_tokens, "temperature": 1.0, "ignore_eos": True}
        began = self._clock()
        answers = await self._ask("POST", "/generate", {"input_ids": prompts, "sampling_params": settings})
        seconds = self._clock() - began
        counts = {len(answer["output_ids"]) for answer in answers}
        if counts != {probe.new_tokens}:
            raise CalibrationError(
                f"{self._url}: asked for {probe.new_tokens} tokens and got {sorted(counts)}; the engine must "
                "heed ignore_eos, and have room in its cache"
            )
        return seconds

    async def _ask(self, method: str, path: str, body: Any) -> Any:
        try:
            async with self._session.request(method, self._url + path, json=body) as answer:
                if answer.status != 200:
                    why = one_line(await answer.text())
                    raise CalibrationError(f"{self._url}{path}: status {answer.status}: {why}")
                return await answer.json()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            why = one_line(f"{type(error).__name__}: {error}")
            raise CalibrationError(f"{self._url}{path}: no answer: {why}; is an engine there?") from error


def open_session() -> aiohttp.ClientSession:
    """Return a session for `HttpProbedEngine`, to be closed by the caller."""
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PROBE_SECONDS))
