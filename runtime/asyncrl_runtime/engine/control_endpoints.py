"""SGLang's control endpoints: pause, abort, cache, weights, adapters.

Their work runs on the scheduler's thread, in order.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from asyncrl_runtime.engine.adapter_registry import AdapterRegistry
from asyncrl_runtime.engine.fields import BadRequest
from asyncrl_runtime.engine.gate import Gate
from asyncrl_runtime.engine.generate_endpoint import GenerateEndpoint
from asyncrl_runtime.engine.scheduler import Scheduler
from asyncrl_runtime.engine.weight_loading import InitGroup, Tensors, WeightLoader

T = TypeVar("T")

FLUSH_POLL_SECONDS = 0.05


class Abort(msgspec.Struct, frozen=True):
    rid: str = ""
    abort_all: bool = False


class Pause(msgspec.Struct, frozen=True):
    mode: Literal["abort", "retract", "in_place"] = "abort"


class Nothing(msgspec.Struct, frozen=True):
    """A body that must be there, but from which this engine needs nothing."""


class SlowDown(msgspec.Struct, frozen=True):
    forward_sleep_time: float | None = None


class GroupName(msgspec.Struct, frozen=True):
    group_name: str = "weight_update_group"


class Folder(msgspec.Struct, frozen=True):
    """The body of `/update_weights_from_disk`."""

    model_path: str
    load_format: str | None = None
    abort_all_requests: bool = False
    weight_version: str | None = None
    is_async: bool = False
    flush_cache: bool = True


class Version(msgspec.Struct, frozen=True):
    new_version: str
    abort_all_requests: bool = True


class ParameterName(msgspec.Struct, frozen=True):
    name: str
    truncate_size: int = 100


class Check(msgspec.Struct, frozen=True):
    action: str


class NewAdapter(msgspec.Struct, frozen=True):
    """The body of `/load_lora_adapter`; `pinned` means nothing here, where no adapter is ever evicted."""

    lora_name: str
    lora_path: str


class AdapterName(msgspec.Struct, frozen=True):
    lora_name: str


class ControlEndpoints:
    """The control endpoints; belongs to one event loop."""

    def __init__(
        self,
        scheduler: Scheduler,
        loader: WeightLoader,
        gate: Gate,
        adapters: AdapterRegistry,
        generation: GenerateEndpoint,
    ) -> None:
        self._scheduler = scheduler
        self._loader = loader
        self._gate = gate
        self._adapters = adapters
        self._generation = generation
        self.model_path = str(scheduler.model.folder)
        """The folder from which weights were last loaded."""

    def routes(self) -> list[Route]:
        both = ["GET", "POST"]
        post: dict[str, Callable[[HttpRequest], Awaitable[Response]]] = {
            "/abort_request": self.abort_request,
            "/pause_generation": self.pause_generation,
            "/continue_generation": self.continue_generation,
            "/init_weights_update_group": self.init_weights_update_group,
            "/destroy_weights_update_group": self.destroy_weights_update_group,
            "/begin_weight_update": self.begin_weight_update,
            "/update_weights_from_distributed": self.update_weights_from_distributed,
            "/end_weight_update": self.end_weight_update,
            "/update_weights_from_disk": self.update_weights_from_disk,
            "/update_weight_version": self.update_weight_version,
            "/weights_checker": self.weights_checker,
            "/load_lora_adapter": self.load_lora_adapter,
            "/unload_lora_adapter": self.unload_lora_adapter,
        }
        return [
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in post.items()),
            Route("/flush_cache", self.flush_cache, methods=both),
            Route("/slow_down", self.slow_down, methods=both),
            Route("/get_weights_by_name", self.get_weights_by_name, methods=both),
        ]

    async def abort_request(self, request: HttpRequest) -> Response:
        """Abort a request and those whose ids begin with its id; an id that is not live is not an error."""
        body = await _parse(request, Abort)
        if body.abort_all:
            self._abort_all()
        elif body.rid and self._generation.is_live(body.rid):
            self._scheduler.post(lambda: self._scheduler.abort(lambda rid: rid.startswith(body.rid)))
        return Response(status_code=200)

    async def pause_generation(self, request: HttpRequest) -> Response:
        mode = (await _parse(request, Pause)).mode
        self._gate.pause()
        if mode == "abort":
            self._abort_all()
            await self._gate.wait_for_readers()
        else:
            await self._run(lambda: self._scheduler.pause(retract=mode == "retract"))
        return JSONResponse({"message": "Generation paused successfully.", "status": "ok"})

    async def continue_generation(self, request: HttpRequest) -> Response:
        await _parse(request, Nothing)
        resumed = self._run(self._scheduler.resume)
        self._gate.resume()  # the requests that it lets in come after the command
        await resumed
        return JSONResponse({"message": "Generation continued successfully.", "status": "ok"})

    async def flush_cache(self, request: HttpRequest) -> Response:
        """Flush the cache when nothing runs; wait up to `?timeout=` seconds for that."""
        try:
            timeout = float(request.query_params.get("timeout", 0))
        except ValueError as error:
            raise BadRequest(f"timeout: {error}") from error
        deadline = asyncio.get_running_loop().time() + timeout
        while not await self._run(self._scheduler.flush_cache):
            if asyncio.get_running_loop().time() >= deadline:
                return PlainTextResponse("Flush cache failed.\n", status_code=400)
            await asyncio.sleep(FLUSH_POLL_SECONDS)
        return PlainTextResponse("Cache flushed.\n")

    async def slow_down(self, request: HttpRequest) -> Response:
        body = await _parse(request, SlowDown)
        self._scheduler.forward_sleep_seconds = body.forward_sleep_time or 0.0
        return Response(status_code=200)

    async def init_weights_update_group(self, request: HttpRequest) -> Response:
        body = await _parse(request, InitGroup)
        return await _outcome(self._run(lambda: self._loader.init_group(body)))

    async def destroy_weights_update_group(self, request: HttpRequest) -> Response:
        body = await _parse(request, GroupName)
        return await _outcome(self._run(lambda: self._loader.destroy_group(body.group_name)))

    async def begin_weight_update(self, request: HttpRequest) -> Response:
        return await _outcome(self._write(self._loader.begin))

    async def end_weight_update(self, request: HttpRequest) -> Response:
        return await _outcome(self._write(self._loader.end))

    async def update_weights_from_distributed(self, request: HttpRequest) -> Response:
        body = await _parse(request, Tensors)
        return await _outcome(self._update(body, lambda: self._loader.receive(body)))

    async def update_weights_from_disk(self, request: HttpRequest) -> Response:
        body = await _parse(request, Folder)
        if body.is_async or body.load_format not in (None, "auto", "safetensors"):
            raise BadRequest("`is_async` and formats other than safetensors are not implemented here")

        async def update() -> str:
            message = await self._update(body, lambda: self._loader.load_folder(Path(body.model_path)))
            self.model_path = body.model_path
            return message

        return await _outcome(update(), num_paused_requests=0)

    async def update_weight_version(self, request: HttpRequest) -> Response:
        """Change only the label. As in SGLang, this aborts everything unless told otherwise."""
        body = await _parse(request, Version)
        if body.abort_all_requests:
            self._abort_all()
        await self._run(lambda: self._scheduler.set_version(body.new_version))
        message = f"Weight version updated to {body.new_version}"
        return JSONResponse({"success": True, "message": message, "new_version": body.new_version})

    async def get_weights_by_name(self, request: HttpRequest) -> Response:
        body = await _parse(request, ParameterName)
        return JSONResponse(await self._run(lambda: self._loader.rows_of(body.name, body.truncate_size)))

    async def weights_checker(self, request: HttpRequest) -> Response:
        """Answer with hashes, which prove whether engines hold equal weights."""
        body = await _parse(request, Check)
        if body.action != "checksum":
            raise BadRequest(f"action {body.action!r} is not implemented by this engine, only `checksum`")
        checksums = await self._run(self._loader.checksums)
        whole = hashlib.sha256(msgspec.json.encode(checksums)).hexdigest()
        parallelism = {"tp_rank": 0, "tp_size": 1, "dp_rank": 0, "dp_size": 1, "pp_rank": 0, "pp_size": 1}
        rank = {"checksums": checksums, "per_gpu_checksum": whole, "parallelism_info": parallelism}
        return JSONResponse(
            {"success": True, "message": "Success.", "ranks": [rank], "per_engine_checksum": whole}
        )

    async def load_lora_adapter(self, request: HttpRequest) -> Response:
        body = await _parse(request, NewAdapter)
        return await self._adapters_after(self._adapters.load(body.lora_name, body.lora_path))

    async def unload_lora_adapter(self, request: HttpRequest) -> Response:
        """Answer when the requests that use the adapter have ended; in a pause they do not end."""
        body = await _parse(request, AdapterName)
        return await self._adapters_after(self._adapters.unload(body.lora_name))

    async def _adapters_after(self, change: Awaitable[None]) -> Response:
        """Answer 200, or 400 with the message of the BadRequest, and with the adapters loaded after that."""
        error_message = ""
        try:
            await change
        except BadRequest as error:
            error_message = str(error)
        return JSONResponse(
            {
                "success": not error_message,
                "error_message": error_message,
                "loaded_adapters": self._adapters.loaded,
            },
            status_code=400 if error_message else 200,
        )

    def _abort_all(self) -> None:
        """Queue an abort of all requests; commands that follow find it done."""
        self._scheduler.post(lambda: self._scheduler.abort(lambda _: True))

    def _run(self, function: Callable[[], T]) -> "asyncio.Future[T]":
        """Run a function on the scheduler's thread. It is queued at once, before the result is awaited."""
        return asyncio.wrap_future(self._scheduler.call(function))

    async def _write(self, function: Callable[[], T]) -> T:
        """Run a function while nothing is sampled: in a pause, or when every running request has ended."""
        async with self._gate.writing():
            return await self._run(function)

    async def _update(self, body: Tensors | Folder, load: Callable[[], str]) -> str:
        """Load new weights; then, in the same command, flush the cache and set the label as `body` says."""

        def update() -> str:
            message = load()
            if body.flush_cache and not self._scheduler.flush_cache():
                raise BadRequest(
                    "Weights were updated, but the cache was not flushed because requests are running: "
                    "keep it with flush_cache=false, or pause with mode `retract` or `abort`."
                )
            if body.weight_version is not None:
                self._scheduler.set_version(body.weight_version)
                message += f" Weight version updated to {body.weight_version}."
            return message

        if body.abort_all_requests:
            self._abort_all()
        return await self._write(update)


async def _parse(request: HttpRequest, kind: type[T]) -> T:
    """Return the parsed body; unknown fields are ignored.

    Raises:
        BadRequest: the body is missing, is not JSON, or lacks a field.
    """
    try:
        return msgspec.json.decode(await request.body(), type=kind)
    except msgspec.DecodeError as error:  # includes msgspec.ValidationError
        raise BadRequest(f"{request.url.path}: {error}") from error


async def _outcome(message: Awaitable[str], **extra: Any) -> Response:
    """Answer 200 with the message, or 400 with the message of the BadRequest."""
    try:
        return JSONResponse({"success": True, "message": await message, **extra})
    except BadRequest as error:
        return JSONResponse({"success": False, "message": str(error), **extra}, status_code=400)
