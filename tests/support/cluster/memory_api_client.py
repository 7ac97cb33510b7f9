"""The client below `Api` in a test: it asks the API server in memory, and its calls can fail on the way."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import aiohttp

from support.cluster.api_calls import RefusalError, Request, copied, encoded
from support.cluster.memory_api_server import MemoryApiServer

HOST = "https://api.memory"


class MemoryStream:
    """The body of a watch: one line for each event."""

    def __init__(self, events: AsyncIterator[Any]) -> None:
        self._events = events

    async def iter_any(self) -> AsyncIterator[bytes]:
        async with aclosing(self._events) as events:  # type: ignore[type-var]  # a generator, as it happens
            async for event in events:
                yield encoded(event) + b"\n"


class MemoryResponse:
    """An answer, as `Api` reads it."""

    def __init__(self, status: int, body: bytes, content: MemoryStream | None = None) -> None:
        self.status = status
        self.headers: Mapping[str, str] = {}
        self._body = body
        self.content = content

    @classmethod
    def of(cls, refusal: RefusalError) -> "MemoryResponse":
        return cls(refusal.status, encoded(refusal.body))

    async def read(self) -> bytes:
        return self._body

    async def __aenter__(self) -> "MemoryResponse":
        return self

    async def __aexit__(self, *error: object) -> None: ...


Send = Callable[[Request], Awaitable[MemoryResponse]]


@dataclass(frozen=True)
class Answer:
    """The result of `call_api`."""

    response: MemoryResponse


async def pass_on(request: Request, send: Send) -> MemoryResponse:
    """Carry out a call, and nothing else."""
    return await send(request)


class MemoryApiClient:
    """Does for `Api` what `kubernetes.aio.ApiClient` does.

    Args:
        on_the_way: gets each call with the function that carries it out, and decides what comes of it.
    """

    def __init__(
        self,
        server: MemoryApiServer,
        on_the_way: Callable[[Request, Send], Awaitable[MemoryResponse]] = pass_on,
    ) -> None:
        self.configuration = SimpleNamespace(host=HOST)
        self._server = server
        self._on_the_way = on_the_way

    async def update_params_for_auth(self, *arguments: Any) -> None: ...

    async def call_api(
        self, verb: str, url: str, headers: Mapping[str, str], body: Any, *, _request_timeout: object
    ) -> Answer:
        """Send a call.

        Raises:
            aiohttp.ClientError: the call or its answer does not arrive.
        """
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        sent = None if body is None else copied(body)
        request = Request(verb, parts.path, query, sent, headers["Content-Type"])
        return Answer(await self._on_the_way(request, self._send))

    async def _send(self, request: Request) -> MemoryResponse:
        if request.is_watch:
            return MemoryResponse(200, b"", MemoryStream(self._server.watch(request)))
        status, body = self._server.answer(request)
        return MemoryResponse(status, encoded(body))


def broken_connection() -> aiohttp.ClientError:
    """Return what aiohttp raises when nobody answers."""
    return aiohttp.ClientConnectionError("the connection is broken")
