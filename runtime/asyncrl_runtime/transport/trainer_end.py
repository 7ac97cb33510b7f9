"""Rank 0's end of the broker, on NATS JetStream: contract/broker.py says what each call does."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Self

import nats.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import ConsumerInfo

from asyncrl_api.names import ANSWER_CONSUMER, PROMPT_CONSUMER, JobNames, NatsAddress
from asyncrl_runtime.contract.broker import Answers, StreamFacts, StreamMessage
from asyncrl_runtime.contract.messages import ENGINE_STATES, Heartbeat, decode
from asyncrl_runtime.contract.refused import Refusals
from asyncrl_runtime.transport.broker import Broker, asking
from asyncrl_runtime.transport.lease import Holder, Lease
from asyncrl_runtime.transport.reader import OrderedReader
from asyncrl_runtime.transport.streams import (
    delete_stream,
    delete_streams,
    identity_of,
    make_lease_bucket,
    make_streams,
    stream_info,
)


class TrainerEnd:
    """A TrainerBroker; make it with `connect`.

    Args:
        storage_bytes: what the job may use on the broker's disk.
        refusals: counts what arrives and is not taken.
    """

    def __init__(
        self, broker: Broker, names: JobNames, storage_bytes: int, refusals: Refusals | None = None
    ) -> None:
        self._broker = broker
        self._refusals = refusals or Refusals()
        self._names = names
        self._storage_bytes = storage_bytes
        self._lease: Lease | None = None

    @classmethod
    async def connect(
        cls,
        address: NatsAddress,
        names: JobNames,
        client_name: str,
        storage_bytes: int,
        refusals: Refusals | None = None,
    ) -> Self:
        """Connect, waiting for a server that is still starting.

        Raises:
            TransportError: no server answered within the deadline; the message names the address.
        """
        return cls(await Broker.connect(address, names, client_name), names, storage_bytes, refusals)

    @property
    def closed(self) -> asyncio.Event:
        return self._broker.closed

    async def close(self) -> None:
        await self._broker.close()

    async def request(self, subject: str, payload: bytes, timeout_seconds: float) -> bytes | None:
        return await self._broker.request(subject, payload, timeout_seconds)

    def request_all(
        self, subject: str, payload: bytes, heard: Callable[[bytes | None], None]
    ) -> AbstractAsyncContextManager[None]:
        return self._broker.request_all(subject, payload, heard)

    # -- one trainer, and its workers

    async def take_lease(self, attempt: int, identity: str) -> None:
        with asking("lease"):
            await make_lease_bucket(self._broker.jetstream, self._names)
            lease = Lease(self._broker, self._names, Holder(attempt, identity))
            await lease.acquire()
        self._lease = lease

    async def keep_lease(self) -> None:
        assert self._lease is not None, "it is taken first"
        with asking("lease"):
            await self._lease.keep()

    async def hear_heartbeats(self, heard: Callable[[Heartbeat], None], was_deaf: Callable[[], None]) -> None:
        async def on_message(message: Msg) -> None:
            try:
                heartbeat = parse_heartbeat(message.subject, message.data)
            except ValueError as error:
                self._refusals.add("heartbeat", f"{message.subject}: {error}")
                return
            heard(heartbeat)

        self._broker.on_reconnected = was_deaf
        with asking("heartbeats"):
            await self._broker.listen(self._names.heartbeat("*"), on_message)

    # -- streams

    async def prompts(self) -> StreamFacts | None:
        return await self._facts(self._names.prompt_stream)

    async def trajectories(self) -> StreamFacts | None:
        return await self._facts(self._names.trajectory_stream)

    async def _facts(self, stream: str) -> StreamFacts | None:
        with asking(f"stream {stream}"):
            info = await stream_info(self._broker.jetstream, stream)
        if info is None:
            return None
        return StreamFacts(
            identity=identity_of(info),
            last_sequence=info.state.last_seq,
            num_bytes=info.state.bytes,
            max_bytes=info.config.max_bytes or 0,
        )

    async def queued_tickets(self) -> set[int]:
        stream = self._names.prompt_stream
        with asking(f"stream {stream}"):
            info = await self._broker.jetstream.stream_info(stream, subjects_filter=self._names.prompt("*"))
        return queued_tickets(info.state.subjects or {}, self._refusals)

    async def make_streams(self, first_ticket: int | None, first_trajectory: int | None) -> None:
        chosen = {self._names.prompt_stream: first_ticket, self._names.trajectory_stream: first_trajectory}
        first_sequences = {stream: first for stream, first in chosen.items() if first is not None}
        with asking("making streams"):
            await make_streams(self._broker.jetstream, self._names, self._storage_bytes, first_sequences)

    async def delete_prompts(self) -> None:
        with asking("deleting prompts"):
            await delete_stream(self._broker.jetstream, self._names.prompt_stream)

    async def delete_trajectories(self) -> None:
        with asking("deleting trajectories"):
            await delete_stream(self._broker.jetstream, self._names.trajectory_stream)

    async def delete_streams(self) -> None:
        with asking("deleting streams"):
            lease_bucket = f"KV_{self._names.lease_bucket}"
            await delete_streams(self._broker.jetstream, self._names, keep=[lease_bucket])

    async def purge_trajectories(self, last_sequence: int) -> None:
        with asking("purging trajectories"):
            await self._broker.jetstream.purge_stream(self._names.trajectory_stream, seq=last_sequence + 1)

    async def put(self, key: str, data: bytes) -> None:
        with asking(f"key {key}"):
            await self._broker.jetstream.publish(f"$KV.{self._names.state_bucket}.{key}", data)

    # -- tickets and trajectories

    async def issue(self, payloads: Sequence[bytes], last_ticket: int) -> int:
        subject = self._names.prompt("x").removesuffix(".x")
        with asking("tickets"):
            return await self._broker.publish_fenced(subject, payloads, last_sequence=last_ticket)

    def read_trajectories(self, start_sequence: int) -> AsyncGenerator[StreamMessage, None]:
        stream = self._names.trajectory_stream
        return aiter(OrderedReader(self._broker, stream, start_sequence, self._refusals))

    async def last_delivered_ticket(self) -> int:
        delivered = (await self._prompt_consumer()).delivered
        assert delivered is not None
        return delivered.stream_seq

    async def hand_back(self, tickets: Iterable[int]) -> None:
        """See `TicketReturns`.

        A delivery is known by its ticket; the consumer's sequence only has to be one that it has reached.
        """
        delivered = (await self._prompt_consumer()).delivered
        assert delivered is not None
        prefix, reached = f"$JS.ACK.{self._names.prompt_stream}.{PROMPT_CONSUMER}", delivered.consumer_seq
        with asking("handing back"):
            for ticket in tickets:
                await self._broker.client.publish(f"{prefix}.1.{ticket}.{reached}.0.0", b"-NAK")

    async def _prompt_consumer(self) -> ConsumerInfo:
        with asking("consumer of prompts"):
            info: ConsumerInfo = await self._broker.jetstream.consumer_info(
                self._names.prompt_stream, PROMPT_CONSUMER
            )
        return info

    # -- held-out prompts

    async def ask(self, key: str, payload: bytes, message_id: str) -> None:
        await self._broker.publish(self._names.evaluation("ask", key), payload, message_id=message_id)

    async def drop_questions(self) -> None:
        with asking("dropping questions"):
            await self._broker.jetstream.purge_stream(
                self._names.evaluation_stream, subject=self._names.evaluation("ask", ">")
            )

    @contextlib.asynccontextmanager
    async def answers(self) -> AsyncIterator[Answers]:
        with asking("answers"):
            subscription = await self._broker.jetstream.pull_subscribe_bind(
                consumer=ANSWER_CONSUMER,
                stream=self._names.evaluation_stream,
                inbox_prefix=f"{self._names.inbox_prefix}.".encode(),
            )
        try:
            yield _PulledAnswers(subscription)
        finally:
            with asking("answers"):
                await subscription.unsubscribe()


def parse_heartbeat(subject: str, data: bytes) -> Heartbeat:
    """Return a worker's word. Its name becomes part of subjects, so it must be the one that it speaks under.

    Raises:
        ValueError: it is no heartbeat, or not that of the worker on whose subject it came.
    """
    heartbeat = decode(data, Heartbeat)
    if heartbeat.worker != subject.rpartition(".")[2]:
        raise ValueError(f"it names the worker {heartbeat.worker[:80]!r}")
    if heartbeat.engine_state not in ENGINE_STATES:
        raise ValueError(f"it names the engine's state {heartbeat.engine_state[:80]!r}")
    return heartbeat


def queued_tickets(subjects: Iterable[str], refusals: Refusals) -> set[int]:
    """Return the tickets that the subjects of the prompt stream name; others are counted and passed over."""
    tickets = set()
    for subject in subjects:
        word = subject.rpartition(".")[2]
        if word.isascii() and word.isdigit() and len(word) <= 18:
            tickets.add(int(word))
        else:
            refusals.add("message without a ticket in the prompt stream", subject)
    return tickets


class _PulledAnswers:
    def __init__(self, subscription: JetStreamContext.PullSubscription) -> None:
        self._subscription = subscription

    async def take(self) -> bytes | None:
        with asking("answers"):
            try:
                messages = await self._subscription.fetch(1, timeout=1)
            except nats.errors.TimeoutError:
                return None
            if not messages:
                return None
            await messages[0].ack()
        return messages[0].data
