"""A worker's signs of life, from a thread and a connection of their own: user code cannot hold them up.

Python code that blocks leaves the thread its turn every few milliseconds. C code that never gives up the
interpreter's lock, a regular expression without end, say, does hold the thread up too.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable

from asyncrl_api.names import JobNames, NatsAddress
from asyncrl_runtime.contract.bell import Bell
from asyncrl_runtime.contract.broker import TransportError
from asyncrl_runtime.contract.messages import Heartbeat, encode
from asyncrl_runtime.transport.broker import Broker, asking

log = logging.getLogger(__name__)


class Heartbeats:
    """Publishes what `latest` returns every `seconds`, and when told to, until `run` is cancelled."""

    def __init__(
        self,
        address: NatsAddress,
        names: JobNames,
        worker: str,
        latest: Callable[[], Heartbeat],
        seconds: float,
    ) -> None:
        self._address = address
        self._names = names
        self._worker = worker
        self._latest = latest
        self._seconds = seconds
        self._stopping = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        """The thread's."""
        self._due = Bell()

    def now(self) -> None:
        """Have the next one published at once, if the thread runs; called from another."""
        with contextlib.suppress(RuntimeError):  # its loop has just been closed
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._due.ring)

    async def run(self) -> None:
        """Publish in the thread until cancelled, through outages of the broker; raise what ends it."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def publish() -> None:
            try:
                asyncio.run(self._publish())
            except Exception as error:  # for the loop that has started it
                loop.call_soon_threadsafe(ended.set_exception, error)

        # It is not waited for at the end: it may be waiting for a server.
        threading.Thread(target=publish, name="heartbeats", daemon=True).start()
        try:
            await ended
        finally:
            self._stopping.set()

    async def _publish(self) -> None:
        self._loop = asyncio.get_running_loop()
        while not self._stopping.is_set():
            try:
                broker = await Broker.connect(self._address, self._names, f"{self._worker}-heartbeats")
            except TransportError as error:
                log.info("heartbeats: %s", error)
                continue
            try:
                await self._publish_through(broker)
            finally:
                await broker.close()

    async def _publish_through(self, broker: Broker) -> None:
        """Publish until the connection is closed for good. A lost one comes back by itself."""
        subject = self._names.heartbeat(self._worker)
        while not self._stopping.is_set() and not broker.closed.is_set():
            try:
                with asking("heartbeat"):
                    await broker.client.publish(subject, encode(self._latest()))
            except TransportError as error:
                log.info("%s", error)
            await self._due.wait(self._seconds)
