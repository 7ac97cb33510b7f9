"""An engine behind SGLang's native HTTP API, which SGLang and our CPU engine speak.

Learned by running SGLang (docs/decisions/0008-cpu-engine.md): request ids must not be prefixes of one
another, since an abort matches by prefix; a token id outside the vocabulary kills the server; only
`/model_info` answers at once even in a pause; an aborted request is a 200 with what it has so far.
"""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import aiohttp
import msgspec

from asyncrl_runtime.contract.messages import JoinGroup, PolicyVersion
from asyncrl_runtime.contract.refused import one_line
from asyncrl_runtime.rollout.engine_answers import (
    NOT_UNDERSTOOD,
    MetaInfo,
    StreamedAnswer,
    check_generation,
    decode_answers,
    generation,
    outside,
    parse_load,
)
from asyncrl_runtime.rollout.engine_api import (
    CHECKSUM_SECONDS,
    CONTROL_SECONDS,
    PROBE_SECONDS,
    BrokenStream,
    EngineAbsent,
    EngineFailed,
    EngineLoad,
    EngineLost,
    EngineRefused,
    EngineTimeout,
    Generation,
    IncomingBucket,
    SamplingRequest,
    WeightsSeen,
)

log = logging.getLogger(__name__)

STREAM_INTERVAL_TOKENS = 16
KEEP_ALIVE_SECONDS = 2.0
"""How long an idle connection is kept: less than the 5 s after which uvicorn closes one, perhaps just as the
next request is sent."""
T = TypeVar("T")
PAUSE_MODES = {"Retract": "retract", "InPlace": "in_place", "Drain": "retract"}


class EngineLacks(EngineRefused):
    """The engine does not have this endpoint (404), so it is of another version."""


class EngineClient:
    """Talks to one engine over loopback; see `engine_api.Engine` for what its calls mean.

    Args:
        samples_with_adapters: whether each version is an adapter named after it, so that every request names
            one.
    """

    def __init__(self, base_url: str, vocab_size: int, *, samples_with_adapters: bool = False) -> None:
        self.name = base_url
        self._samples_with_adapters = samples_with_adapters
        self.weights = WeightsSeen()
        self.is_in_doubt = False
        self.num_requests = 0
        self._has_sessions = True
        """Whether the engine has endpoints around an update; SGLang up to 0.5.20 has none and takes
        buckets at any time."""
        self._vocab_size = vocab_size
        # No read timeout: a long answer takes as long as it takes, and the worker's monitor ends requests
        # to an engine that hangs. No connection limit: the ticket gate bounds what is in flight. No proxy of
        # the environment, which is not meant for loopback, and no compression, which holds streams up.
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=PROBE_SECONDS),
        )
        self._lost = asyncio.Event()

    async def close(self) -> None:
        await self._http.close()

    def give_up(self) -> None:
        self._lost.set()
        self._lost = asyncio.Event()

    async def generate(
        self, requests: Sequence[SamplingRequest], *, cache_salt: str | None = None
    ) -> list[Generation]:
        adapter = self._adapter
        body = self._body(requests, cache_salt, adapter)
        content = await self._until_lost(self._fetch("POST", "/generate", body))
        with self._understanding("/generate"):
            earned = [
                self._earned(answer.meta_info, answer.output_ids, adapter, request)
                for answer, request in zip(decode_answers(content), requests, strict=True)
            ]
        if not self._has_moved_on(adapter):
            return earned
        both = zip(requests, earned, strict=True)
        try:
            return list(await asyncio.gather(*(self._go_on(request, each) for request, each in both)))
        except BrokenStream as error:  # what one request has earned is not the others'
            raise (EngineFailed if error.is_reported else EngineLost)(str(error)) from error

    async def stream(self, request: SamplingRequest, *, cache_salt: str | None = None) -> Generation:
        adapter = self._adapter
        answer = StreamedAnswer(self.weights, adapter, self._vocab_size)
        try:
            body = self._single_body(request, cache_salt, adapter)
            await self._until_lost(self._receive("/generate", body, answer.take))
            if not answer.is_whole:
                raise EngineLost(f"{self.name}: the stream ended without an end")
        except EngineLost as error:
            if (
                not answer.is_whole
            ):  # otherwise nothing was lost, and going on would sample beyond the answer's end
                raise BrokenStream(error, answer.earned()) from error
        with self._understanding("/generate"):
            earned = answer.whole()
            check_generation(earned, self._vocab_size, request.max_new_tokens)
        return await self._go_on(request, earned) if self._has_moved_on(adapter) else earned

    def _earned(
        self, meta: MetaInfo, output_ids: list[int], adapter: PolicyVersion | None, request: SamplingRequest
    ) -> Generation:
        """Return what an answer to a request holds; raises whatever is raised for one that makes no sense."""
        earned = generation(meta, adapter, output_ids, meta.logprobs)
        check_generation(earned, self._vocab_size, request.max_new_tokens)
        return earned

    @contextlib.contextmanager
    def _understanding(self, path: str) -> Iterator[None]:
        """Read an answer; what is raised because it makes no sense is a failure of the engine.

        Raises:
            EngineFailed: the answer is not understood.
        """
        try:
            yield
        except NOT_UNDERSTOOD as error:
            why = one_line(f"{type(error).__name__}: {error}")
            raise EngineFailed(f"{self.name}{path}: the answer is not understood: {why}") from error

    @property
    def _adapter(self) -> PolicyVersion | None:
        """The adapter that a request made now is answered with; None if the engine itself attests versions.

        Raises:
            EngineLost: the job samples with adapters, and the engine has none yet.
        """
        if self._samples_with_adapters and self.weights.version is None:
            raise EngineLost(f"{self.name}: the engine has no adapter yet")
        return self.weights.version if self._samples_with_adapters else None

    def _has_moved_on(self, adapter: PolicyVersion | None) -> bool:
        return adapter is not None and adapter != self.weights.version

    async def _go_on(self, request: SamplingRequest, earned: Generation) -> Generation:
        """Finish with a newer adapter what was broken off for its sake."""
        room = request.max_new_tokens - len(earned.output_ids)
        if earned.finish_reason != "abort":
            return earned
        if room <= 0:
            return replace(earned, finish_reason="length")
        ids = [*request.input_ids, *earned.output_ids]
        try:
            more = await self.stream(replace(request, input_ids=ids, max_new_tokens=room))
        except BrokenStream as error:
            raise BrokenStream(error, earned.followed_by(error.earned)) from error
        except EngineLost as error:
            raise BrokenStream(error, earned) from error
        return earned.followed_by(more)

    async def abort_all(self) -> None:
        await self.call("/abort_request", {"abort_all": True}, PROBE_SECONDS)

    # -- health

    async def label(self) -> str:
        info = await self.get("/model_info", PROBE_SECONDS)
        self.is_in_doubt = False
        with self._understanding("/model_info"):
            return str(info["weight_version"])

    async def num_ranks(self) -> int:
        info = await self.get("/server_info", PROBE_SECONDS)
        with self._understanding("/server_info"):
            return int(info["tp_size"])

    async def load(self) -> EngineLoad:
        content = await self._control("GET", "/metrics", None, PROBE_SECONDS)
        with self._understanding("/metrics"):
            return parse_load(content.decode(errors="replace"))

    async def take_over(self) -> None:
        self._has_sessions = True
        await self.abort_all()
        try:
            await self.call("/end_weight_update", {}, PROBE_SECONDS)
        except EngineLacks:
            self._has_sessions = False
        except EngineRefused as error:
            log.debug("no update was open: %s", error)

    # -- updates of all weights

    async def join_group(self, request: JoinGroup) -> None:
        body = {
            "master_address": request.host,
            "master_port": request.port,
            "rank_offset": request.rank,
            "world_size": request.world_size,
            "group_name": request.group,
            "backend": request.backend,
        }
        await self.call("/init_weights_update_group", body, request.timeout_seconds)

    async def leave_group(self, group: str) -> None:
        await self.call("/destroy_weights_update_group", {"group_name": group})

    async def pause(self, interrupt: str) -> None:
        """See the protocol.

        SGLang without sessions dies if it flushes its cache while requests are queued, and retracting puts
        running requests into the queue. There they are broken off, and go on as after the loss of an engine.
        """
        mode = PAUSE_MODES[interrupt]
        is_fragile = mode == "retract" and not self._has_sessions
        await self.call("/pause_generation", {"mode": "abort" if is_fragile else mode})

    async def begin_update(self) -> None:
        try:
            await self.call("/begin_weight_update", {"selector": "all"})
            self._has_sessions = True
        except EngineLacks:
            self._has_sessions = False

    async def receive_bucket(self, bucket: IncomingBucket, *, keeps_cache: bool) -> None:
        body = {
            "names": bucket.layout.names,
            "dtypes": bucket.layout.dtypes,
            "shapes": bucket.layout.shapes,
            "group_name": bucket.group,
            "load_format": "flattened_bucket",
            # If running requests hold the cache, a flush would be refused.
            "flush_cache": bucket.is_last and not keeps_cache,
            **({"weight_version": str(bucket.version)} if bucket.is_last else {}),
        }
        await self.call("/update_weights_from_distributed", body, bucket.timeout_seconds)

    async def end_update(self) -> None:
        if self._has_sessions:
            await self.call("/end_weight_update", {})

    async def checksum(self) -> str:
        answer = await self.call("/weights_checker", {"action": "checksum"}, CHECKSUM_SECONDS)
        with self._understanding("/weights_checker"):
            return str(answer["per_engine_checksum"])

    async def resume(self) -> None:
        await self.call("/continue_generation", {})

    async def load_folder(
        self, folder: Path, version: PolicyVersion, timeout_seconds: float, *, keeps_cache: bool
    ) -> None:
        body = {"model_path": str(folder), "weight_version": str(version), "flush_cache": not keeps_cache}
        await self.call("/update_weights_from_disk", body, timeout_seconds)

    # -- adapters

    async def load_adapter(self, version: PolicyVersion, folder: Path, timeout_seconds: float) -> None:
        body = {"lora_name": str(version), "lora_path": str(folder)}
        await self.call("/load_lora_adapter", body, timeout_seconds)

    async def unload_adapter(self, version: PolicyVersion) -> None:
        await self.call("/unload_lora_adapter", {"lora_name": str(version)})

    async def set_label(self, version: PolicyVersion, *, aborts: bool) -> None:
        body = {"new_version": str(version), "abort_all_requests": aborts}
        await self.call("/update_weight_version", body)

    # -- HTTP

    async def get(self, path: str, timeout_seconds: float) -> dict[str, Any]:
        content = await self._control("GET", path, None, timeout_seconds)
        with self._understanding(path):
            return msgspec.json.decode(content, type=dict[str, Any])

    async def call(
        self, path: str, body: dict[str, Any], timeout_seconds: float = CONTROL_SECONDS
    ) -> dict[str, Any]:
        """Post a control request.

        Raises:
            EngineTimeout: there was no answer in time.
            EngineLost: there was no connection, or a server error.
            EngineRefused: the engine answered with a 4xx, or reported no success; the message is the
                engine's. A 404 is EngineLacks.
        """
        content = await self._control("POST", path, body, timeout_seconds)
        with self._understanding(path):
            is_object = content.startswith(b"{")
            result = msgspec.json.decode(content, type=dict[str, Any]) if is_object else {}
        if result.get("success") is False:
            raise EngineRefused(f"{path}: {result.get('message')}")
        return result

    async def _control(
        self, method: str, path: str, body: dict[str, Any] | None, timeout_seconds: float
    ) -> bytes:
        try:
            return await asyncio.wait_for(self._fetch(method, path, body), timeout_seconds)
        except TimeoutError as error:
            raise EngineTimeout(f"{self.name}{path}: no answer in {timeout_seconds:.0f} s") from error
        except aiohttp.ClientConnectorError as error:
            raise EngineAbsent(f"{self.name}{path}: {error}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise EngineLost(f"{self.name}{path}: {type(error).__name__}: {error}") from error

    async def _fetch(self, method: str, path: str, body: dict[str, Any] | None) -> bytes:
        """Return the content of a 200; raises what a client of aiohttp raises, and for any other status."""
        async with self._http.request(
            method, self.name + path, **_json(body), allow_redirects=False
        ) as response:
            content = await response.read()
            if response.status != 200:
                self._refuse(path, response.status, content)
            return content

    async def _receive(self, path: str, body: dict[str, Any], take: Callable[[bytes], None]) -> None:
        """Hand the data of each server-sent event to `take` as it comes; raises what `_fetch` raises.

        Raises:
            EngineFailed: `take` does not understand an event.
        """
        async with self._http.post(self.name + path, **_json(body), allow_redirects=False) as response:
            if response.status != 200:
                self._refuse(path, response.status, await response.read())
            rest = b""
            async for data in response.content.iter_any():
                *lines, rest = (rest + data).split(
                    b"\n"
                )  # a text may hold what Python takes for a line's end
                for line in lines:
                    if line.startswith(b"data: ") and line.rstrip() != b"data: [DONE]":
                        with self._understanding(path):
                            take(line[len(b"data: ") :])

    def _body(
        self, requests: Sequence[SamplingRequest], cache_salt: str | None, adapter: PolicyVersion | None
    ) -> dict[str, Any]:
        for request in requests:
            if (token := outside(request.input_ids, self._vocab_size)) is not None:
                raise EngineRefused(
                    f"token id {token} is outside the vocabulary of {self._vocab_size}; "
                    "is the tokenizer the model's own?"
                )
        return {
            "input_ids": [list(request.input_ids) for request in requests],
            "rid": [uuid.uuid4().hex for _ in requests],
            "sampling_params": [
                {
                    "max_new_tokens": request.max_new_tokens,
                    "temperature": request.temperature,
                    "sampling_seed": request.seed,
                }
                for request in requests
            ],
            "return_logprob": True,
            **({"cache_salt": cache_salt} if cache_salt else {}),
            **({"lora_path": str(adapter)} if adapter else {}),
        }

    def _single_body(
        self, request: SamplingRequest, cache_salt: str | None, adapter: PolicyVersion | None
    ) -> dict[str, Any]:
        body = self._body([request], cache_salt, adapter)
        lists = ("input_ids", "rid", "sampling_params")
        sampling_params = {**body["sampling_params"][0], "stream_interval": STREAM_INTERVAL_TOKENS}
        return {
            **body,
            **{name: body[name][0] for name in lists},
            "sampling_params": sampling_params,
            "stream": True,
        }

    async def _until_lost(self, operation: Awaitable[T]) -> T:
        """Await an HTTP operation, but no longer than the engine is believed to live."""
        task = asyncio.ensure_future(operation)
        lost = asyncio.ensure_future(self._lost.wait())
        self.num_requests += 1
        try:
            await asyncio.wait({task, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise EngineLost(f"{self.name}: given up")
            return task.result()
        except (aiohttp.ClientError, OSError) as error:
            self.is_in_doubt = True
            raise EngineLost(f"{self.name}: {type(error).__name__}: {error}") from error
        finally:
            self.num_requests -= 1
            lost.cancel()
            task.cancel()

    def _refuse(self, path: str, status: int, content: bytes) -> NoReturn:
        """Raise what an answer that is no 200 means."""
        message = content.decode(errors="replace")[:500]
        if 400 <= status < 500:
            raise (EngineLacks if status == 404 else EngineRefused)(f"{path}: {message}")
        raise EngineFailed(f"{self.name}: {status}: {message}")


def _json(body: dict[str, Any] | None) -> dict[str, Any]:
    """Return the arguments with which a client sends a JSON body."""
    if body is None:
        return {}
    return {"data": msgspec.json.encode(body), "headers": {"Content-Type": "application/json"}}
