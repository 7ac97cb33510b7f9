"""One connection to NATS with the settings and work-arounds that the guarantees need.

nats-py 2.16 has sharp edges; each has a regression test in tests/integration/test_nats_traps.py. A payload
whose headers push it over max_payload closes the client for good; futures of `publish_async` never resolve
across a reconnect or after a refusal; an `error_cb` that raises kills the read loop; a dead peer is noticed
after four minutes by default; `publish` swallows a cancellation, so loops end by a flag.
"""

import asyncio
import contextlib
import json
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec
import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import PubAck

from asyncrl_api.names import JobNames, NatsAddress
from asyncrl_runtime.contract.broker import PayloadTooLarge, TransportError, WrongLastSequence

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_HEADER_BYTES = 1024
"""The room left under max_payload: the server counts headers, but the client does not."""

LISTEN_SECONDS = 60.0
"""How long a subscription may take to reach the server."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 2.0
"""The pause between two attempts, doubled each time. It is drawn up to twice as long, so that callers do not
come in waves."""

NO_RESPONDERS = "503"
"""The status under which the server says that nobody listens."""
STREAM_FULL = 10077
WRONG_LAST_SEQUENCE = 10071

TRANSIENT = (
    nats.errors.TimeoutError,
    nats.errors.NoServersError,
    nats.errors.NoRespondersError,
    nats.errors.OutboundBufferLimitError,
    nats.errors.ConnectionReconnectingError,
    nats.js.errors.NoStreamResponseError,
    nats.js.errors.ServiceUnavailableError,
    nats.js.errors.ServerError,
    ConnectionError,
)
"""The errors of what passes by itself: an outage, a restart, a stream that is being made again."""


MALFORMED = (
    json.JSONDecodeError,
    UnicodeDecodeError,
    msgspec.DecodeError,
    RecursionError,
    KeyError,
    TypeError,
    AttributeError,
)
"""What our client and we raise for an answer that is none of the server's: workers, too, may write to the
subjects on which answers come."""


class MalformedAnswer(Exception):
    """An answer that is none of the server's. The question is put again."""


class StreamFull(Exception):
    """The stream is at its byte limit and takes no more. It is tried again: the reader's purge makes room."""


@contextlib.contextmanager
def asking(what: str) -> Iterator[None]:
    """Turn what NATS raises while it is asked for something into the one error that the runtime knows.

    Raises:
        TransportError: the message names what was asked, and what was raised instead.
    """
    try:
        yield
    except (*TRANSIENT, nats.js.errors.APIError, nats.errors.ConnectionClosedError) as error:
        raise TransportError(f"{what}: {type(error).__name__}: {error}") from error
    except MALFORMED as error:
        raise TransportError(f"{what}: a malformed answer: {type(error).__name__}: {error}") from error


class Broker:
    """A connected client. Make it with `connect`; `closed` is set if it can never work again."""

    def __init__(self, client: Client, closed: asyncio.Event, rng: random.Random) -> None:
        self.client = client
        self.jetstream: JetStreamContext = client.jetstream(timeout=3)
        self.closed = closed
        self.on_reconnected: Callable[[], None] = lambda: None
        """Called when a lost connection is back: what was said meanwhile has not been heard."""
        self._rng = rng

    @classmethod
    async def connect(
        cls,
        address: NatsAddress,
        names: JobNames,
        client_name: str,
        *,
        deadline_seconds: float = 60,
        rng: random.Random | None = None,
    ) -> Self:
        """Connect, waiting for a server that is still starting.

        Raises:
            TransportError: no server answered within the deadline; the message names the address.
        """
        rng = rng or random.Random()
        closed = asyncio.Event()
        client = Client()

        async def on_error(error: Exception) -> None:
            # This must never raise: nats-py's read loop would die while is_connected stays true.
            log.warning("NATS: %s: %s", type(error).__name__, error)

        async def on_closed() -> None:
            closed.set()

        async def on_reconnected() -> None:
            broker.on_reconnected()

        broker = cls(client, closed, rng)

        async def open_connection() -> None:
            await client.connect(
                address.url,
                name=client_name,
                error_cb=on_error,
                closed_cb=on_closed,
                reconnected_cb=on_reconnected,
                max_reconnect_attempts=-1,
                # Partly random, so that pods do not return in one wave; floats work, the stub says int.
                reconnect_time_wait=0.5 + 0.25 * rng.random(),  # type: ignore[arg-type]
                ping_interval=10,
                max_outstanding_pings=2,
                inbox_prefix=names.inbox_prefix,
                **_credentials(address),
            )

        try:
            await asyncio.wait_for(open_connection(), deadline_seconds)
        except (TimeoutError, OSError, nats.errors.Error) as error:
            raise TransportError(
                f"no NATS server at {address.url} within {deadline_seconds:.0f} s: {error or 'timeout'}"
            ) from error
        return broker

    async def close(self) -> None:
        """Send what is buffered and disconnect, giving up each after 2 s.

        This is not `drain`, which waits as long again for messages that have come and that nobody will take.
        """
        for step in (self.client.flush, self.client.close):
            try:
                await asyncio.wait_for(step(), 2)
            except (TimeoutError, nats.errors.Error) as error:
                log.info("NATS: closing: %s: %s", type(error).__name__, error)

    def check_size(self, payload: bytes) -> None:
        """Raise PayloadTooLarge for what the server would refuse."""
        limit = self.client.max_payload - MAX_HEADER_BYTES
        if len(payload) > limit:
            raise PayloadTooLarge(f"a message of {len(payload)} bytes; the server takes {limit}")

    async def publish(
        self,
        subject: str,
        payload: bytes,
        *,
        message_id: str,
        deadline_seconds: float = 300,
        attempt_timeout_seconds: float = 2,
    ) -> PubAck:
        """Store a message once, however often it must be sent: every attempt has the same id.

        Returns:
            The acknowledgement; `duplicate` is set where the stream had the message already.

        Raises:
            PayloadTooLarge: nothing was sent.
            TransportError: not acknowledged within the deadline. It may still be stored later, so a
                caller that tries again must use the same id.
        """
        self.check_size(payload)

        async def attempt() -> PubAck:
            headers = {"Nats-Msg-Id": message_id}  # fresh each time: nats-py mutates what it is given
            # This is `jetstream.publish` without its parsing of the answer, a fifth of what a message costs.
            reply = await self.client.request(
                subject, payload, timeout=attempt_timeout_seconds, headers=headers
            )
            return _stored(reply.data, subject)

        what = f"publish {message_id} on {subject}"
        return await self.retry(attempt, what, deadline_seconds, StreamFull, MalformedAnswer)

    async def publish_fenced(self, subject: str, payloads: Sequence[bytes], *, last_sequence: int) -> int:
        """Append messages of one publisher in order, each only if it is the next of the stream.

        Args:
            payloads: sent without waiting for one another; at most 64, the client's window.
            last_sequence: the stream's last sequence before the first of them.

        Returns:
            The stream's last sequence after them.

        Raises:
            WrongLastSequence: the stream is elsewhere; nothing after that message was stored.
            TransportError: not all were acknowledged; read the stream's last sequence and go on there.
        """
        for payload in payloads:
            self.check_size(payload)

        # Not publish_async: its futures stay pending for ever after a refusal and across a reconnect.
        # Concurrent requests reach the server in the order in which they are started.
        def publish(offset: int, payload: bytes) -> Awaitable[PubAck]:
            sequence = last_sequence + offset + 1
            headers = {"Nats-Expected-Last-Sequence": str(sequence - 1)}
            return self.jetstream.publish(f"{subject}.{sequence}", payload, timeout=5, headers=headers)

        try:
            acks = await asyncio.gather(*(publish(*item) for item in enumerate(payloads)))
        except nats.js.errors.APIError as error:
            if error.err_code == WRONG_LAST_SEQUENCE:
                raise WrongLastSequence(f"{subject}: {error.description}") from error
            raise TransportError(f"publish on {subject}: {error.description}") from error
        except (*TRANSIENT, *MALFORMED) as error:
            raise TransportError(f"publish on {subject}: {type(error).__name__}") from error
        return acks[-1].seq if acks else last_sequence

    async def listen(self, subject: str, heard: Callable[[Msg], Awaitable[None]]) -> None:
        """Hear what is said on a subject from now on: once this returns, the server knows of it.

        Raises:
            TransportError: the server has not answered for LISTEN_SECONDS.
        """
        await self.client.subscribe(subject, cb=heard)
        # Others speak through connections of their own, which the order of this one does not bind.
        await self.retry(self.client.flush, f"listening to {subject}", LISTEN_SECONDS)

    async def request(self, subject: str, payload: bytes, timeout_seconds: float) -> bytes | None:
        """Ask one process for an answer; None if it does not come in time or nobody listens."""
        try:
            reply: Msg = await self.client.request(subject, payload, timeout=timeout_seconds)
        except TRANSIENT:
            return None
        return reply.data

    @contextlib.asynccontextmanager
    async def request_all(
        self, subject: str, payload: bytes, heard: Callable[[bytes | None], None]
    ) -> AsyncIterator[None]:
        """Ask all who listen, with one message; `heard` gets each answer, and None if nobody listens."""

        async def on_message(message: Msg) -> None:
            has_nobody = (message.headers or {}).get("Status") == NO_RESPONDERS
            heard(None if has_nobody else message.data)

        inbox = self.client.new_inbox()
        answers = await self.client.subscribe(inbox, cb=on_message)
        try:
            with contextlib.suppress(*TRANSIENT):  # then nobody answers
                await self.client.publish(subject, payload, reply=inbox)
            yield
        finally:
            with contextlib.suppress(nats.errors.Error):
                await answers.unsubscribe()

    async def retry(
        self,
        attempt: Callable[[], Awaitable[T]],
        what: str,
        deadline_seconds: float,
        *also: type[Exception],
    ) -> T:
        """Repeat `attempt` over transient faults, with a log line each time.

        Raises:
            TransportError: it still failed at the deadline, or the client is closed for good.
        """
        # Written by hand: tenacity costs 28 us a call, a tenth of what the rest of a publish takes.
        transient: tuple[type[Exception], ...] = (*TRANSIENT, *also)
        deadline = time.monotonic() + deadline_seconds
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                return await attempt()
            except transient as error:
                if time.monotonic() >= deadline:
                    raise TransportError(f"{what}: {type(error).__name__}: {error}") from error
                log.warning("%s: %s: %s; trying again", what, type(error).__name__, error)
            except nats.errors.ConnectionClosedError as error:
                raise TransportError(f"{what}: {type(error).__name__}: {error}") from error
            await asyncio.sleep(pause * (1 + self._rng.random()))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


class _PublishAnswer(msgspec.Struct):
    """The answer to a publish: where the message is stored, or why it is not."""

    stream: str = ""
    seq: int = 0
    duplicate: bool | None = None
    error: dict[str, Any] | None = None


_answers = msgspec.json.Decoder(_PublishAnswer)


def _stored(data: bytes, subject: str) -> PubAck:
    """Return what the answer to a publish says.

    Raises:
        StreamFull, MalformedAnswer: it is to be tried again.
        nats.js.errors.APIError: the server refused the message.
    """
    try:
        answer = _answers.decode(data)
        if (error := answer.error) is None:
            return PubAck(stream=answer.stream, seq=answer.seq, duplicate=answer.duplicate)
        if error.get("err_code") == STREAM_FULL:
            raise StreamFull(f"{subject}: {error.get('description')}")
        raise nats.js.errors.APIError.from_error(error)
    except MALFORMED as error:
        raise MalformedAnswer(f"{type(error).__name__}: {error}: {data[:80]!r}") from error


def _credentials(address: NatsAddress) -> dict[str, Any]:
    """Return the arguments with which `connect` says who we are.

    Raises:
        TransportError: the file is missing or cannot be understood.
    """
    path = address.credentials_file
    if not path or path.endswith(".creds"):
        return {"user_credentials": path or None}
    try:
        values = json.loads(Path(path).read_text())
        return {"user": values["user"], "password": values["password"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TransportError(
            f"NATS credentials {path}: must be JSON with user and password: {error}"
        ) from error
