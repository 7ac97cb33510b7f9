"""The one client of an engine: SGLang's native HTTP API, spoken by SGLang and by our CPU engine.

Learned the hard way (facts, engines A.4-A.7): request ids must not be prefixes of one another, since an
abort matches by prefix; a token id outside the vocabulary kills the server; `/model_info` alone answers at
once also while paused; an aborted request is a 200 with what it has so far.
"""

import asyncio
import json
import logging
import uuid
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from asyncrl_runtime.contract.messages import PolicyVersion, VersionSpan

log = logging.getLogger(__name__)

PROBE_SECONDS = 5.0
STREAM_INTERVAL_TOKENS = 16


class EngineLost(Exception):
    """The engine died, hangs, or was told to stop: nothing wrong with the request. Try elsewhere."""

    is_reported = False
    """Whether this uses up the ticket's retry budget: a kill does not."""


class EngineFailed(EngineLost):
    """The engine lives and answered with an error of its own (5xx)."""

    is_reported = True


class EngineTimeout(EngineLost):
    """The engine did not answer a control call in time: it hangs."""


class EngineAbsent(EngineLost):
    """Nobody listens there: the engine is dead, or has yet to start."""


class EngineRefused(Exception):
    """The engine answered that this request can never work."""


class EngineLacks(EngineRefused):
    """The engine does not know this endpoint (404): it is of another line."""


@dataclass(frozen=True)
class SamplingRequest:
    """One sequence to be continued."""

    input_ids: Sequence[int]
    max_new_tokens: int
    temperature: float
    """0 is greedy."""
    seed: int
    """Of this turn; the engine derives the noise of a token from it and the token's absolute position."""


@dataclass(frozen=True)
class Generation:
    """What an engine sampled, and what it attests of it."""

    output_ids: list[int]
    logprobs: list[float]
    spans: tuple[VersionSpan, ...]
    finish_reason: str
    """`stop`, `length`, or `abort` for one that was broken off by request."""

    def followed_by(self, more: "Generation") -> "Generation":
        """Return both as one."""
        shift = len(self.output_ids)
        later = (VersionSpan(s.attempt, s.version, s.end + shift) for s in more.spans)
        return Generation(
            [*self.output_ids, *more.output_ids],
            [*self.logprobs, *more.logprobs],
            merge_spans([*self.spans, *later]),
            more.finish_reason,
        )


def merge_spans(spans: Sequence[VersionSpan]) -> tuple[VersionSpan, ...]:
    """Join neighbors of one version and drop empty spans."""
    merged: list[VersionSpan] = []
    for span in spans:
        if span.end <= (merged[-1].end if merged else 0):
            continue
        if merged and merged[-1].policy_version == span.policy_version:
            merged.pop()
        merged.append(span)
    return tuple(merged)


class BrokenStream(EngineLost):
    """The engine went away in mid answer; `earned` is what can be kept of it, finish reason `abort`."""

    def __init__(self, cause: EngineLost, earned: Generation) -> None:
        super().__init__(str(cause))
        self.is_reported = cause.is_reported
        self.earned = earned


@dataclass
class WeightsSeen:
    """What the worker itself saw of its engine's weights; whoever drives the updates keeps it."""

    version: PolicyVersion | None = None
    num_updates_begun: int = 0
    num_updates_completed: int = 0


class EngineClient:
    """Talks to one engine over loopback.

    Args:
        samples_with_adapters: each version is an adapter that is called like it, so every request names one.
    """

    def __init__(self, base_url: str, vocab_size: int, *, samples_with_adapters: bool = False) -> None:
        self.base_url = base_url
        self._samples_with_adapters = samples_with_adapters
        self.weights = WeightsSeen()
        self.is_in_doubt = False
        """A request has failed, and the engine has not answered a probe since: it may be gone."""
        self.num_requests = 0
        """In flight: asked for tokens and not answered yet."""
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
        """End every request in flight with EngineLost; the engine is hung or gone."""
        self._lost.set()
        self._lost = asyncio.Event()

    async def generate(
        self, requests: Sequence[SamplingRequest], *, cache_salt: str | None = None
    ) -> list[Generation]:
        """Sample continuations of several sequences in one HTTP request.

        Raises:
            EngineLost: no complete answer came.
            EngineRefused: a request can never work; the message is the engine's.
        """
        adapter = self._adapter
        body = self._body(requests, cache_salt, adapter)
        response = await self._until_lost(self._http.post("/generate", json=body))
        earned = [_generation(answer, adapter) for answer in self._checked(response).json()]
        if not self._has_moved_on(adapter):
            return earned
        pairs = zip(requests, earned, strict=True)
        try:
            return list(await asyncio.gather(*(self._go_on(request, each) for request, each in pairs)))
        except BrokenStream as error:  # what one has earned is not for the others
            raise (EngineFailed if error.is_reported else EngineLost)(str(error)) from error

    async def stream(self, request: SamplingRequest, *, cache_salt: str | None = None) -> Generation:
        """Sample one continuation, receiving it in pieces, so that little is lost with the engine.

        Raises:
            BrokenStream: the engine went away in mid answer.
            EngineLost: the engine failed at it, or attests weights that are not this job's: nothing is kept.
            EngineRefused: the request can never work.
        """
        adapter = self._adapter
        answer = _StreamedAnswer(self.weights, adapter)
        try:
            await self._until_lost(self._receive(self._single_body(request, cache_salt, adapter), answer))
            if not answer.is_whole:
                raise EngineLost(f"{self.base_url}: the stream ended without an end")
        except EngineLost as error:
            if not answer.is_whole:  # else nothing was lost: going on would sample behind the answer's end
                raise BrokenStream(error, answer.earned()) from error
        earned = _generation(answer.last, adapter)
        return await self._go_on(request, earned) if self._has_moved_on(adapter) else earned

    @property
    def _adapter(self) -> PolicyVersion | None:
        """Whose tokens an answer to a request of now has; None where the engine itself attests that.

        Raises:
            EngineLost: adapters are sampled with, and the engine has none.
        """
        if self._samples_with_adapters and self.weights.version is None:
            raise EngineLost(f"{self.base_url}: the engine has no adapter yet")
        return self.weights.version if self._samples_with_adapters else None

    def _has_moved_on(self, adapter: PolicyVersion | None) -> bool:
        return adapter is not None and adapter != self.weights.version

    async def _go_on(self, request: SamplingRequest, earned: Generation) -> Generation:
        """Finish under a newer adapter what was broken off for its sake."""
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
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise EngineRefused(str(chunk["error"].get("message", chunk["error"])))
                answer.take(chunk)

    async def abort_all(self) -> None:
        """Break off every request: each is answered with what it has."""
        await self.call("/abort_request", {"abort_all": True})

    async def model_info(self) -> dict[str, Any]:
        """The engine's description, `weight_version` among it; answers at once also while paused.

        Raises:
            EngineLost: no answer within PROBE_SECONDS.
        """
        info = await self.get("/model_info", PROBE_SECONDS)
        self.is_in_doubt = False
        return info

    async def num_ranks(self) -> int:
        """How many members the engine is in a weight group: its tensor-parallel size.

        Raises:
            EngineLost: no answer within PROBE_SECONDS.
        """
        return int((await self.get("/server_info", PROBE_SECONDS))["tp_size"])

    async def metrics(self) -> str:
        """The engine's metrics in Prometheus' text format."""
        return (await self._control(self._http.get("/metrics"), "/metrics", PROBE_SECONDS)).text

    async def get(self, path: str, timeout_seconds: float) -> dict[str, Any]:
        response = await self._control(self._http.get(path), path, timeout_seconds)
        result: dict[str, Any] = response.json()
        return result

    async def call(
        self, path: str, body: dict[str, Any], timeout_seconds: float = PROBE_SECONDS
    ) -> dict[str, Any]:
        """Post a control request.

        Raises:
            EngineTimeout: no answer in time.
            EngineLost: no connection, or a server error.
            EngineRefused: answered with a 4xx; the message is the engine's. EngineLacks for a 404.
        """
        response = await self._control(self._http.post(path, json=body), path, timeout_seconds)
        result: dict[str, Any] = json.loads(response.text) if response.text.startswith("{") else {}
        return result

    async def _control(
        self, operation: Awaitable[httpx.Response], path: str, timeout_seconds: float
    ) -> httpx.Response:
        try:
            return self._checked(await asyncio.wait_for(operation, timeout_seconds))
        except TimeoutError as error:
            raise EngineTimeout(f"{self.base_url}{path}: no answer in {timeout_seconds:.0f} s") from error
        except httpx.ConnectError as error:
            raise EngineAbsent(f"{self.base_url}{path}: {error}") from error
        except httpx.HTTPError as error:
            raise EngineLost(f"{self.base_url}{path}: {type(error).__name__}: {error}") from error

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
                raise EngineLost(f"{self.base_url}: given up")
            return task.result()
        except httpx.HTTPError as error:
            self.is_in_doubt = True
            raise EngineLost(f"{self.base_url}: {type(error).__name__}: {error}") from error
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
        raise EngineFailed(f"{self.base_url}: {response.status_code}: {message}")


class _StreamedAnswer:
    """A streamed answer so far: chunks are cumulative, and only the last one attests versions.

    Of a broken one, what came before the first update since the request began is of the version that the
    engine had then; what came later may be of that version or of a newer one, so it is dropped. Of an adapter
    that was named all of it is.
    """

    def __init__(self, weights: WeightsSeen, adapter: PolicyVersion | None) -> None:
        self.last: dict[str, Any] = {}
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
        self.last = chunk
        if self._updates_now() == self._updates:
            self._num_before_update = len(chunk["output_ids"])

    def earned(self) -> Generation:
        if not self.last or self._version is None:
            return Generation([], [], (), "abort")
        untouched = self._adapter is not None or self._weights.num_updates_completed == self._completed
        count = len(self.last["output_ids"]) if untouched else self._num_before_update
        span = VersionSpan(self._version.attempt, self._version.version, count)
        return Generation(
            self.last["output_ids"][:count], _logprobs(self.last)[:count], (span,) if count else (), "abort"
        )

    def _updates_now(self) -> tuple[int, int]:
        """Both counts: an update that was under way when the request began has been begun already."""
        return self._weights.num_updates_begun, self._weights.num_updates_completed


def _logprobs(answer: dict[str, Any]) -> list[float]:
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]


def _generation(answer: dict[str, Any], adapter: PolicyVersion | None) -> Generation:
    meta = answer["meta_info"]
    reason = meta["finish_reason"]
    if status := reason.get("status_code"):  # failed after its stream had begun as a 200
        raise (EngineRefused if status < 500 else EngineFailed)(f"{status}: {reason['message']}")
    if adapter is not None:
        span = VersionSpan(adapter.attempt, adapter.version, len(answer["output_ids"]))
        return Generation(answer["output_ids"], _logprobs(answer), merge_spans([span]), reason["type"])
    spans = []
    for span in meta["weight_versions"]:
        version = PolicyVersion.parse(span["version"])
        if version is None:
            raise EngineLost(f"sampled with weights that are not this job's: {span['version']!r}")
        spans.append(VersionSpan(version.attempt, version.version, span["end"]))
    return Generation(answer["output_ids"], _logprobs(answer), tuple(spans), reason["type"])
