"""Reads the trajectory stream in order, every message once, whatever happens to the connection.

An ack-none consumer is fast and leaves the position with the reader, but the server counts as
delivered what a cut connection or a full client buffer has dropped. So consumer sequences must have no hole;
after a hole, or after silence, the consumer is opened again behind the last message seen. With 42 cuts in 300
messages all were received once and in order (docs/decisions/0002-position-in-the-checkpoint.md).
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import api

from asyncrl_runtime.contract.broker import StreamMessage
from asyncrl_runtime.contract.refused import Refusals
from asyncrl_runtime.transport.broker import MALFORMED, TRANSIENT, Broker

log = logging.getLogger(__name__)

PULL_MESSAGES = 256
PULL_BYTES = 32 * 2**20
"""The bounds of one pull. Two pulls stay far below what the client buffers, as it drops what does not fit."""
PULL_AHEAD = PULL_MESSAGES // 2
"""How few messages may be left of a pull when the next is sent, so that the server need not wait for it."""
PULL_SECONDS = 5.0
HEARTBEAT_SECONDS = 0.5
HEARTBEAT = "100"
"""The status of a heartbeat. Its last consumer sequence alone shows the loss of the newest messages."""


class OrderedReader:
    """Iterates over a stream's messages from a sequence on, for ever.

    Consumes the stream; produces each message once and in order. Waits for new messages, with which the
    server answers its pulls, and through an outage; while the stream is gone, it waits for one of the same
    name that has the next sequence. Ends only when its task is cancelled or `stop` is called.
    """

    def __init__(
        self, broker: Broker, stream: str, start_sequence: int, refusals: Refusals | None = None
    ) -> None:
        self._broker = broker
        self._stream = stream
        self.next_sequence = start_sequence
        """The sequence of the first message not seen yet."""
        self.num_holes = 0
        self.num_reopened = 0
        self._refusals = refusals or Refusals()
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    async def __aiter__(self) -> AsyncGenerator[StreamMessage, None]:
        while not self._stopped:
            try:
                consumer = await self._open()
            except (*TRANSIENT, *MALFORMED, nats.js.errors.APIError) as error:
                log.info("reader of %s: %s: %s; waiting", self._stream, type(error).__name__, error)
                await asyncio.sleep(0.25)
                continue
            inbox = self._broker.client.new_inbox()
            arrivals: asyncio.Queue[Msg] = asyncio.Queue()  # bounded by the pulls
            # `next_msg` makes a task and a timer for every message, which would triple what reading costs.
            subscription = await self._broker.client.subscribe(inbox, cb=arrivals.put)
            try:
                async for message in self._consume(consumer, inbox, arrivals):
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
        self, consumer: str, inbox: str, arrivals: asyncio.Queue[Msg]
    ) -> AsyncIterator[StreamMessage]:
        """Yield messages until the consumer cannot be trusted any more."""
        consumer_sequence = 0
        left = 0  # messages still to come of what was pulled, two pulls at most
        while not self._stopped:
            if left <= PULL_AHEAD:
                await self._pull(consumer, inbox)
                left += PULL_MESSAGES
            message = await _next(arrivals)
            if message is None:
                return  # neither message nor heartbeat: the pull or the consumer is gone
            headers = message.headers or {}
            status = None if message.data else headers.get("Status")
            if status == HEARTBEAT:
                if _number(headers.get("Nats-Last-Consumer")) > consumer_sequence:
                    self._note_hole(f"up to {headers.get('Nats-Last-Stream')}")
                    return
                continue
            if status is not None:  # a pull is over
                if (not_delivered := headers.get("Nats-Pending-Messages")) is None:
                    return  # and so is the consumer
                left -= _number(not_delivered)
                continue
            place = _sequences(message.reply)
            if place is None:
                self._refusals.add("message of no stream", f"{message.subject}: {message.reply!r}")
                continue
            in_stream, in_consumer = place
            if in_consumer != consumer_sequence + 1:
                self._note_hole(f"before {in_stream}")
                return
            consumer_sequence += 1
            left -= 1
            self.next_sequence = in_stream + 1
            message_id = headers.get("Nats-Msg-Id", "")
            yield StreamMessage(in_stream, message.subject, message.data, message_id)

    def _note_hole(self, where: str) -> None:
        log.warning("reader of %s: messages lost %s", self._stream, where)
        self.num_holes += 1

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


async def _next(arrivals: asyncio.Queue[Msg]) -> Msg | None:
    """Return the next message, waiting for it no longer than three heartbeats take."""
    if not arrivals.empty():
        return arrivals.get_nowait()
    try:
        async with asyncio.timeout(3 * HEARTBEAT_SECONDS):
            return await arrivals.get()
    except TimeoutError:
        return None


def _sequences(reply: str) -> tuple[int, int] | None:
    """Return a message's place in the stream and in the consumer, from its reply subject (NATS ADR-15).

    `Msg.metadata` parses more of it, a date among others, and takes as long as decoding the message does.
    None: no stream has delivered it, for others may also write to our inbox.
    """
    tokens = reply.split(".")
    place = 5 if len(tokens) == 9 else 7  # after a domain and an account where servers name them
    found = tokens[place : place + 2]
    if tokens[:2] != ["$JS", "ACK"] or len(found) < 2 or not all(map(_is_number, found)):
        return None
    return int(found[0]), int(found[1])


def _number(text: str | None) -> int:
    """Return a number of a header; 0 for what is none."""
    return int(text) if text is not None and _is_number(text) else 0


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 20
