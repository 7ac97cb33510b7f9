"""Emulated engines behind SGLang's native HTTP API: the command `asyncrl-runtime emulated-engine`.

One process poses as many: `/e/<number>/generate` and so on, and the first one at the root as well. A stream
is one chunk, the answer; what SGLang sends before is of use only if an engine dies.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route

from asyncrl_api.processes import bind
from asyncrl_api.run_config import RunConfig
from asyncrl_runtime.emulation.device import DeviceModel, device_model_of
from asyncrl_runtime.emulation.emulated_group import bucket_bytes, transfer_seconds
from asyncrl_runtime.emulation.emulated_server import EmulatedAnswer, EmulatedRequest, EmulatedServer, Pace
from asyncrl_runtime.http_server import serve_until_stopped
from asyncrl_runtime.model.source import ensure_model, vocab_size

SGLANG_VERSION = "0.5.21"
"""The version of SGLang whose protocol this is; clients adapt to it."""
LABELS = '{model_name="emulated"}'
"""The labels of every metric; SGLang's have some too."""


class MalformedRequest(Exception):
    """A request that can never work."""


class EmulatedApp:
    """The endpoints of one engine."""

    def __init__(self, model: DeviceModel, pace: Pace, vocabulary_size: int, context_length: int) -> None:
        self.server = EmulatedServer(model, pace, vocabulary_size)
        self._model = model
        self._pace = pace
        self._vocabulary_size = vocabulary_size
        self._context_length = context_length
        self._is_updating = False
        self._groups: set[str] = set()

    def routes(self) -> list[Route]:
        posted: dict[str, Callable[[dict[str, Any]], Awaitable[Any]]] = {
            "/pause_generation": self._pause,
            "/continue_generation": self._continue,
            "/init_weights_update_group": self._join,
            "/destroy_weights_update_group": self._leave,
            "/begin_weight_update": self._begin,
            "/update_weights_from_distributed": self._receive,
            "/end_weight_update": self._end,
            "/update_weights_from_disk": self._load,
            "/update_weight_version": self._label,
            "/weights_checker": self._check,
        }
        return [
            Route("/generate", self._generate, methods=["POST"]),
            *(Route(path, _answering(handler), methods=["POST"]) for path, handler in posted.items()),
            Route("/abort_request", self._abort, methods=["POST"]),
            Route("/flush_cache", self._flush, methods=["GET", "POST"]),
            Route("/health", self._health),
            Route("/model_info", self._model_info),
            Route("/server_info", self._server_info),
            Route("/metrics", self._metrics),
        ]

    # -- sampling

    async def _generate(self, request: Request) -> Response:
        body = _parsed(await request.body())
        try:
            is_single = isinstance(body["input_ids"][0], int)
            prompts = [body["input_ids"]] if is_single else body["input_ids"]
            rids = _for_each(body.get("rid") or [uuid.uuid4().hex for _ in prompts], len(prompts))
            settings = zip(rids, prompts, _for_each(body["sampling_params"], len(prompts)), strict=True)
            asked = [(rid, self._asked(ids, params)) for rid, ids, params in settings]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise MalformedRequest(f"{type(error).__name__}: {error}") from error
        answers = await _unless_gone(request, [self._answer(rid, each) for rid, each in asked])
        if answers is None:
            return Response(status_code=499)
        if body.get("stream"):
            chunk = msgspec.json.encode(answers[0])
            return Response(b"data: " + chunk + b"\n\ndata: [DONE]\n\n", media_type="text/event-stream")
        content = msgspec.json.encode(answers[0] if is_single else answers)
        return Response(content, media_type="application/json")

    def _asked(self, input_ids: list[int], params: dict[str, Any]) -> EmulatedRequest:
        bound, seed = params["max_new_tokens"], params.get("sampling_seed", 0)
        if not input_ids or not all(0 <= token < self._vocabulary_size for token in input_ids):
            raise ValueError(f"input_ids must be from 0 to {self._vocabulary_size - 1}, and not empty")
        if len(input_ids) >= self._context_length:
            raise ValueError(
                f"input_ids are {len(input_ids)} tokens, and the context length is {self._context_length}"
            )
        if not (isinstance(bound, int) and bound >= 1 and isinstance(seed, int) and seed >= 0):
            raise ValueError(f"max_new_tokens is {bound} and sampling_seed is {seed}")
        return EmulatedRequest(input_ids, bound, seed, bool(params.get("ignore_eos")))

    async def _answer(self, rid: str, asked: EmulatedRequest) -> dict[str, Any]:
        return _wire(rid, asked, await self.server.sample(asked), self.server.label)

    # -- control

    async def _abort(self, request: Request) -> Response:
        if _parsed(await request.body()).get("abort_all"):
            self.server.abort_all()
        return Response(status_code=200)

    async def _flush(self, _: Request) -> Response:
        if self.server.flush():
            return PlainTextResponse("Cache flushed.\n")
        return PlainTextResponse("Flush cache failed.\n", status_code=400)

    async def _pause(self, body: dict[str, Any]) -> Any:
        mode = body.get("mode", "abort")
        if mode == "abort":
            self.server.abort_all()
        self.server.pause(retract=mode == "retract")
        return {"status": "ok"}

    async def _continue(self, body: dict[str, Any]) -> Any:
        self.server.resume()
        return {"status": "ok"}

    async def _join(self, body: dict[str, Any]) -> Any:
        await self._pace.sleep(self._model.weights.join_seconds)
        self._groups.add(body["group_name"])
        return {"success": True, "message": "Succeeded to initialize custom process group."}

    async def _leave(self, body: dict[str, Any]) -> Any:
        if body["group_name"] not in self._groups:
            raise MalformedRequest(f"this engine is in no group {body['group_name']}")
        self._groups.remove(body["group_name"])
        return {"success": True, "message": "left"}

    async def _begin(self, body: dict[str, Any]) -> Any:
        if self._is_updating:
            raise MalformedRequest("an update is open already")
        self._is_updating = True
        return {"success": True, "message": "begun"}

    async def _receive(self, body: dict[str, Any]) -> Any:
        if not self._is_updating:
            raise MalformedRequest("no update is open")
        if body["group_name"] not in self._groups:
            raise MalformedRequest(f"this engine is in no group {body['group_name']}")
        num_bytes = bucket_bytes(body["shapes"], body["dtypes"])
        await self._pace.sleep(transfer_seconds(self._model, num_bytes))
        if label := body.get("weight_version"):
            self.server.set_label(label)
        return {"success": True, "message": "received"}

    async def _end(self, body: dict[str, Any]) -> Any:
        if not self._is_updating:
            raise MalformedRequest("no update is open")
        self._is_updating = False
        return {"success": True, "message": "ended"}

    async def _load(self, body: dict[str, Any]) -> Any:
        """Take as long as a transfer of all weights; there are none, so the folder is not looked at."""
        await self._pace.sleep(transfer_seconds(self._model, self._model.weights.num_bytes))
        if label := body.get("weight_version"):
            self.server.set_label(label)
        return {"success": True, "message": "loaded"}

    async def _label(self, body: dict[str, Any]) -> Any:
        if body.get("abort_all_requests", True):
            self.server.abort_all()
        self.server.set_label(body["new_version"])
        return {"success": True, "message": "labelled", "new_version": body["new_version"]}

    async def _check(self, body: dict[str, Any]) -> Any:
        """Engines with the same label have the same weights: none."""
        return {"success": True, "per_engine_checksum": self.server.label}

    # -- health

    async def _health(self, _: Request) -> Response:
        return Response(status_code=200)

    async def _model_info(self, _: Request) -> Response:
        return JSONResponse({"weight_version": self.server.label, "is_generation": True})

    async def _server_info(self, _: Request) -> Response:
        engine = self._model.engine
        return JSONResponse(
            {
                "tp_size": engine.gpus,
                "version": SGLANG_VERSION,
                "engine": "emulated",
                "context_length": self._context_length,
                "max_total_num_tokens": engine.kv_tokens,
                "internal_states": [{"effective_max_running_requests_per_dp": engine.max_running}],
            }
        )

    async def _metrics(self, _: Request) -> Response:
        server, totals = self.server, self.server.totals
        gauges = {
            "num_running_reqs": server.num_running,
            "num_queue_reqs": server.num_queued,
            "num_used_tokens": server.num_used_tokens,
            "token_usage": server.kv_usage,
        }
        counters = {
            "generation_tokens": server.num_generated_tokens,
            "num_retracted_requests": totals.retractions,
            "num_requests": totals.finished,
        }
        lines = [
            f"# TYPE sglang:{name} gauge\nsglang:{name}{LABELS} {value}\n" for name, value in gauges.items()
        ]
        lines += [
            f"# TYPE sglang:{name} counter\nsglang:{name}_total{LABELS} {value}\n"
            for name, value in counters.items()
        ]
        return PlainTextResponse("".join(lines))


def _for_each(value: Any, count: int) -> list[Any]:
    """Return one value for each prompt of a request, which may give one for all."""
    return value if isinstance(value, list) else [value] * count


def _wire(rid: str, asked: EmulatedRequest, answer: EmulatedAnswer, label: str) -> dict[str, Any]:
    """Return an answer as SGLang writes it."""
    starts = [0, *(end for _, end in answer.spans)]
    spans = [
        {"version": version, "start": start, "end": end}
        for start, (version, end) in zip(starts, answer.spans, strict=False)
    ]
    reason: dict[str, Any] = {"type": answer.finish_reason}
    if answer.finish_reason == "length":
        reason["length"] = asked.max_new_tokens
    meta = {
        "id": rid,
        "finish_reason": reason,
        "prompt_tokens": len(asked.input_ids),
        "completion_tokens": len(answer.output_ids),
        "num_retractions": answer.num_retractions,
        "weight_version": label,
        "weight_versions": spans,
        "output_token_logprobs": [[answer.logprob, token, None] for token in answer.output_ids],
    }
    return {"text": "", "output_ids": answer.output_ids, "meta_info": meta}


async def _unless_gone(
    request: Request, answers: list[Awaitable[dict[str, Any]]]
) -> list[dict[str, Any]] | None:
    """Return all answers; None if whoever asked has left, who takes the requests with him."""
    gathered = asyncio.ensure_future(_all(answers))
    # After the body, only a disconnection is left to come.
    gone: asyncio.Future[Any] = asyncio.ensure_future(_received(request))
    try:
        await asyncio.wait({gathered, gone}, return_when=asyncio.FIRST_COMPLETED)
        return gathered.result() if gathered.done() else None
    finally:
        gone.cancel()
        gathered.cancel()


async def _all(answers: list[Awaitable[dict[str, Any]]]) -> list[dict[str, Any]]:
    return list(await asyncio.gather(*answers))


async def _received(request: Request) -> Any:
    return await request.receive()


def _answering(
    handler: Callable[[dict[str, Any]], Awaitable[Any]],
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return JSONResponse(await handler(_parsed(await request.body())))
        except MalformedRequest as error:
            message = str(error)
        except (KeyError, TypeError) as error:
            message = f"{type(error).__name__}: {error}"
        return JSONResponse({"success": False, "message": message}, status_code=400)

    return endpoint


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(body or b"{}", type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise MalformedRequest(str(error)) from error


async def _refuse(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": {"message": str(error)}}, status_code=400)


def make_app(
    model: DeviceModel, pace: Pace, vocabulary_size: int, context_length: int, count: int
) -> Starlette:
    """Return an application with `count` engines; belongs to one event loop.

    Args:
        context_length: the number of tokens from which a prompt is refused.
    """
    engines = [EmulatedApp(model, pace, vocabulary_size, context_length) for _ in range(count)]
    mounts = [Mount(f"/e/{number}", routes=engine.routes()) for number, engine in enumerate(engines)]
    return Starlette(routes=[*mounts, *engines[0].routes()], exception_handlers={MalformedRequest: _refuse})


def run_emulated_engines(config: RunConfig, host: str, port: int, count: int) -> None:
    """Serve emulated engines until SIGTERM.

    Raises:
        ExitError: the port is taken, or the device model cannot be used.
    """
    spec = config.spec
    listener = bind(host, port, "engine", "--host and --port")
    model = device_model_of(spec.emulation)
    folder = ensure_model(spec.model, config.model_cache, spec.training.seed)
    pace = Pace(time.monotonic, spec.emulation.speedup)
    app = make_app(model, pace, vocab_size(folder), spec.model.context_length, count)
    asyncio.run(serve_until_stopped(app, listener, "emulated engines serve"))
