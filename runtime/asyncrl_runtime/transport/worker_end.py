"""A worker's end of the broker, on NATS JetStream: contract/broker.py says what each call does."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Self

import nats.js.errors
from nats.aio.msg import Msg
from nats.js.kv import KeyValue

from asyncrl_api.names import JobNames, NatsAddress
from asyncrl_runtime.contract.messages import Heartbeat, ResumePoint
from asyncrl_runtime.transport.broker import Broker, asking
from asyncrl_runtime.transport.heartbeats import Heartbeats
from asyncrl_runtime.transport.resume_points import ResumePoints
from asyncrl_runtime.transport.ticket_queue import TicketQueue, is_stored

BUCKET_SECONDS = 900.0
"""How long a worker waits for the trainer to make the job's streams: it may be loading a model."""


class WorkerEnd:
    """A WorkerBroker; make it with `connect`."""

    def __init__(
        self, broker: Broker, address: NatsAddress, names: JobNames, worker: str, state: KeyValue
    ) -> None:
        self._broker = broker
        self._address = address
        self._names = names
        self._worker = worker
        self._state = state
        self._resume_points = ResumePoints(broker, names, state)
        self._heartbeats: Heartbeats | None = None

    @classmethod
    async def connect(cls, address: NatsAddress, names: JobNames, worker: str) -> Self:
        """Connect, waiting for a server that is still starting, and for the trainer to make the job's state.

        Raises:
            TransportError: one of them is not there within its deadline.
        """
        broker = await Broker.connect(address, names, worker)
        bucket = names.state_bucket
        state = await broker.retry(
            lambda: broker.jetstream.key_value(bucket),
            f"bucket {bucket}",
            BUCKET_SECONDS,
            nats.js.errors.NotFoundError,
        )
        return cls(broker, address, names, worker, state)

    @property
    def closed(self) -> asyncio.Event:
        return self._broker.closed

    async def close(self) -> None:
        await self._broker.close()

    # -- trainer and state

    async def beat(self, latest: Callable[[], Heartbeat], seconds: float) -> None:
        self._heartbeats = Heartbeats(self._address, self._names, self._worker, latest, seconds)
        await self._heartbeats.run()

    def beat_now(self) -> None:
        if self._heartbeats is not None:
            self._heartbeats.now()

    async def answer_requests(self, answer: Callable[[bytes], Awaitable[bytes]]) -> None:
        one_by_one = asyncio.Lock()  # a probe waits for what the engine has not done yet

        async def on_message(message: Msg) -> None:
            async with one_by_one:
                said = await answer(message.data)
            if message.reply:  # otherwise nobody waits for it
                await message.respond(said)

        with asking("requests"):
            for subject in (self._names.control(self._worker), self._names.control_all):
                await self._broker.listen(subject, on_message)

    async def hear_state(self, heard: Callable[[str, bytes], None]) -> None:
        async def on_message(message: Msg) -> None:
            heard(message.subject.rpartition(".")[2], message.data)

        with asking("announcements"):
            await self._broker.listen(f"{self._names.announcements}.*", on_message)

    async def state(self, key: str) -> bytes | None:
        with asking(f"key {key}"):
            try:
                return (await self._state.get(key)).value
            except nats.js.errors.KeyNotFoundError:
                return None

    # -- tickets and results

    async def tickets(self) -> TicketQueue:
        return await TicketQueue.of_prompts(self._broker, self._names)

    async def questions(self) -> TicketQueue:
        return await TicketQueue.of_evaluation(self._broker, self._names)

    async def is_stored(self, ticket: int) -> bool:
        return await is_stored(self._broker, self._names, ticket)

    async def publish_trajectory(
        self, ticket: int, sample: int | None, payload: bytes, message_id: str
    ) -> None:
        await self._broker.publish(self._names.trajectory(ticket, sample), payload, message_id=message_id)

    async def publish_answer(self, key: str, payload: bytes) -> None:
        await self._broker.publish(self._names.evaluation("answer", key), payload, message_id=key)

    async def write_resume_point(self, resume: ResumePoint) -> None:
        await self._resume_points.write(resume)

    async def read_resume_point(self, ticket: int) -> ResumePoint | None:
        return await self._resume_points.read(ticket)

    async def delete_resume_point(self, ticket: int) -> None:
        await self._resume_points.delete(ticket)
