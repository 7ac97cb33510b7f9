"""Reads the trajectory stream in order, every message once, whatever happens to the connection.

An ack-none consumer is fast and leaves the position with the reader, but the server believes delivered
what a cut connection or a full client buffer has dropped. So consumer sequences must have no hole; after
one, or after silence, the consumer is opened again behind the last message seen (facts: 42 cuts in 300
messages, all received once and in order).
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import api

from asyncrl_runtime.transport.broker import TRANSIENT, Broker

log = logging.getLogger(__name__)

PULL_MESSAGES = 256
PULL_BYTES = 32 * 2**20
"""Of one pull; far below what the client buffers, since it drops what does not fit."""
PULL_SECONDS = 5.0
HEARTBEAT_SECONDS = 0.5


@dataclass(frozen=True)
class StreamMessage:
    sequence: int
    """In the stream."""
    subject: str
    data: bytes


class OrderedReader:
    """Iterates over a stream's messages from a sequence on, for ever.

    Waits for new messages, and through an outage; while the stream is gone it waits for one of the same
    name that has the next sequence. Ends only when its task is cancelled or `stop` is called.
    """

    def __init__(self, broker: Broker, stream: str, start_sequence: int) -> None:
        self._broker = broker
        self._stream = stream
        self.next_sequence = start_sequence
        """Of the first message not seen yet."""
        self.num_holes = 0
        self.num_reopened = 0
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    async def __aiter__(self) -> AsyncIterator[StreamMessage]:
        while not self._stopped:
            try:
                consumer = await self._open()
            except (*TRANSIENT, nats.js.errors.APIError) as error:
                log.info("reader of %s: %s: %s; waiting", self._stream, type(error).__name__, error)
                await asyncio.sleep(0.25)
                continue
            inbox = self._broker.client.new_inbox()
            subscription = await self._broker.client.subscribe(inbox)
            try:
                async for message in self._consume(consumer, inbox, subscription):
                    yield message
            finally:
                await self._close(subscription, consumer)
            self.num_reopened += 1

    async def _open(self) -> str:
        info = await self._broker.jetstream.add_consumer(
            self._stream,
            api.ConsumerConfig(
                ack_policy=api.AckPolicy.NONE,
                deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE,
                opt_start_seq=self.next_sequence,
                inactive_threshold=300,
                mem_storage=True,
                num_replicas=1,
            ),
        )
        return str(info.name)

    async def _consume(
        self, consumer: str, inbox: str, subscription: Subscription
    ) -> AsyncIterator[StreamMessage]:
        """Yield messages until the consumer cannot be trusted any more."""
        consumer_sequence, left = 0, 0
        while not self._stopped:
            if left == 0:
                await self._pull(consumer, inbox)
                left = PULL_MESSAGES
            try:
                message = await subscription.next_msg(timeout=3 * HEARTBEAT_SECONDS)
            except nats.errors.TimeoutError:
                return  # neither message nor heartbeat: the pull or the consumer is gone
            status = (message.headers or {}).get("Status") if not message.data else None
            if status == "100":
                continue
            if status is not None:
                if status not in ("404", "408", "409") or "Deleted" in _description(message):
                    return
                left = 0  # the pull ran out
                continue
            metadata = message.metadata
            if metadata.sequence.consumer != consumer_sequence + 1:
                log.warning("reader of %s: messages lost before %s", self._stream, metadata.sequence.stream)
                self.num_holes += 1
                return
            consumer_sequence += 1
            left -= 1
            self.next_sequence = metadata.sequence.stream + 1
            yield StreamMessage(metadata.sequence.stream, message.subject, message.data)

    async def _pull(self, consumer: str, inbox: str) -> None:
        request = {
            "batch": PULL_MESSAGES,
            "max_bytes": PULL_BYTES,
            "expires": int(PULL_SECONDS * 1e9),
            "idle_heartbeat": int(HEARTBEAT_SECONDS * 1e9),
        }
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{consumer}"
        await self._broker.client.publish(subject, json.dumps(request).encode(), reply=inbox)

    async def _close(self, subscription: Subscription, consumer: str) -> None:
        try:
            await subscription.unsubscribe()
            await self._broker.jetstream.delete_consumer(self._stream, consumer)
        except (nats.errors.Error, nats.js.errors.APIError, OSError) as error:
            log.debug("reader of %s: consumer %s left to expire: %s", self._stream, consumer, error)


def _description(message: Msg) -> str:
    return (message.headers or {}).get("Description", "")
