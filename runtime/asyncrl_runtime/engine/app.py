"""The HTTP application: `/generate`, the control endpoints, health, information and metrics."""

import asyncio
import os
import time
from collections.abc import Mapping
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from asyncrl_runtime.engine.adapter_registry import AdapterRegistry
from asyncrl_runtime.engine.control_endpoints import ControlEndpoints
from asyncrl_runtime.engine.fields import BadRequest
from asyncrl_runtime.engine.gate import Gate
from asyncrl_runtime.engine.generate_endpoint import GenerateEndpoint, ServerFault
from asyncrl_runtime.engine.prometheus import EngineMetrics
from asyncrl_runtime.engine.requests import RequestParser
from asyncrl_runtime.engine.scheduler import Scheduler
from asyncrl_runtime.engine.weight_loading import WeightLoader

SGLANG_VERSION = "0.5.21"
"""The version of SGLang whose protocol this is; clients adapt to it."""
HEALTH_POLL_SECONDS = 1.0
BOS_FOR_HEALTH = 0
"""The prompt token of a health check; every vocabulary has it."""


class EngineApp:
    """Assembles the endpoints; belongs to one event loop."""

    def __init__(self, scheduler: Scheduler, arguments: Mapping[str, Any]) -> None:
        """
        Args:
            arguments: the arguments that the server was started with, for `/server_info`.
        """
        model, limits = scheduler.model, scheduler.limits
        self._scheduler = scheduler
        self._arguments = arguments
        self._started = time.time()
        self._is_healthy = True
        self._metrics = EngineMetrics(scheduler, str(model.folder))
        self._parser = RequestParser(model, limits.context_length, limits.max_total_tokens)
        self._gate = Gate()
        adapters = AdapterRegistry(scheduler)
        self.generation = GenerateEndpoint(
            scheduler, self._parser, self._gate, adapters, self._metrics.observe
        )
        self._loader = WeightLoader(model)
        self._control = ControlEndpoints(scheduler, self._loader, self._gate, adapters, self.generation)

    def build(self) -> Starlette:
        health = self.health_generate if _flag("SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION") else self.health
        return Starlette(
            routes=[
                Route("/generate", self.generation, methods=["POST", "PUT"]),
                *self._control.routes(),
                Route("/health", health),
                Route("/health_generate", self.health_generate),
                Route("/ready", self.ready),
                Route("/model_info", self.model_info),
                Route("/get_model_info", self.model_info),
                Route("/server_info", self.server_info),
                Route("/get_server_info", self.server_info),
                Route("/metrics", self.metrics),
            ],
            exception_handlers={BadRequest: _refuse, ServerFault: _fail},
        )

    async def health(self, _: HttpRequest) -> Response:
        return Response(status_code=200)

    async def health_generate(self, _: HttpRequest) -> Response:
        """Answer 200 once a token is sampled for any request; 503 if none is in time, as in a pause."""
        self._is_healthy = await self._samples_within(_seconds("SGLANG_HEALTH_CHECK_TIMEOUT", 20.0))
        return Response(status_code=200 if self._is_healthy else 503)

    async def ready(self, _: HttpRequest) -> Response:
        return Response(status_code=200 if self._is_healthy and not self._gate.is_paused else 503)

    async def model_info(self, _: HttpRequest) -> Response:
        """Answer at once, whatever the scheduler is doing."""
        model = self._scheduler.model
        return JSONResponse(
            {
                "model_path": self._control.model_path,
                "served_model_name": self._control.model_path,
                "tokenizer_path": str(model.folder),
                "is_generation": True,
                "weight_version": self._scheduler.version,
                "load_format": "auto",
                "model_type": model.config.model_type,
                "architectures": model.config.architectures,
                "preferred_sampling_params": None,
            }
        )

    async def server_info(self, _: HttpRequest) -> Response:
        scheduler, limits = self._scheduler, self._scheduler.limits
        state = {
            "last_gen_throughput": scheduler.throughput,
            "memory_usage": {
                "weight": _gib(sum(p.nbytes for p in scheduler.model.parameters().values())),
                "kvcache": _gib(scheduler.cache.kv.nbytes),
                "token_capacity": limits.max_total_tokens,
            },
            "effective_max_running_requests_per_dp": limits.max_running_requests,
        }
        return JSONResponse(
            {
                **self._arguments,
                "tp_size": self._loader.tp_size,
                "version": SGLANG_VERSION,
                "engine": "asyncrl",
                "startup_time": self._started,
                "weight_version": "default",  # the start-up value, as in SGLang: ask /model_info
                "max_total_num_tokens": limits.max_total_tokens,
                "internal_states": [state],
            }
        )

    async def metrics(self, _: HttpRequest) -> Response:
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def _samples_within(self, seconds: float) -> bool:
        body = {
            "input_ids": [BOS_FOR_HEALTH],
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        }
        steps_before = self._scheduler.num_steps
        deadline = asyncio.get_running_loop().time() + seconds
        probe = asyncio.ensure_future(self.generation.answer(self._parser.parse(msgspec.json.encode(body))))
        try:
            while (left := deadline - asyncio.get_running_loop().time()) > 0:
                await asyncio.wait({probe}, timeout=min(left, HEALTH_POLL_SECONDS))
                if self._scheduler.num_steps > steps_before:
                    return True
            return False
        finally:
            probe.cancel()


async def _refuse(_: HttpRequest, error: Exception) -> Response:
    return JSONResponse({"error": {"message": str(error)}}, status_code=400)


async def _fail(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ServerFault)
    return JSONResponse({"error": {"message": str(error)}}, status_code=error.status_code)


def _flag(variable: str) -> bool:
    """Read a flag from one of SGLang's environment variables, which also apply here; unset means yes."""
    return os.environ.get(variable, "1").lower() in ("1", "true", "yes", "y")


def _seconds(variable: str, default: float) -> float:
    return float(os.environ.get(variable, default))


def _gib(num_bytes: int) -> float:
    return round(num_bytes / 2**30, 4)
