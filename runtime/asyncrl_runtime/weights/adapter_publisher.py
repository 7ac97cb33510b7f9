"""Brings the adapters of a policy to its engines over the broker, since the broadcast knows no adapters."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from asyncrl_api.names import JobNames
from asyncrl_runtime.contract.broker import Requests
from asyncrl_runtime.contract.messages import AdapterChunk, ControlReply, LoadAdapter, PolicyVersion
from asyncrl_runtime.contract.refused import Refusals
from asyncrl_runtime.weights.engines import Engines, Member, Published
from asyncrl_runtime.weights.fleet import Fleet

log = logging.getLogger(__name__)

PART_BYTES = 4 * 2**20
"""The size of one part; a message of NATS holds 8 MB."""


@dataclass(frozen=True)
class Adapter:
    """A policy's adapters in the form of PEFT."""

    config: str
    """The text of adapter_config.json."""
    weights: bytes
    """The bytes of adapter_model.safetensors."""


AdapterSource = Callable[[], Awaitable[Adapter]]


class AdapterPublisher(Engines):
    """Brings engines to a version, all at the same time: no engine waits for another.

    Args:
        load: returns the adapters; called only if there is an engine to send them to.
        attempt: the trainer's attempt.
        num_bytes: the size of the adapters.
        timeout_seconds: the deadline of a phase; 0 scales it by the bytes.
        refusals: counts what arrives and is not taken.
    """

    def __init__(
        self,
        broker: Requests,
        names: JobNames,
        fleet: Fleet,
        load: AdapterSource,
        *,
        attempt: int,
        num_bytes: int,
        timeout_seconds: float = 0,
        refusals: Refusals | None = None,
    ) -> None:
        super().__init__(
            broker,
            names,
            fleet,
            attempt=attempt,
            num_bytes=num_bytes,
            timeout_seconds=timeout_seconds,
            refusals=refusals,
        )
        self._load = load

    async def publish(self, version: PolicyVersion, interrupt: str) -> Published:
        """See `Publisher`."""
        members = self.behind(version)
        if interrupt == "Drain":
            members = await self._drained(members, version)
        if not members:
            return Published()
        adapter = await self._load()
        sent = await asyncio.gather(*(self._send(each, version, adapter, interrupt) for each in members))
        failed = []
        for member, reply in zip(members, sent, strict=True):
            if reply is not None and reply.ok:
                self._got(member, version)
            else:
                log.warning("adapter %s: %s: %s", version, member[0], reply.message if reply else "no answer")
                self._at.pop(member, None)
                failed.append(member)
        self._remember_failures(failed)
        self._check_refusals()
        engines = tuple(worker for worker, engine in members if (worker, engine) not in failed)
        return Published(engines, tuple(worker for worker, _ in failed), num_epochs=1)

    async def _send(
        self, member: Member, version: PolicyVersion, adapter: Adapter, interrupt: str
    ) -> ControlReply | None:
        """Send the parts, then ask to load them; return the first answer that is not a yes, else the last."""
        for part in _parts(version, adapter.weights):
            reply = await self._ask_one(member, part, self._timeout)
            if reply is None or not reply.ok:
                return reply
        request = LoadAdapter(
            version=version,
            num_bytes=len(adapter.weights),
            config=adapter.config,
            interrupt=interrupt,
            timeout_seconds=self._timeout,
        )
        return await self._ask_one(member, request, self._timeout + 10)


def _parts(version: PolicyVersion, weights: bytes) -> Iterator[AdapterChunk]:
    for offset in range(0, len(weights), PART_BYTES):
        yield AdapterChunk(version=version, offset=offset, data=weights[offset : offset + PART_BYTES])
