"""The queue that workers pull tickets from: one at a time, oldest first, kept alive while worked on."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Self

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from asyncrl_api.names import ASK_CONSUMER, PROMPT_CONSUMER, JobNames
from asyncrl_runtime.contract.refused import Refusals
from asyncrl_runtime.transport.broker import MALFORMED, TRANSIENT, Broker
from asyncrl_runtime.transport.streams import (
    ACK_WAIT_SECONDS,
    QUESTION_ACK_WAIT_SECONDS,
)

log = logging.getLogger(__name__)

TAKE_SECONDS = 2.0
"""How long one pull waits. A server restart loses a waiting pull without a word, so it must be short."""
TICKET_ALIVE_SECONDS = ACK_WAIT_SECONDS / 5
QUESTION_ALIVE_SECONDS = QUESTION_ACK_WAIT_SECONDS / 5
"""The time between two signs that the work on a message goes on."""


class NatsDelivery:
    """A message in this worker's hands until it is acknowledged or handed back."""

    def __init__(self, message: Msg, is_ticket: bool) -> None:
        """Raises ValueError if no stream has delivered the message: others may write to our inbox too."""
        self._message = message
        self.is_ticket = is_ticket
        """Whether the message is from the prompt stream, not a question of an evaluation."""
        try:
            self._metadata = message.metadata
        except (nats.errors.Error, ValueError, IndexError, OverflowError, OSError) as error:
            raise ValueError(f"{message.subject}: reply {message.reply!r}: {error}") from error

    @property
    def data(self) -> bytes:
        return self._message.data

    @property
    def sequence(self) -> int:
        """The message's place in the stream: the ticket's number."""
        return self._metadata.sequence.stream

    @property
    def is_redelivered(self) -> bool:
        """Whether somebody had it before: there may be a result, or a part of one."""
        return self._metadata.num_delivered > 1

    async def acknowledge(self, attempts: int = 3) -> None:
        """Remove the message from the queue, and know that it is.

        If the broker does not answer, it is left there: the message then comes again, and whoever gets it
        finds the result stored.
        """
        for attempt in range(attempts):
            try:
                await self._message.ack_sync(timeout=2)
                return
            except nats.errors.MsgAlreadyAckdError:
                return
            except TRANSIENT as error:
                log.info("ticket %s: ack %d: %s", self.sequence, attempt + 1, type(error).__name__)
        log.warning("ticket %s: not acknowledged; it will be delivered again", self.sequence)

    async def hand_back(self, delay_seconds: float = 0) -> None:
        """Give the message to the next worker that pulls."""
        try:
            await self._message.nak(delay=delay_seconds or None)
        except (*TRANSIENT, nats.errors.Error) as error:
            log.warning("ticket %s: not handed back: %s", self.sequence, error)

    async def keep_alive(self) -> None:
        """Tell the broker that the work goes on."""
        try:
            await self._message.in_progress()
        except (*TRANSIENT, nats.errors.Error) as error:
            log.info("ticket %s: not kept alive: %s", self.sequence, error)

    async def renew(self, again: Self) -> None:
        """Go on under a second delivery of this message, by which it is acknowledged from now on."""
        self._message = again._message
        await self.keep_alive()


class TicketQueue:
    """The worker's end of the prompt stream, or of the evaluation stream's questions."""

    def __init__(
        self, subscription: JetStreamContext.PullSubscription, stream: str, has_tickets: bool
    ) -> None:
        self._subscription = subscription
        self._stream = stream
        self._has_tickets = has_tickets
        self._quiet_until = 0.0
        self._refusals = Refusals()
        self.alive_seconds = TICKET_ALIVE_SECONDS if has_tickets else QUESTION_ALIVE_SECONDS

    @classmethod
    async def of_prompts(cls, broker: Broker, names: JobNames) -> "TicketQueue":
        return await cls._bind(broker, names, names.prompt_stream, PROMPT_CONSUMER)

    @classmethod
    async def of_evaluation(cls, broker: Broker, names: JobNames) -> "TicketQueue":
        return await cls._bind(broker, names, names.evaluation_stream, ASK_CONSUMER)

    @classmethod
    async def _bind(cls, broker: Broker, names: JobNames, stream: str, consumer: str) -> "TicketQueue":
        # Binding asks nothing of the server, so it works before the controller has made the stream.
        prefix = f"{names.inbox_prefix}.".encode()
        subscription = await broker.jetstream.pull_subscribe_bind(
            consumer=consumer, stream=stream, inbox_prefix=prefix
        )
        return cls(subscription, stream, consumer == PROMPT_CONSUMER)

    async def take(self, clock: Callable[[], float] = time.monotonic) -> NatsDelivery | None:
        """Wait up to TAKE_SECONDS for one message; None if there is none, or no broker, or no stream yet."""
        try:
            messages = await self._subscription.fetch(1, timeout=TAKE_SECONDS)
        except nats.errors.TimeoutError:
            return None
        except (*TRANSIENT, *MALFORMED, nats.js.errors.APIError) as error:
            if clock() >= self._quiet_until:
                log.info("%s: %s: %s; waiting", self._stream, type(error).__name__, error)
                self._quiet_until = clock() + 10
            await asyncio.sleep(0.25)
            return None
        try:
            return NatsDelivery(messages[0], self._has_tickets) if messages else None
        except ValueError as error:
            self._refusals.add("message of no stream", str(error))
            return None


async def is_stored(broker: Broker, names: JobNames, ticket: int) -> bool:
    """Return whether a whole trajectory of this ticket is in the stream already."""
    try:
        await broker.jetstream.get_last_msg(names.trajectory_stream, names.trajectory(ticket), direct=True)
    except (*TRANSIENT, nats.js.errors.APIError):
        return False
    return True
