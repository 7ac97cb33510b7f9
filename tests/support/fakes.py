"""Small fakes with state, for tests of one part without the others."""

import asyncio
import json
import selectors
import zlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from asyncrl_api.protocols import Score
from asyncrl_runtime.contract.broker import StreamFacts, StreamMessage, TransportError
from asyncrl_runtime.contract.messages import JoinGroup, PolicyVersion, VersionSpan
from asyncrl_runtime.rollout.engine_api import (
    CHECKSUM_SECONDS,
    CONTROL_SECONDS,
    PROBE_SECONDS,
    BrokenStream,
    EngineLoad,
    EngineLost,
    EngineRefused,
    EngineTimeout,
    Generation,
    IncomingBucket,
    SamplingRequest,
    WeightsSeen,
)
from asyncrl_runtime.rollout.rewards.backend import RewardFailure
from asyncrl_runtime.rollout.rewards.frames import ScoreRequest
from asyncrl_runtime.trainer.job_streams import LostStreams
from asyncrl_runtime.weights.engines import Published, UpdateSeconds

T = TypeVar("T")


@dataclass(frozen=True)
class Cut:
    """An answer that ends after `num_tokens`, if it has more."""

    num_tokens: int
    how: Literal["broken", "aborted", "lost"] = "broken"
    """broken: the engine goes away in mid stream. aborted: on request. lost: nothing can be kept of it."""


class FakeEngine:
    """Samples like an engine whose noise is a function of seed and absolute position.

    A token depends on everything before it as well, so a sample that goes on wrongly differs at once.
    """

    EOS = 2
    NUM_SPECIAL = 6

    def __init__(self, vocab_size: int = 256, num_tokens_mean: int = 12) -> None:
        self.version = PolicyVersion(1, 0)
        self.faults: deque[Cut | Exception | None] = deque()
        """The faults of the next calls; None: no fault."""
        self.calls: list[list[SamplingRequest]] = []
        self.salts: list[str | None] = []
        self.streams = 0
        self._vocab_size = vocab_size
        self._num_tokens_mean = num_tokens_mean

    @property
    def requests(self) -> list[SamplingRequest]:
        return [request for call in self.calls for request in call]

    async def generate(
        self, requests: Sequence[SamplingRequest], *, cache_salt: str | None = None
    ) -> list[Generation]:
        self.calls.append(list(requests))
        self.salts.append(cache_salt)
        fault = self.faults.popleft() if self.faults else None
        await asyncio.sleep(0)  # an answer takes at least a turn of the event loop
        if isinstance(fault, Exception):
            raise fault
        return [self._cut(self.sample(request), fault) for request in requests]

    async def stream(self, request: SamplingRequest, *, cache_salt: str | None = None) -> Generation:
        self.streams += 1
        return (await self.generate([request], cache_salt=cache_salt))[0]

    def sample(self, request: SamplingRequest) -> Generation:
        """The whole answer to a request."""
        ids, logprobs = list(request.input_ids), list[float]()
        first = len(ids)
        while len(ids) - first < request.max_new_tokens and not (logprobs and ids[-1] == self.EOS):
            noise = zlib.crc32(f"{request.seed}/{len(ids)}".encode())
            draw = zlib.crc32(f"{noise}/{ids}".encode())
            is_end = draw % self._num_tokens_mean == 0
            ids.append(
                self.EOS if is_end else self.NUM_SPECIAL + draw % (self._vocab_size - self.NUM_SPECIAL)
            )
            logprobs.append(-(draw % 997) / 100)
        output = ids[first:]
        span = VersionSpan(self.version.attempt, self.version.version, len(output))
        return Generation(output, logprobs, (span,), "stop" if output[-1] == self.EOS else "length")

    def _cut(self, whole: Generation, cut: Cut | None) -> Generation:
        if cut is None or cut.num_tokens >= len(whole.output_ids):
            return whole
        if cut.how == "lost":
            raise EngineLost("the engine is gone")
        count = cut.num_tokens
        span = VersionSpan(self.version.attempt, self.version.version, count)
        earned = Generation(
            whole.output_ids[:count], whole.logprobs[:count], (span,) if count else (), "abort"
        )
        if cut.how == "broken":
            raise BrokenStream(EngineLost("the engine is gone"), earned)
        return earned


class FakeBackend:
    """Scores as told, and remembers which responses came together."""

    def __init__(self, judge: Callable[[ScoreRequest], Score | RewardFailure]) -> None:
        self._judge = judge
        self.calls: list[list[ScoreRequest]] = []

    async def attempt(self, requests: Sequence[ScoreRequest]) -> list[Score | RewardFailure]:
        self.calls.append(list(requests))
        return [self._judge(request) for request in requests]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class _JumpingSelector(selectors.DefaultSelector):
    """Moves the clock where it would otherwise wait for a timer."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            return super().select(None)
        events = super().select(0)
        if not events:
            self.now += max(0.0, timeout)
        return events


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose hours take no time, for code that waits for timers and not for sockets."""

    def __init__(self) -> None:
        self._clock = _JumpingSelector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def run_in_virtual_time(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


class Exchange:
    """One HTTP request, and the means to answer it as no good server would."""

    def __init__(self, method: str, path: str, body: Any, writer: asyncio.StreamWriter) -> None:
        self.method = method
        self.path = path
        self.body = body
        self._writer = writer

    async def answer(self, content: Any, status: int = 200) -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        await self._write(f"HTTP/1.1 {status} -\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)

    async def events(self, *events: Mapping[str, Any] | str) -> None:
        """Send server-sent events; the first ones begin the answer."""
        if not getattr(self, "_has_begun", False):
            self._has_begun = True
            await self._write(
                b"HTTP/1.1 200 -\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            )
        for event in events:
            await self.piece(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode())

    async def piece(self, data: bytes) -> None:
        """Send some bytes of events, which may be part of one."""
        await self._write(b"%x\r\n%b\r\n" % (len(data), data))

    async def end(self) -> None:
        """End a stream of events as HTTP has it."""
        await self._write(b"0\r\n\r\n")

    def drop(self) -> None:
        """Cut the connection, as a kill does."""
        self._writer.transport.abort()

    async def _write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()


class ScriptedServer:
    """An HTTP server on loopback whose every answer is the test's."""

    def __init__(self, reply: Callable[[Exchange], Awaitable[None]]) -> None:
        self.reply = reply
        self.exchanges: list[Exchange] = []
        self.url = ""

    @property
    def bodies(self) -> list[Any]:
        return [exchange.body for exchange in self.exchanges]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                line, *headers = head.decode().split("\r\n")
                fields = dict(header.lower().split(": ", 1) for header in headers if header)
                data = await reader.readexactly(int(fields.get("content-length", 0)))
                method, path, _ = line.split(" ")
                exchange = Exchange(method, path, json.loads(data) if data else None, writer)
                self.exchanges.append(exchange)
                await self.reply(exchange)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has left
        finally:
            writer.close()


@asynccontextmanager
async def scripted_server(reply: Callable[[Exchange], Awaitable[None]]) -> AsyncIterator[ScriptedServer]:
    """A ScriptedServer for the length of a `with` block."""
    scripted = ScriptedServer(reply)
    server = await asyncio.start_server(scripted._serve, "127.0.0.1", 0)
    scripted.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield scripted
    finally:
        server.close()


class UpdatableEngine:
    """An engine that can be updated, without model and HTTP: it knows groups, sessions and pauses.

    A request for tokens is never answered: it ends when the engine is given up.
    """

    name = "engine"

    def __init__(self) -> None:
        self.weights = WeightsSeen()
        self.is_in_doubt = False
        self.num_requests = 0
        self.calls: list[tuple[str, Any]] = []
        """The calls with their bodies, in order, except those that ask for the engine's health."""
        self.faults: dict[str, Exception] = {}
        """The exceptions that calls fail with, by the call."""
        self._fails_at: dict[tuple[str, int], Exception] = {}
        self.data_comes: Callable[[str], Awaitable[None]] = _at_once
        """Returns once the data of the next bucket has come through a group; raises what the engine would."""
        self.hangs = False
        self.tp_size = 1
        self.digest = "c0ffee"
        self._lost = asyncio.Event()
        self.start()

    def start(self) -> None:
        """Start as a new process, which knows nothing of the one before."""
        self.own_label = "default"
        self.is_paused = self.has_session = self.has_all = False
        self.groups: set[str] = set()
        self.num_tokens = 0

    def fails_at(self, call: str, nth: int, fault: Exception) -> None:
        """Have the n-th such call from now on fail, and no other."""
        self._fails_at[call, self.made.count(call) + nth] = fault

    @property
    def made(self) -> list[str]:
        """The calls that were made."""
        return [call for call, _ in self.calls]

    async def generate(
        self, requests: Sequence[SamplingRequest], *, cache_salt: str | None = None
    ) -> list[Generation]:
        await self._lost.wait()
        raise EngineLost("given up")

    async def stream(self, request: SamplingRequest, *, cache_salt: str | None = None) -> Generation:
        return (await self.generate([request]))[0]

    async def close(self) -> None:
        pass

    def give_up(self) -> None:
        self._lost.set()
        self._lost = asyncio.Event()

    async def abort_all(self) -> None:
        await self._told("abort_all", None, PROBE_SECONDS)

    async def label(self) -> str:
        await self._answer("label", PROBE_SECONDS)
        return self.own_label

    async def num_ranks(self) -> int:
        return self.tp_size

    async def load(self) -> EngineLoad:
        await self._answer("load", PROBE_SECONDS)
        return EngineLoad(0.0, 0, 0, self.num_tokens)

    async def take_over(self) -> None:
        await self._told("take_over", None, PROBE_SECONDS)
        self.has_session = False

    async def join_group(self, request: JoinGroup) -> None:
        await self._told("join_group", request, request.timeout_seconds)
        self.groups.add(request.group)

    async def leave_group(self, group: str) -> None:
        await self._told("leave_group", group)
        self._refuse_unless(group in self.groups, "no such group")
        self.groups.remove(group)

    async def pause(self, interrupt: str) -> None:
        await self._told("pause", interrupt)
        self.is_paused = True

    async def begin_update(self) -> None:
        await self._told("begin_update", None)
        self._refuse_unless(not self.has_session, "a session is open")
        self.has_session, self.has_all = True, False

    async def receive_bucket(self, bucket: IncomingBucket, *, keeps_cache: bool) -> None:
        await self._told("receive_bucket", keeps_cache, bucket.timeout_seconds)
        await self.data_comes(bucket.group)
        await self._answer("load_bucket", bucket.timeout_seconds)
        self._refuse_unless(self.has_session, "no session")
        self._refuse_unless(bucket.group in self.groups, "no such group")
        self._refuse_unless(not self.has_all, "the last bucket has come before")
        self.has_all = bucket.is_last
        self.own_label = str(bucket.version) if bucket.is_last else self.own_label

    async def end_update(self) -> None:
        await self._told("end_update", None)
        self._refuse_unless(self.has_session, "no session is open")
        self.has_session = False

    async def checksum(self) -> str:
        await self._told("checksum", None, CHECKSUM_SECONDS)
        return self.digest

    async def resume(self) -> None:
        await self._told("resume", None)
        self.is_paused = False

    async def load_adapter(self, version: PolicyVersion, folder: Path, timeout_seconds: float) -> None:
        await self._told("load_adapter", version, timeout_seconds)
        files = {"adapter_config.json", "adapter_model.safetensors"}
        self._refuse_unless(_names_in(folder) == files, "no adapter")

    async def unload_adapter(self, version: PolicyVersion) -> None:
        await self._told("unload_adapter", version)

    async def set_label(self, version: PolicyVersion, *, aborts: bool) -> None:
        await self._told("set_label", (version, aborts))
        self.own_label = str(version)

    async def _told(self, call: str, what: Any, timeout_seconds: float = CONTROL_SECONDS) -> None:
        self.calls.append((call, what))
        await self._answer(call, timeout_seconds)

    async def _answer(self, call: str, timeout_seconds: float) -> None:
        await asyncio.sleep(timeout_seconds if self.hangs else 0)
        if self.hangs:
            raise EngineTimeout(f"{call}: no answer in {timeout_seconds:.0f} s")
        fault = self._fails_at.pop((call, self.made.count(call)), None)
        if fault := fault or self.faults.get(call):
            raise fault

    def _refuse_unless(self, is_right: bool, message: str) -> None:
        if not is_right:
            raise EngineRefused(message)


async def _at_once(group: str) -> None:
    pass


def _names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class FakeEvaluator:
    """Gives the same answers to every evaluation, as soon as `may_end` allows."""

    def __init__(self, evaluated: Any) -> None:
        self.evaluated = evaluated
        self.may_end: Callable[[], bool] = lambda: True
        self.num_running = 0

    async def run(self, step: int, max_new_tokens: int, tick: Callable[[], Awaitable[None]]) -> Any:
        self.num_running += 1
        try:
            while not self.may_end():
                await tick()
                await asyncio.sleep(1)
        finally:
            self.num_running -= 1
        return self.evaluated


class FakeRanks:
    """Remembers what the trainer's ranks were told to do."""

    def __init__(self, answer: Callable[[Any], Any]) -> None:
        self._answer = answer
        self.commands: list[Any] = []
        self.must_stop: Callable[[], bool] = lambda: False

    async def keep_awake(self) -> None:
        """There is one rank."""

    async def run(self, command: Any) -> Any:
        self.commands.append(command)
        return self._answer(command)


class FakeWeights:
    """A publisher whose engines lack the weights until they are published."""

    def __init__(self) -> None:
        self.are_behind = False
        self.published: list[PolicyVersion] = []

    def behind(self, version: PolicyVersion) -> list[tuple[str, str]]:
        return [("w", "e")] if self.are_behind else []

    def num_engines(self, version: PolicyVersion) -> int:
        return 0 if self.are_behind else 1

    async def publish(self, version: PolicyVersion, interrupt: str) -> Published:
        self.published.append(version)
        self.are_behind = False
        return Published(("w",), num_epochs=1, seconds=UpdateSeconds(1.0, 2.0, 3.0, 4.0))

    async def leave(self) -> None:
        pass


class FakeJobQueues:
    """Streams that are there, that nothing happens to, and a state that nobody reads."""

    facts = StreamFacts(identity="made", last_sequence=0, num_bytes=0, max_bytes=2**20)

    async def read_trajectories(self, start_sequence: int) -> AsyncGenerator[StreamMessage, None]:
        await asyncio.Event().wait()
        yield StreamMessage(start_sequence, "", b"")

    async def prompts(self) -> StreamFacts | None:
        return self.facts

    async def trajectories(self) -> StreamFacts | None:
        return self.facts

    async def queued_tickets(self) -> set[int]:
        return set()

    async def make_streams(self, first_ticket: int | None, first_trajectory: int | None) -> None:
        pass

    async def delete_prompts(self) -> None:
        pass

    async def delete_trajectories(self) -> None:
        pass

    async def delete_streams(self) -> None:
        pass

    async def purge_trajectories(self, last_sequence: int) -> None:
        pass

    async def put(self, key: str, data: bytes) -> None:
        pass


class FakeStreams:
    """Streams that nothing happens to."""

    identity = ""
    lost = LostStreams()
    is_nearly_full = False

    def __init__(self) -> None:
        self.messages: list[StreamMessage] = []
        self.fault: TransportError | None = None
        self.purged_behind: list[int] = []

    def requeue(self) -> None:
        pass

    def start_over(self) -> None:
        pass

    async def mend(self, give_up_recorded: Callable[[], Awaitable[None]]) -> None:
        raise AssertionError("nothing is lost")

    async def has_read_everything(self) -> bool:
        return True

    async def announce(self, version: PolicyVersion) -> None:
        pass

    async def stored(self, after: int, last: int) -> AsyncGenerator[StreamMessage, None]:
        for message in self.messages:
            if self.fault is not None:
                raise self.fault
            if after < message.sequence <= last:
                yield message

    async def purge_behind(self, sequence: int) -> None:
        self.purged_behind.append(sequence)
