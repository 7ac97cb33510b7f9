"""A broker in the memory of one process: contract/broker.py says what each call does.

It does what NATS does for a job, and tests/integration/test_brokers.py holds the two to each other. Nothing
here is random or reads a wall clock; time is that of the event loop.
"""

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Self

from asyncrl_api.names import JobNames
from asyncrl_api.trajectory_room import TRAJECTORY_SHARE
from asyncrl_runtime.contract.bell import Bell
from asyncrl_runtime.contract.broker import (
    Answers,
    StreamFacts,
    StreamMessage,
    TransportError,
    WrongLastSequence,
)
from asyncrl_runtime.contract.messages import Heartbeat, ResumePoint, decode, encode
from asyncrl_runtime.history.ledger_writer import Superseded
from asyncrl_runtime.transport.broker import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS
from asyncrl_runtime.transport.lease import RENEW_SECONDS, TIME_TO_LIVE_SECONDS
from asyncrl_runtime.transport.streams import (
    ACK_WAIT_SECONDS,
    QUESTION_ACK_WAIT_SECONDS,
)
from asyncrl_runtime.transport.ticket_queue import (
    QUESTION_ALIVE_SECONDS,
    TAKE_SECONDS,
    TICKET_ALIVE_SECONDS,
)

LATENCY_SECONDS = 0.0005
"""What a message takes from one end to the other."""
PUBLISH_SECONDS = 300.0
"""How long a publish is tried again while there is no stream, or no room in it."""
LEASE_SECONDS = 60.0
"""How long a lease is waited for that another process of the same attempt holds."""
ANSWER_SECONDS = 1.0
NO_STREAM_SECONDS = 0.25


class _News:
    """Wakes everybody who waits; there is no state, so whoever waits looks first."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        await self._event.wait()


class _Stream:
    """Messages by sequence; each id is stored once.

    Args:
        first_sequence: the sequence of its first message.
        ids: the ids of what is stored, and was.
    """

    def __init__(self, number: int, first_sequence: int, max_bytes: int, ids: set[str]) -> None:
        self.identity = f"stream {number}"
        self.messages: dict[int, StreamMessage] = {}
        self.last_sequence = first_sequence - 1
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._ids = ids

    def has_room(self, data: bytes) -> bool:
        return self.num_bytes + len(data) <= self.max_bytes

    def append(self, subject: str, data: bytes, message_id: str = "") -> int | None:
        """Store a message and return its sequence; None if its id is known."""
        if message_id and message_id in self._ids:
            return None
        self._ids |= {message_id} - {""}
        self.last_sequence += 1
        self.messages[self.last_sequence] = StreamMessage(self.last_sequence, subject, data, message_id)
        self.num_bytes += len(data)
        return self.last_sequence

    def remove(self, sequence: int) -> None:
        if (message := self.messages.pop(sequence, None)) is not None:
            self.num_bytes -= len(message.data)

    def facts(self) -> StreamFacts:
        return StreamFacts(self.identity, self.last_sequence, self.num_bytes, self.max_bytes)


class _WorkQueue:
    """A stream whose messages are given to one taker at a time, and removed when they are acknowledged."""

    def __init__(self, stream: _Stream, ack_wait_seconds: float) -> None:
        self.stream = stream
        self.last_delivered = stream.last_sequence
        """The highest sequence that anybody was given."""
        self._ack_wait = ack_wait_seconds
        self._again: deque[int] = deque()
        self._deliveries: dict[int, int] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}
        """When each message that is given out comes again."""
        self._takers: deque[asyncio.Future[int]] = deque()

    def append(self, subject: str, data: bytes, message_id: str = "") -> int | None:
        sequence = self.stream.append(subject, data, message_id)
        self._serve()
        return sequence

    async def take(self, seconds: float) -> tuple[int, int] | None:
        """Return a sequence and how often it has been delivered; None if none came in time."""
        taker: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._takers.append(taker)
        self._serve()
        try:
            async with asyncio.timeout(seconds):
                sequence = await taker
        except TimeoutError:
            return None
        finally:
            if taker in self._takers:
                self._takers.remove(taker)
        return sequence, self._deliveries[sequence]

    def _serve(self) -> None:
        while self._takers and (sequence := self._next()) is not None:
            taker = self._takers.popleft()
            if taker.done():
                self._again.appendleft(sequence)
                continue
            self._deliveries[sequence] = self._deliveries.get(sequence, 0) + 1
            self._come_again(sequence, self._ack_wait)
            taker.set_result(sequence)

    def _next(self) -> int | None:
        while self._again:
            if (sequence := self._again.popleft()) in self.stream.messages:
                return sequence
        while self.last_delivered < self.stream.last_sequence:
            self.last_delivered += 1
            if self.last_delivered in self.stream.messages:
                return self.last_delivered
        return None

    def _come_again(self, sequence: int, seconds: float) -> None:
        if (timer := self._timers.pop(sequence, None)) is not None:
            timer.cancel()
        self._timers[sequence] = asyncio.get_running_loop().call_later(seconds, self._expire, sequence)

    def _expire(self, sequence: int) -> None:
        del self._timers[sequence]
        self._again.append(sequence)
        self._serve()

    def acknowledge(self, sequence: int) -> None:
        if (timer := self._timers.pop(sequence, None)) is not None:
            timer.cancel()
        self.stream.remove(sequence)

    def hand_back(self, sequence: int, delay_seconds: float = 0.0) -> None:
        """Have a message that is given out delivered again; nothing happens to any other."""
        if sequence in self._timers:
            self._come_again(sequence, delay_seconds)

    def keep_alive(self, sequence: int) -> None:
        if sequence in self._timers:
            self._come_again(sequence, self._ack_wait)

    def close(self) -> None:
        """Forget who was given what; takers wait in vain."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()


class _Holder:
    """Who holds the lease, and until when."""

    def __init__(self, attempt: int, identity: str, until: float) -> None:
        self.attempt, self.identity, self.until = attempt, identity, until


class MemoryBroker:
    """The streams and the state of one job. `trainer_end` and `worker_end` are what its users see.

    Args:
        storage_bytes: as the manifest's; trajectories may use a share of it.
        latency_seconds: how long a message takes.
    """

    def __init__(self, names: JobNames, storage_bytes: int, latency_seconds: float = LATENCY_SECONDS) -> None:
        self.names = names
        self.latency_seconds = latency_seconds
        self.state: dict[str, bytes] = {}
        self.prompts: _WorkQueue | None = None
        self.trajectories: _Stream | None = None
        self.questions: _WorkQueue | None = None
        self.answers: _WorkQueue | None = None
        self.news = _News()
        self.lease: _Holder | None = None
        self.heartbeats: list[Callable[[Heartbeat], None]] = []
        self.answerers: dict[str, Callable[[bytes], Awaitable[bytes]]] = {}
        self.workers: list[str] = []
        self.listeners: list[Callable[[str, bytes], None]] = []
        self._storage_bytes = storage_bytes
        self._numbers = itertools.count(1)
        self._busy: dict[str, asyncio.Lock] = {}

    def trainer_end(self) -> "MemoryTrainerEnd":
        return MemoryTrainerEnd(self)

    def worker_end(self, worker: str) -> "MemoryWorkerEnd":
        return MemoryWorkerEnd(self, worker)

    async def travel(self) -> None:
        """Let a message take its time."""
        await asyncio.sleep(self.latency_seconds)

    def make_streams(self, first_ticket: int | None, first_trajectory: int | None) -> None:
        if self.prompts is None:
            self.prompts = _WorkQueue(self._stream(first_ticket or 1, 0.1), ACK_WAIT_SECONDS)
        if self.trajectories is None:
            self.trajectories = self._stream(first_trajectory or 1, TRAJECTORY_SHARE)
        if self.questions is None or self.answers is None:
            ids: set[str] = set()  # of both, which NATS has in one stream
            self.questions = _WorkQueue(self._stream(1, 0.05, ids), QUESTION_ACK_WAIT_SECONDS)
            self.answers = _WorkQueue(self._stream(1, 0.05, ids), QUESTION_ACK_WAIT_SECONDS)
        self.news.ring()

    def _stream(self, first_sequence: int, share: float, ids: set[str] | None = None) -> _Stream:
        max_bytes = int(self._storage_bytes * share)
        return _Stream(next(self._numbers), first_sequence, max_bytes, set() if ids is None else ids)

    def delete(self, *names: str) -> None:
        for name in names:
            if isinstance(queue := getattr(self, name), _WorkQueue):
                queue.close()
            setattr(self, name, None)

    async def ask(self, subject: str, payload: bytes) -> bytes:
        """Have a question answered; each subject answers one after the other."""
        async with self._busy.setdefault(subject, asyncio.Lock()):
            await self.travel()
            reply = await self.answerers[subject](payload)
        await self.travel()
        return reply

    async def store(
        self, find: Callable[[], _Stream | _WorkQueue | None], subject: str, payload: bytes, message_id: str
    ) -> None:
        """Store a message once, and try again while there is no stream or no room in it.

        Raises:
            TransportError: there still is not at the deadline.
        """
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + PUBLISH_SECONDS, FIRST_PAUSE_SECONDS
        while True:
            await self.travel()
            place = find()
            stream = place.stream if isinstance(place, _WorkQueue) else place
            if place is not None and stream is not None and stream.has_room(payload):
                place.append(subject, payload, message_id)
                self.news.ring()
                return await self.travel()
            if loop.time() >= deadline:
                what = "no such stream" if stream is None else "the stream is full"
                raise TransportError(f"publish {message_id} on {subject}: {what}")
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


class _End:
    """What both ends have in common."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self.closed = asyncio.Event()

    async def close(self) -> None:
        pass


class MemoryTrainerEnd(_End):
    """A TrainerBroker."""

    def __init__(self, broker: MemoryBroker) -> None:
        super().__init__(broker)
        self._asked: set[asyncio.Task[None]] = set()

    async def request(self, subject: str, payload: bytes, timeout_seconds: float) -> bytes | None:
        if subject not in self._broker.answerers:
            return None
        try:
            # A worker goes on with what it was asked although nobody waits for its answer any more.
            asked = asyncio.ensure_future(self._broker.ask(subject, payload))
            async with asyncio.timeout(timeout_seconds):
                return await asyncio.shield(asked)
        except TimeoutError:
            return None

    @contextlib.asynccontextmanager
    async def request_all(
        self, subject: str, payload: bytes, heard: Callable[[bytes | None], None]
    ) -> AsyncIterator[None]:
        is_open = True
        ends = self._broker.workers if subject == self._broker.names.control_all else ()
        subjects = [self._broker.names.control(worker) for worker in ends]
        listening = [each for each in subjects if each in self._broker.answerers]

        async def ask(each: str) -> None:
            reply = await self._broker.ask(each, payload)
            if is_open:
                heard(reply)

        if not listening:
            heard(None)
        # Workers go on with what they were asked although nobody waits for their answers any more.
        self._asked |= {asyncio.ensure_future(ask(each)) for each in listening}
        try:
            yield
        finally:
            is_open = False
            self._asked = {task for task in self._asked if not task.done()}

    # -- one trainer, and its workers

    async def take_lease(self, attempt: int, identity: str) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + LEASE_SECONDS
        while not self._try_take(attempt, identity):
            if loop.time() >= deadline:
                raise TransportError(f"lease: another process of attempt {attempt} holds it")
            await asyncio.sleep(FIRST_PAUSE_SECONDS)

    def _try_take(self, attempt: int, identity: str) -> bool:
        now, held = asyncio.get_running_loop().time(), self._broker.lease
        if held is not None and held.until > now:
            if held.attempt > attempt:
                raise Superseded(f"attempt {held.attempt} holds the lease; this is {attempt}")
            if held.attempt == attempt and held.identity != identity:
                return False
        self._lease = self._broker.lease = _Holder(attempt, identity, now + TIME_TO_LIVE_SECONDS)
        return True

    async def keep_lease(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            held = self._broker.lease
            if held is self._lease:
                held.until = loop.time() + TIME_TO_LIVE_SECONDS
            elif held is not None and not self._try_take(self._lease.attempt, self._lease.identity):
                raise Superseded(f"the lease is held by attempt {held.attempt} ({held.identity})")

    async def hear_heartbeats(self, heard: Callable[[Heartbeat], None], was_deaf: Callable[[], None]) -> None:
        self._broker.heartbeats.append(heard)

    # -- streams

    async def prompts(self) -> StreamFacts | None:
        await self._broker.travel()
        return None if (queue := self._broker.prompts) is None else queue.stream.facts()

    async def trajectories(self) -> StreamFacts | None:
        await self._broker.travel()
        return None if (stream := self._broker.trajectories) is None else stream.facts()

    async def queued_tickets(self) -> set[int]:
        await self._broker.travel()
        return set(self._prompts().stream.messages)

    async def make_streams(self, first_ticket: int | None, first_trajectory: int | None) -> None:
        await self._broker.travel()
        self._broker.make_streams(first_ticket, first_trajectory)

    async def delete_prompts(self) -> None:
        self._broker.delete("prompts")

    async def delete_trajectories(self) -> None:
        self._broker.delete("trajectories")

    async def delete_streams(self) -> None:
        self._broker.delete("prompts", "trajectories", "questions", "answers")
        self._broker.state.clear()

    async def purge_trajectories(self, last_sequence: int) -> None:
        await self._broker.travel()
        if (stream := self._broker.trajectories) is None:
            raise TransportError("purging trajectories: there is no such stream")
        for sequence in [each for each in stream.messages if each <= last_sequence]:
            stream.remove(sequence)

    async def put(self, key: str, data: bytes) -> None:
        await self._broker.travel()
        self._broker.state[key] = data
        for heard in self._broker.listeners:
            heard(key, data)

    # -- tickets and trajectories

    def _prompts(self) -> _WorkQueue:
        if self._broker.prompts is None:
            raise TransportError("tickets: there is no such stream")
        return self._broker.prompts

    async def issue(self, payloads: Sequence[bytes], last_ticket: int) -> int:
        await self._broker.travel()
        queue = self._prompts()
        for payload in payloads:
            if queue.stream.last_sequence != last_ticket:
                raise WrongLastSequence(f"tickets: the last one is {queue.stream.last_sequence}")
            queue.append(self._broker.names.prompt(last_ticket + 1), payload)
            last_ticket += 1
        await self._broker.travel()
        return last_ticket

    async def read_trajectories(self, start_sequence: int) -> AsyncGenerator[StreamMessage, None]:
        following = start_sequence
        while True:
            stream = self._broker.trajectories
            if stream is None or stream.last_sequence < following:
                await self._broker.news.wait()
                continue
            if (message := stream.messages.get(following)) is not None:
                yield message
            following += 1

    async def last_delivered_ticket(self) -> int:
        await self._broker.travel()
        return self._prompts().last_delivered

    async def hand_back(self, tickets: Iterable[int]) -> None:
        await self._broker.travel()
        queue = self._prompts()
        for ticket in tickets:
            queue.hand_back(ticket)

    # -- held-out prompts

    async def ask(self, key: str, payload: bytes, message_id: str) -> None:
        subject = self._broker.names.evaluation("ask", key)
        await self._broker.store(lambda: self._broker.questions, subject, payload, message_id)

    async def drop_questions(self) -> None:
        await self._broker.travel()
        if (queue := self._broker.questions) is None:
            raise TransportError("dropping questions: there is no such stream")
        for sequence in list(queue.stream.messages):
            queue.acknowledge(sequence)

    @contextlib.asynccontextmanager
    async def answers(self) -> AsyncIterator[Answers]:
        yield _TakenAnswers(self._broker)


class _TakenAnswers:
    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker

    async def take(self) -> bytes | None:
        if (queue := self._broker.answers) is None:
            raise TransportError("answers: there is no such stream")
        if (taken := await queue.take(ANSWER_SECONDS)) is None:
            return None
        data = queue.stream.messages[taken[0]].data
        queue.acknowledge(taken[0])
        return data


class MemoryDelivery:
    """A Delivery."""

    def __init__(
        self, broker: MemoryBroker, queue: _WorkQueue, taken: tuple[int, int], is_ticket: bool
    ) -> None:
        self._broker = broker
        self._queue = queue
        self.sequence, num_delivered = taken
        self.data = queue.stream.messages[self.sequence].data
        self.is_redelivered = num_delivered > 1
        self.is_ticket = is_ticket

    async def acknowledge(self) -> None:
        await self._broker.travel()
        self._queue.acknowledge(self.sequence)
        await self._broker.travel()

    async def hand_back(self, delay_seconds: float = 0) -> None:
        await self._broker.travel()
        self._queue.hand_back(self.sequence, delay_seconds)

    async def keep_alive(self) -> None:
        await self._broker.travel()
        self._queue.keep_alive(self.sequence)

    async def renew(self, again: Self) -> None:
        self._queue = again._queue
        await self.keep_alive()


class _Source:
    """A DeliverySource."""

    def __init__(self, broker: MemoryBroker, *, has_tickets: bool) -> None:
        self._broker = broker
        self._has_tickets = has_tickets
        self.alive_seconds = TICKET_ALIVE_SECONDS if has_tickets else QUESTION_ALIVE_SECONDS

    async def take(self) -> MemoryDelivery | None:
        queue = self._broker.prompts if self._has_tickets else self._broker.questions
        if queue is None:
            await asyncio.sleep(NO_STREAM_SECONDS)
            return None
        if (taken := await queue.take(TAKE_SECONDS)) is None:
            return None
        delivery = MemoryDelivery(self._broker, queue, taken, self._has_tickets)
        await self._broker.travel()
        return delivery


class MemoryWorkerEnd(_End):
    """A WorkerBroker."""

    def __init__(self, broker: MemoryBroker, worker: str) -> None:
        super().__init__(broker)
        self._worker = worker
        self._due = Bell()

    # -- trainer and state

    async def beat(self, latest: Callable[[], Heartbeat], seconds: float) -> None:
        while True:
            await self._broker.travel()
            for heard in self._broker.heartbeats:
                heard(latest())
            await self._due.wait(seconds)

    def beat_now(self) -> None:
        self._due.ring()

    async def answer_requests(self, answer: Callable[[bytes], Awaitable[bytes]]) -> None:
        self._broker.answerers[self._broker.names.control(self._worker)] = answer
        self._broker.workers.append(self._worker)

    async def hear_state(self, heard: Callable[[str, bytes], None]) -> None:
        self._broker.listeners.append(heard)

    async def state(self, key: str) -> bytes | None:
        await self._broker.travel()
        return self._broker.state.get(key)

    # -- tickets and results

    async def tickets(self) -> _Source:
        return _Source(self._broker, has_tickets=True)

    async def questions(self) -> _Source:
        return _Source(self._broker, has_tickets=False)

    async def is_stored(self, ticket: int) -> bool:
        await self._broker.travel()
        subject, stream = self._broker.names.trajectory(ticket), self._broker.trajectories
        return stream is not None and any(each.subject == subject for each in stream.messages.values())

    async def publish_trajectory(
        self, ticket: int, sample: int | None, payload: bytes, message_id: str
    ) -> None:
        subject = self._broker.names.trajectory(ticket, sample)
        await self._broker.store(lambda: self._broker.trajectories, subject, payload, message_id)

    async def publish_answer(self, key: str, payload: bytes) -> None:
        subject = self._broker.names.evaluation("answer", key)
        await self._broker.store(lambda: self._broker.answers, subject, payload, key)

    async def write_resume_point(self, resume: ResumePoint) -> None:
        await self._broker.travel()
        self._broker.state[f"part.{resume.ticket}"] = encode(resume)

    async def read_resume_point(self, ticket: int) -> ResumePoint | None:
        await self._broker.travel()
        data = self._broker.state.get(f"part.{ticket}")
        return None if data is None else decode(data, ResumePoint)

    async def delete_resume_point(self, ticket: int) -> None:
        await self._broker.travel()
        self._broker.state.pop(f"part.{ticket}", None)
