"""`/generate` on the event loop's side: passes the gate, sends the answers, aborts when the client leaves."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from asyncrl_runtime.engine.adapter_registry import AdapterRegistry
from asyncrl_runtime.engine.fields import BadRequest
from asyncrl_runtime.engine.gate import Gate
from asyncrl_runtime.engine.requests import Call, Request, RequestParser
from asyncrl_runtime.engine.responses import build_response
from asyncrl_runtime.engine.scheduler import Progress, Scheduler

_encode = msgspec.json.Encoder().encode


class ServerFault(Exception):
    """A request that the engine could not answer, with the status code to send instead."""

    def __init__(self, status_code: int, message: str) -> None:
        super().__init__(message)
        self.status_code = status_code


class _Answers:
    """The updates that have come back for the requests of one call."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.changed = asyncio.Event()
        """Set when a stream has something new, and when the last request has finished."""
        self.fresh: dict[Request, Progress] = {}
        """The updates not sent yet: only the newest one of each request, since it holds all its tokens."""
        self.num_open = len(call.requests)

    def put(self, update: Progress) -> None:
        self.fresh[update.request] = update
        self.num_open -= update.is_last
        if self.call.stream or not self.num_open:
            self.changed.set()

    async def take(self) -> dict[Request, Progress]:
        """Wait for new updates and return them."""
        await self.changed.wait()
        self.changed.clear()
        fresh, self.fresh = self.fresh, {}
        return fresh


class GenerateEndpoint:
    """The endpoint, an ASGI application of its own; belongs to one event loop."""

    def __init__(
        self,
        scheduler: Scheduler,
        parser: RequestParser,
        gate: Gate,
        adapters: AdapterRegistry,
        observe: Callable[[Request], None],
    ) -> None:
        """
        Args:
            observe: called with every request that has finished.
        """
        self._scheduler = scheduler
        self._parser = parser
        self._gate = gate
        self._adapters = adapters
        self._observe = observe
        self._live: set[str] = set()
        """The ids of requests that have arrived (held at the gate or not) and are not answered yet."""
        self._answers: dict[Request, _Answers] = {}
        """Where updates go: by request, not by its id, which another may have after it was abandoned."""

    def deliver(self, updates: list[Progress]) -> None:
        """Hand out what the scheduler has sampled."""
        for update in updates:
            if update.is_last:
                self._observe(update.request)
            answers = self._answers.get(update.request)
            if answers is not None:  # else its client has left
                answers.put(update)

    def is_live(self, rid: str) -> bool:
        return rid in self._live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = self._parser.parse(await HttpRequest(scope, receive).body())
        with _cancelled_on_disconnect(receive):
            if call.stream:
                await self._stream(call, send)
            else:
                answer = await self.answer(call)
                body = _encode(answer[0] if call.is_single else answer)
                await Response(body, media_type="application/json")(scope, receive, send)

    async def answer(self, call: Call) -> list[dict[str, Any]]:
        """Return the finished responses in the order of the call's requests.

        Raises:
            ServerFault: one of the requests failed within the engine.
        """
        async with self._running(call) as answers:
            updates = await answers.take()
            for request in call.requests:
                reason = request.finish_reason or {}
                if reason.get("status_code"):
                    raise ServerFault(reason["status_code"], reason["message"])
            return [self._build(updates[request]) for request in call.requests]

    async def _stream(self, call: Call, send: Send) -> None:
        """Send server-sent events, the last of which is `[DONE]`; an error is an event too, as in SGLang."""
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with contextlib.aclosing(self._chunks(call)) as chunks:
            try:
                async for chunk in chunks:
                    await send(_event(_encode(chunk)))
            except BadRequest as error:
                await send(_event(_encode(_stream_error(str(error)))))
        await send(_event(b"[DONE]", is_last=True))

    async def _chunks(self, call: Call) -> AsyncGenerator[dict[str, Any]]:
        """Yield what each request has sampled since its last chunk; in a batch, with the request's index."""
        index = {request: i for i, request in enumerate(call.requests)}
        num_sent = dict.fromkeys(call.requests, 0)
        async with self._running(call) as answers:
            while answers.num_open or answers.fresh:
                for request, update in (await answers.take()).items():
                    chunk = self._build(update, num_sent[request])
                    num_sent[request] = len(update.output_ids)
                    if not call.is_single:
                        chunk["index"] = index[request]
                    yield chunk

    @contextlib.asynccontextmanager
    async def _running(self, call: Call) -> AsyncIterator[_Answers]:
        """Pass the gate, borrow adapters and submit; on the way out, abort what has not finished."""
        answers = _Answers(call)
        rids = [request.rid for request in call.requests]
        for rid in rids:
            if rid in self._live:
                raise BadRequest(f"Duplicate request ID detected: {rid}")
        self._live.update(rids)
        self._answers.update(dict.fromkeys(call.requests, answers))
        try:
            await self._gate.enter()
            try:
                await self._adapters.lend(call.requests)
                self._scheduler.post(lambda: self._scheduler.submit(call.requests))
                yield answers
            finally:
                if answers.num_open:
                    self._scheduler.post(lambda: self._scheduler.abort(frozenset(rids).__contains__))
                self._adapters.give_back(call.requests)
                self._gate.leave()
        finally:
            self._live.difference_update(rids)
            for request in call.requests:
                del self._answers[request]

    def _build(self, update: Progress, start: int = 0) -> dict[str, Any]:
        return build_response(update, self._scheduler.model, self._scheduler.version, start)


def _event(data: bytes, *, is_last: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": not is_last}


def _stream_error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "code": 400, "retryable": False}}


@contextlib.contextmanager
def _cancelled_on_disconnect(receive: Receive) -> Iterator[None]:
    """Cancel the block when the client closes the connection, without raising an error."""
    task = asyncio.current_task()
    assert task is not None
    is_open = True

    def cancel(watcher: "asyncio.Future[Any]") -> None:
        if is_open and not watcher.cancelled():
            task.cancel()

    watcher = asyncio.ensure_future(receive())  # the body is read: the next message is the disconnect
    watcher.add_done_callback(cancel)
    try:
        yield
    except asyncio.CancelledError:
        if not watcher.done():
            raise  # the server is shutting down
        task.uncancel()
    finally:
        is_open = False
        watcher.cancel()
