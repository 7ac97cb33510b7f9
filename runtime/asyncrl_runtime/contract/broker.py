"""What trainer and workers ask of a broker: the two ends of a job's streams, and what may go wrong.

`transport/` answers with NATS JetStream, and nothing else in the runtime knows that it does. Another broker
can stand behind these Protocols: its users call nothing that is not in them.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, Self

from asyncrl_runtime.contract.messages import Heartbeat, ResumePoint


class TransportError(Exception):
    """The broker did not do what was asked within the deadline; asking again may succeed."""


class WrongLastSequence(TransportError):
    """A fenced publish found another sequence: the message is stored already, or someone else publishes."""


class PayloadTooLarge(ValueError):
    """A message that the server would refuse, closing the connection."""


@dataclass(frozen=True)
class StreamMessage:
    """One message of a stream."""

    sequence: int
    """Its place in the stream, from 1 on."""
    subject: str
    data: bytes
    message_id: str = ""
    """The id under which it was published; while the broker remembers it, it takes no other under this id."""


@dataclass(frozen=True)
class StreamFacts:
    """What the broker knows of one stream."""

    identity: str
    """What tells this stream from one that was made again under its name."""
    last_sequence: int
    num_bytes: int
    max_bytes: int


class Requests(Protocol):
    """Questions put to one process, or to all of a kind."""

    async def request(self, subject: str, payload: bytes, timeout_seconds: float) -> bytes | None:
        """Ask one process for an answer; None if none comes in time or nobody listens."""

    def request_all(
        self, subject: str, payload: bytes, heard: Callable[[bytes | None], None]
    ) -> AbstractAsyncContextManager[None]:
        """Ask all who listen, with one message; `heard` gets each answer that comes during the body.

        It gets None if nobody listens.
        """


class Connection(Protocol):
    """What both ends have in common."""

    @property
    def closed(self) -> asyncio.Event:
        """Set if the connection can never work again."""

    async def close(self) -> None:
        """Send what is buffered and disconnect; never waits long."""


class Trajectories(Protocol):
    """The trajectory stream, read."""

    def read_trajectories(self, start_sequence: int) -> AsyncGenerator[StreamMessage, None]:
        """Yield every message from a sequence on, once and in order, for ever, waiting through outages."""


class JobQueues(Trajectories, Protocol):
    """The streams, as the trainer makes and watches them. Every call may raise TransportError."""

    async def prompts(self) -> StreamFacts | None:
        """Return what is known of the prompt stream; None if there is none."""

    async def trajectories(self) -> StreamFacts | None:
        """Return what is known of the trajectory stream; None if there is none."""

    async def queued_tickets(self) -> set[int]:
        """Return the tickets that are in the prompt stream: not given out, or given out and not closed."""

    async def make_streams(self, first_ticket: int | None, first_trajectory: int | None) -> None:
        """Make what is missing of the job's streams; leave what is there.

        Args:
            first_ticket, first_trajectory: the first sequence of a stream that is made; None means 1.
        """

    async def delete_prompts(self) -> None:
        """Remove the prompt stream, if there is one."""

    async def delete_trajectories(self) -> None:
        """Remove the trajectory stream, if there is one."""

    async def delete_streams(self) -> None:
        """Remove everything of the job but the lease."""

    async def purge_trajectories(self, last_sequence: int) -> None:
        """Delete trajectories up to and including `last_sequence`."""

    async def put(self, key: str, data: bytes) -> None:
        """Keep a value of the job's state, and tell the workers that listen."""


class TicketReturns(Protocol):
    """How tickets that a dead worker held come back. Every call may raise TransportError."""

    async def last_delivered_ticket(self) -> int:
        """Return the highest ticket that any worker was given."""

    async def hand_back(self, tickets: Iterable[int]) -> None:
        """Have tickets delivered to other workers; nothing happens to one that is acknowledged."""


class TicketStreams(TicketReturns, Trajectories, Protocol):
    """Tickets on their way out, and what comes back, as the side tasks of the trainer see them."""

    async def issue(self, payloads: Sequence[bytes], last_ticket: int) -> int:
        """Append tickets in order, each only if it is the next of the stream.

        Args:
            payloads: at most 64.
            last_ticket: the stream's last sequence before the first of them.

        Returns:
            The stream's last sequence after them.

        Raises:
            WrongLastSequence: the stream is elsewhere; nothing after that message was stored.
            TransportError: not all were acknowledged; ask for the stream's last sequence and go on there.
        """


class Answers(Protocol):
    """Answers to held-out prompts, one after the other."""

    async def take(self) -> bytes | None:
        """Return the next answer, which does not come again; None if there is none for a second.

        Raises:
            TransportError: the broker or the stream is away; call again.
        """


class HeldOutQuestions(Protocol):
    """The evaluation stream as the trainer uses it. Every call may raise TransportError."""

    async def ask(self, key: str, payload: bytes, message_id: str) -> None:
        """Put a question once, however often it is sent under this id."""

    async def drop_questions(self) -> None:
        """Delete all questions that have no answer yet."""

    def answers(self) -> AbstractAsyncContextManager[Answers]:
        """Return the answers, to be taken while the context is open."""


class TrainerBroker(Connection, Requests, JobQueues, TicketStreams, HeldOutQuestions, Protocol):
    """The broker as rank 0 of the trainer uses it."""

    async def take_lease(self, attempt: int, identity: str) -> None:
        """Become the job's only trainer: at once over a lower attempt, else when its lease runs out.

        Raises:
            Superseded: a higher attempt holds it.
            TransportError: not acquired within the deadline.
        """

    async def keep_lease(self) -> None:
        """Renew the lease for ever, waiting through outages; nobody wakes it.

        Raises:
            Superseded: another trainer holds it.
        """

    async def hear_heartbeats(self, heard: Callable[[Heartbeat], None], was_deaf: Callable[[], None]) -> None:
        """Listen to the workers from now on.

        Args:
            heard: called with each heartbeat.
            was_deaf: called when a lost connection is back: what was said meanwhile has not been heard.
        """


class Delivery(Protocol):
    """A message in a worker's hands until it is acknowledged or handed back. Its verbs raise nothing."""

    @property
    def is_ticket(self) -> bool:
        """Whether the message is a ticket; if not, it is a question of an evaluation."""

    @property
    def data(self) -> bytes: ...

    @property
    def sequence(self) -> int:
        """The message's place in the stream: a ticket's number."""

    @property
    def is_redelivered(self) -> bool:
        """Whether somebody had it before: there may be a result, or a part of one."""

    async def acknowledge(self) -> None:
        """Remove the message from the queue; if that fails, the message comes again."""

    async def hand_back(self, delay_seconds: float = 0) -> None:
        """Give the message to the next worker that pulls."""

    async def keep_alive(self) -> None:
        """Tell the broker that the work goes on, or it gives the message to another worker."""

    async def renew(self, again: Self) -> None:
        """Go on under a second delivery of this message to the same worker; the first is void."""


class DeliverySource(Protocol):
    """A queue that workers pull from."""

    @property
    def alive_seconds(self) -> float:
        """The time within which a delivery must be kept alive again, in seconds."""

    async def take(self) -> Delivery | None:
        """Wait a moment for one message; None if there is none, or no broker, or no stream yet."""


class ResultStore(Protocol):
    """The place where a worker finds and leaves what became of a ticket."""

    async def is_stored(self, ticket: int) -> bool:
        """Return whether a whole trajectory of this ticket is in the stream already."""

    async def publish_trajectory(
        self, ticket: int, sample: int | None, payload: bytes, message_id: str
    ) -> None:
        """Store a message once, however often it is sent under this id.

        Args:
            sample: the sample's index; None for a whole group.

        Raises:
            PayloadTooLarge: nothing was sent.
            TransportError: not acknowledged within the deadline; it may still be stored later.
        """

    async def publish_answer(self, key: str, payload: bytes) -> None:
        """Store an answer to held-out prompts once; raises as `publish_trajectory` does."""

    async def write_resume_point(self, resume: ResumePoint) -> None:
        """Keep what a ticket that is handed back has earned; if that fails, its tokens are lost."""

    async def read_resume_point(self, ticket: int) -> ResumePoint | None:
        """Return what is kept of a ticket; None if nothing can be had."""

    async def delete_resume_point(self, ticket: int) -> None:
        """Forget what is kept of a ticket."""


class WorkerBroker(Connection, ResultStore, Protocol):
    """The broker as a worker uses it."""

    async def beat(self, latest: Callable[[], Heartbeat], seconds: float) -> None:
        """Tell the trainer every `seconds` that this worker lives, until cancelled; waits through outages.

        Args:
            latest: returns what to say; called from another thread, since user code may block this one.
        """

    def beat_now(self) -> None:
        """Have `beat` tell it at once, since something is waited for."""

    async def answer_requests(self, answer: Callable[[bytes], Awaitable[bytes]]) -> None:
        """Answer what this worker is asked from now on, one request after the other."""

    async def hear_state(self, heard: Callable[[str, bytes], None]) -> None:
        """Listen to changes of the job's state, told as key and value."""

    async def state(self, key: str) -> bytes | None:
        """Return a value of the job's state; None if it was never put.

        Raises:
            TransportError: the broker is away.
        """

    async def tickets(self) -> DeliverySource:
        """Return the queue of tickets, whose stream need not be there yet."""

    async def questions(self) -> DeliverySource:
        """Return the queue of held-out prompts, whose stream need not be there yet."""
