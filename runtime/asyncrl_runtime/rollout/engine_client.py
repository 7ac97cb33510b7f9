"""An engine behind SGLang's native HTTP API, which SGLang and our CPU engine speak.

Learned by running SGLang (docs/decisions/0008-cpu-engine.md): request ids must not be prefixes of one
another, since an abort matches by prefix; a token id outside the vocabulary kills the server; only
`/model_info` answers at once even in a pause; an aborted request is a 200 with what it has so far.
"""

import asyncio
import contextlib
import json
import logging
import math
import uuid
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from asyncrl_runtime.contract.messages import JoinGroup, PolicyVersion, VersionSpan
from asyncrl_runtime.contract.refused import one_line
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
    merge_spans,
)

log = logging.getLogger(__name__)

STREAM_INTERVAL_TOKENS = 16
FINISH_REASONS = ("stop", "length", "abort")
NOT_UNDERSTOOD = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    OverflowError,
    RecursionError,
)
"""What reading an answer raises that is not of the form that it should have."""
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
        # to an engine that hangs. No connection limit: the ticket gate bounds what is in flight.
        self._http = httpx.AsyncClient(
            base_url=base_url,
            timeout=httpx.Timeout(PROBE_SECONDS, read=None, pool=None),
            trust_env=False,  # a pod's HTTP_PROXY is not meant for loopback
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=256),
        )
        self._lost = asyncio.Event()

    async def close(self) -> None:
        await self._http.aclose()

    def give_up(self) -> None:
        self._lost.set()
        self._lost = asyncio.Event()

    async def generate(
        self, requests: Sequence[SamplingRequest], *, cache_salt: str | None = None
    ) -> list[Generation]:
        adapter = self._adapter
        body = self._body(requests, cache_salt, adapter)
        response = self._checked(await self._until_lost(self._http.post("/generate", json=body)))
        with self._understanding("/generate"):
            pairs = zip(response.json(), requests, strict=True)
            earned = [
                self._earned(answer, answer["output_ids"], _logprobs(answer), adapter, request)
                for answer, request in pairs
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
        answer = _StreamedAnswer(self.weights, adapter, self._vocab_size)
        try:
            await self._until_lost(self._receive(self._single_body(request, cache_salt, adapter), answer))
            if not answer.is_whole:
                raise EngineLost(f"{self.name}: the stream ended without an end")
        except EngineLost as error:
            if (
                not answer.is_whole
            ):  # otherwise nothing was lost, and going on would sample beyond the answer's end
                raise BrokenStream(error, answer.earned()) from error
        with self._understanding("/generate"):
            earned = self._earned(answer.last, answer.output_ids, answer.logprobs, adapter, request)
        return await self._go_on(request, earned) if self._has_moved_on(adapter) else earned

    def _earned(
        self,
        answer: Any,
        output_ids: list[int],
        logprobs: list[float],
        adapter: PolicyVersion | None,
        request: SamplingRequest,
    ) -> Generation:
        """Return what an answer to a request holds; raises whatever is raised for one that makes no sense."""
        earned = _generation(answer, adapter, output_ids, logprobs)
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

    async def _receive(self, body: dict[str, Any], answer: "_StreamedAnswer") -> None:
        async with self._http.stream("POST", "/generate", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                self._checked(response)
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                with self._understanding("/generate"):
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise EngineRefused(str(chunk["error"].get("message", chunk["error"])))
                    answer.take(chunk)

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
        answer = await self._control(self._http.get("/metrics"), "/metrics", PROBE_SECONDS)
        with self._understanding("/metrics"):
            return parse_load(answer.text)

    async def take_over(self) -> None:
        self._has_sessions = True
        await self.abort_all()
        with contextlib.suppress(EngineRefused):  # no update was open
            await self.call("/end_weight_update", {}, PROBE_SECONDS)

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
        response = await self._control(self._http.get(path), path, timeout_seconds)
        with self._understanding(path):
            result: dict[str, Any] = response.json()
        return result

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
        response = await self._control(self._http.post(path, json=body), path, timeout_seconds)
        with self._understanding(path):
            result: dict[str, Any] = json.loads(response.text) if response.text.startswith("{") else {}
        if result.get("success") is False:
            raise EngineRefused(f"{path}: {result.get('message')}")
        return result

    async def _control(
        self, operation: Awaitable[httpx.Response], path: str, timeout_seconds: float
    ) -> httpx.Response:
        try:
            return self._checked(await asyncio.wait_for(operation, timeout_seconds))
        except TimeoutError as error:
            raise EngineTimeout(f"{self.name}{path}: no answer in {timeout_seconds:.0f} s") from error
        except httpx.ConnectError as error:
            raise EngineAbsent(f"{self.name}{path}: {error}") from error
        except httpx.HTTPError as error:
            raise EngineLost(f"{self.name}{path}: {type(error).__name__}: {error}") from error

    def _body(
        self, requests: Sequence[SamplingRequest], cache_salt: str | None, adapter: PolicyVersion | None
    ) -> dict[str, Any]:
        for request in requests:
            for token in request.input_ids:
                if not 0 <= token < self._vocab_size:
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

    async def _until_lost(self, operation: Any) -> Any:
        """Await an HTTP operation, but no longer than the engine is believed to live."""
        task = asyncio.ensure_future(operation)
        lost = asyncio.ensure_future(self._lost.wait())
        self.num_requests += 1
        try:
            await asyncio.wait({task, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise EngineLost(f"{self.name}: given up")
            return task.result()
        except httpx.HTTPError as error:
            self.is_in_doubt = True
            raise EngineLost(f"{self.name}: {type(error).__name__}: {error}") from error
        finally:
            self.num_requests -= 1
            lost.cancel()
            task.cancel()

    def _checked(self, response: httpx.Response) -> httpx.Response:
        if response.status_code == 200:
            return response
        message = response.text[:500]
        if 400 <= response.status_code < 500:
            refusal = EngineLacks if response.status_code == 404 else EngineRefused
            raise refusal(f"{response.request.url.path}: {message}")
        raise EngineFailed(f"{self.name}: {response.status_code}: {message}")


class _StreamedAnswer:
    """A streamed answer so far: each chunk holds what is new, and only the last one attests versions.

    A server may be told to repeat everything in each chunk, so how much of one is new follows from its count.

    In a broken answer, what came before the first update since the request began is from the version that the
    engine had then; what came later may be from that version or a newer one, so it is dropped. If the request
    named an adapter, all of it is from that adapter.
    """

    def __init__(self, weights: WeightsSeen, adapter: PolicyVersion | None, vocab_size: int) -> None:
        self.last: dict[str, Any] = {}
        self.output_ids: list[int] = []
        self.logprobs: list[float] = []
        self._vocab_size = vocab_size
        self._weights = weights
        self._adapter = adapter
        self._version = weights.version
        self._completed = weights.num_updates_completed
        self._updates = self._updates_now()
        self._num_before_update = 0

    @property
    def is_whole(self) -> bool:
        return bool(self.last and self.last["meta_info"].get("finish_reason"))

    def take(self, chunk: dict[str, Any]) -> None:
        """Take the next chunk; one that makes no sense raises something and leaves the answer as it was.

        Raises:
            EngineLost: tokens are missing between the chunks.
        """
        ids, logprobs, meta = chunk["output_ids"], _logprobs(chunk), chunk["meta_info"]
        meta.get("finish_reason")
        num_new = meta["completion_tokens"] - len(self.output_ids)
        if num_new < 0 or len(logprobs) != len(ids):
            raise ValueError(f"{num_new} new tokens, {len(ids)} ids and {len(logprobs)} log-probs in a chunk")
        if num_new > len(ids):
            raise EngineLost(f"{num_new - len(ids)} tokens of a stream are missing")
        self.output_ids += ids[len(ids) - num_new :]
        self.logprobs += logprobs[len(ids) - num_new :]
        self.last = chunk
        if self._updates_now() == self._updates:
            self._num_before_update = len(self.output_ids)

    def earned(self) -> Generation:
        if not self.last or self._version is None:
            return Generation([], [], (), "abort")
        untouched = self._adapter is not None or self._weights.num_updates_completed == self._completed
        count = len(self.output_ids) if untouched else self._num_before_update
        span = VersionSpan(self._version.attempt, self._version.version, count)
        try:
            ids, logprobs = self.output_ids[:count], self.logprobs[:count]
            earned = Generation(ids, logprobs, (span,) if count else (), "abort")
            check_generation(earned, self._vocab_size, len(ids))
        except NOT_UNDERSTOOD:
            return Generation([], [], (), "abort")
        return earned

    def _updates_now(self) -> tuple[int, int]:
        """Return both counts, since an update may have been under way already when the request began."""
        return self._weights.num_updates_begun, self._weights.num_updates_completed


def _logprobs(answer: dict[str, Any]) -> list[float]:
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]


def _generation(
    answer: dict[str, Any], adapter: PolicyVersion | None, output_ids: list[int], logprobs: list[float]
) -> Generation:
    """Return what an answer, or the last chunk of a streamed one, says of these tokens."""
    meta = answer["meta_info"]
    reason = meta["finish_reason"]
    if status := reason.get("status_code"):  # it failed after its stream had begun as a 200
        raise (EngineRefused if status < 500 else EngineFailed)(f"{status}: {reason['message']}")
    if adapter is not None:
        span = VersionSpan(adapter.attempt, adapter.version, len(output_ids))
        return Generation(output_ids, logprobs, merge_spans([span]), reason["type"])
    spans = []
    for span in meta["weight_versions"]:
        version = PolicyVersion.parse(span["version"])
        if version is None:
            raise EngineLost(f"sampled with weights that are not this job's: {span['version']!r}")
        spans.append(VersionSpan(version.attempt, version.version, span["end"]))
    return Generation(output_ids, logprobs, tuple(spans), reason["type"])


def check_generation(generation: Generation, vocab_size: int, max_new_tokens: int) -> None:
    """Raise ValueError unless an answer can be that of the model to a request for so many tokens."""
    ids, spans = generation.output_ids, generation.spans
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise ValueError(f"token ids outside the vocabulary of {vocab_size}")
    if len(ids) > max_new_tokens or len(generation.logprobs) != len(ids):
        raise ValueError(
            f"{len(ids)} tokens and {len(generation.logprobs)} log-probs; asked for: {max_new_tokens} tokens"
        )
    ends = [span.end for span in spans]
    if not all(type(end) is int for end in ends) or sorted(ends) != ends or (ids and ends[-1:] != [len(ids)]):
        raise ValueError(f"versions up to {ends}, and {len(ids)} tokens")
    if ends and not 0 <= ends[0] <= ends[-1] <= len(ids):
        raise ValueError(f"versions up to {ends}, and {len(ids)} tokens")
    if generation.finish_reason not in FINISH_REASONS:
        raise ValueError(f"the finish reason {generation.finish_reason!r}")


def parse_load(text: str) -> EngineLoad:
    """Return the load from SGLang's metrics; label sets (ranks) are summed, and the largest usage counts."""
    values: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values.setdefault(sample.name.removeprefix("sglang:"), []).append(sample.value)

    def total(name: str) -> int:
        return int(sum(value for value in values.get(name, []) if math.isfinite(value)))

    return EngineLoad(
        kv_usage=max((value for value in values.get("token_usage", []) if math.isfinite(value)), default=0.0),
        num_queued=total("num_queue_reqs"),
        num_retracted=total("num_retracted_requests_total"),
        num_generated_tokens=total("generation_tokens_total"),
        num_used_tokens=total("num_used_tokens"),
    )
