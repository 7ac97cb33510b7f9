"""The Kubernetes API over one pool of connections: JSON in and out, and errors that say what to do next.

The official client handles connections, TLS and credentials; its typed models are not used, since they take
ten times the memory and four times the time of plain JSON.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, Literal, Protocol
from urllib.parse import urlencode

import aiohttp
import msgspec

from asyncrl_operator.resources import Json, resource_in

FIELD_MANAGER: Final = "asyncrl-operator"
VERBS: Final = {"POST": "create", "PATCH": "patch", "DELETE": "delete"}
CREATED: Final = 201
CALL_SECONDS: Final = 30.0
CONNECT_SECONDS: Final = 10.0
MAX_CALLS: Final = 16
"""The most calls at a time; each holds a connection, which takes some 300 KiB over TLS."""
WATCH_SILENCE_SECONDS: Final = 90.0
"""A watch sends a bookmark every minute; one that is silent for longer is dead."""

Propagation = Literal["Foreground", "Background"]
OnCall = Callable[[str, str, int], None]


class Client(Protocol):
    """What is asked of the official client: where the API server is, credentials, and a request sent.

    A test may put its own in this place; `response` below is read as aiohttp's ClientResponse is.
    """

    @property
    def configuration(self) -> Any: ...

    async def update_params_for_auth(
        self,
        headers: dict[str, str],
        queries: list[Any],
        auth_settings: list[str],
        resource_path: str,
        method: str,
        body: Any,
        /,
    ) -> None:
        """Put the credentials into the headers."""

    async def call_api(
        self, method: str, url: str, header_params: dict[str, str], body: Any, /, *, _request_timeout: Any
    ) -> Any:
        """Send a request, and return an object with its `response`."""


class ApiError(Exception):
    """The API server refused, failed or could not be reached.

    Args:
        status: HTTP status; 0: no answer.
        reason: the API's word for it: Conflict, AlreadyExists, Invalid, NotFound, Expired ...
        retry_after_seconds: the wait that the server asked for.
        causes: reasons in `details.causes`, such as NamespaceTerminating.
    """

    def __init__(
        self,
        status: int,
        reason: str,
        message: str,
        retry_after_seconds: float = 0.0,
        causes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(f"{status} {reason}: {message}" if status else message)
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after_seconds = retry_after_seconds
        self.causes = causes

    @property
    def is_expired(self) -> bool:
        """Whether the server has forgotten the version to continue from, so that all must be listed again."""
        return self.status == 410 or self.reason in ("Expired", "Gone")


def error_from(status: int, headers: Mapping[str, str], body: bytes) -> ApiError:
    """Return the error that an answer of status 400 or more describes; a proxy may not answer in JSON."""
    try:
        answer = msgspec.json.decode(body)
    except msgspec.DecodeError:
        answer = None
    if not isinstance(answer, dict):
        answer = {"message": body[:500].decode(errors="replace")}
    details = answer.get("details") or {}
    try:
        retry_after = float(headers.get("Retry-After") or details.get("retryAfterSeconds") or 0)
    except ValueError:  # an HTTP date, which the API server never sends
        retry_after = 0.0
    causes = tuple(str(each.get("reason", "")) for each in details.get("causes") or ())
    return ApiError(status, answer.get("reason", ""), answer.get("message", ""), retry_after, causes)


class Page(msgspec.Struct):
    """A part of a collection; its objects are decoded one by one: together they take ten times the room."""

    metadata: Json
    items: list[msgspec.Raw]

    def __iter__(self) -> Iterator[Json]:
        return (msgspec.json.decode(item) for item in self.items)

    @property
    def token(self) -> str:
        """The token with which the next page is requested; empty: this is the last one."""
        return str(self.metadata.get("continue", ""))


class Api:
    """One client of one API server.

    Args:
        client: a configured client of `kubernetes.aio`.
        on_call: called with the verb and resource (in the words of RBAC) and HTTP status of each call, for
            metrics.
    """

    def __init__(self, client: Client, on_call: OnCall = lambda verb, resource, status: None):
        self._client = client
        self._on_call = on_call
        self._slots = asyncio.Semaphore(MAX_CALLS)

    async def get(self, path: str) -> Json:
        """Return an object.

        Raises:
            ApiError: as for all calls.
        """
        return await self._call("GET", path, {})

    async def list(self, path: str, **query: str) -> Page:
        """Return a page of a collection."""
        return msgspec.json.decode(await self._send("GET", path, query), type=Page)

    async def apply(self, path: str, body: Json, *, is_dry_run: bool = False) -> Json:
        """Apply server-side, with force: fields that we own get our values, and those of others stay.

        With `metadata.uid` in the body, an object that has been replaced since is refused: Invalid where
        another has its name, a Conflict where none has. With a `metadata.resourceVersion` of 1, which no
        object has, every object that exists is a Conflict.
        """
        query = {"fieldManager": FIELD_MANAGER, "force": "true"} | ({"dryRun": "All"} if is_dry_run else {})
        return await self._call("PATCH", path, query, body, "application/apply-patch+yaml")

    async def merge(self, path: str, body: Json) -> Json:
        """Apply a JSON merge patch."""
        query = {"fieldManager": FIELD_MANAGER}
        return await self._call("PATCH", path, query, body, "application/merge-patch+json")

    async def create(self, path: str, body: Json) -> Json:
        return await self._call("POST", path, {"fieldManager": FIELD_MANAGER}, body)

    async def delete(
        self, path: str, *, uid: str, propagation: Propagation, grace_seconds: int | None = None
    ) -> Json:
        """Delete the object that has this UID, and no other object of its name."""
        options: Json = {"preconditions": {"uid": uid}, "propagationPolicy": propagation}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        return await self._call("DELETE", path, {}, options)

    async def watch(self, path: str, **query: str) -> AsyncIterator[Json]:
        """Yield the events of a watch until the server ends it.

        Raises:
            ApiError: as for all calls; also if the stream breaks, is silent for too long, or sends an ERROR.
        """
        timeout = aiohttp.ClientTimeout(connect=CONNECT_SECONDS, sock_read=WATCH_SILENCE_SECONDS)
        async with self._request("GET", path, query | {"watch": "true"}, None, "", timeout) as response:
            self._tell("GET", path, response.status, is_watch=True)
            if response.status >= 400:
                raise error_from(response.status, response.headers, await response.read())
            async for line in _lines(response.content):
                event = msgspec.json.decode(line)
                if event["type"] == "ERROR":
                    status = event["object"]
                    code, reason = status.get("code", 0), status.get("reason", "")
                    raise ApiError(code, reason, status.get("message", ""))
                yield event

    async def _call(
        self, verb: str, path: str, query: Mapping[str, str], body: Json | None = None, content_type: str = ""
    ) -> Json:
        answer: Json = msgspec.json.decode(await self._send(verb, path, query, body, content_type))
        return answer

    async def _send(
        self, verb: str, path: str, query: Mapping[str, str], body: Json | None = None, content_type: str = ""
    ) -> bytes:
        timeout = aiohttp.ClientTimeout(total=CALL_SECONDS, connect=CONNECT_SECONDS)
        async with self._slots, self._request(verb, path, query, body, content_type, timeout) as response:
            data = await response.read()
        self._tell(verb, path, response.status)
        if response.status >= 400:
            raise error_from(response.status, response.headers, data)
        return data

    @asynccontextmanager
    async def _request(
        self,
        verb: str,
        path: str,
        query: Mapping[str, str],
        body: Json | None,
        content_type: str,
        timeout: aiohttp.ClientTimeout,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request with our credentials; a failure below HTTP becomes an ApiError of status 0."""
        headers = {"Accept": "application/json", "Content-Type": content_type or "application/json"}
        url = f"{self._client.configuration.host}{path}"
        if query:
            url = f"{url}?{urlencode(query)}"
        try:
            await self._client.update_params_for_auth(headers, [], ["BearerToken"], path, verb, body)
            answer = await self._client.call_api(verb, url, headers, body, _request_timeout=timeout)
            async with answer.response as response:
                yield response
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._tell(verb, path, 0)
            raise ApiError(0, "Unreachable", f"{verb} {path}: {type(error).__name__}: {error}") from error

    def _tell(self, verb: str, path: str, status: int, *, is_watch: bool = False) -> None:
        resource, is_object = resource_in(path)
        if is_watch:
            verb = "watch"
        elif verb == "GET":
            verb = "get" if is_object else "list"
        elif status == CREATED:  # an apply creates too, if the object did not exist
            verb = "create"
        self._on_call(VERBS.get(verb, verb), resource, status)


async def _lines(stream: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Yield the lines of a stream; aiohttp's own iterator refuses lines longer than its buffer."""
    rest = b""
    async for chunk in stream.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line:
                yield line
