"""Keeps what a ticket had earned when it was handed back, for whoever takes it next: key `part.<ticket>`."""

import logging

import nats.js.errors
from nats.js.kv import KeyValue

from asyncrl_api.names import JobNames
from asyncrl_runtime.contract.broker import PayloadTooLarge
from asyncrl_runtime.contract.messages import ResumePoint, decode, encode
from asyncrl_runtime.contract.refused import Refusals
from asyncrl_runtime.transport.broker import MALFORMED, TRANSIENT, Broker

log = logging.getLogger(__name__)


class ResumePoints:
    """The resume points of a job. Losing one costs its tokens and nothing else, so nothing here is raised."""

    def __init__(self, broker: Broker, names: JobNames, bucket: KeyValue) -> None:
        self._broker = broker
        self._names = names
        self._bucket = bucket
        self._refusals = Refusals()

    async def write(self, resume: ResumePoint) -> None:
        data = encode(resume)
        try:
            self._broker.check_size(data)
            await self._bucket.put(f"part.{resume.ticket}", data)
        except (PayloadTooLarge, *TRANSIENT, nats.js.errors.APIError) as error:
            log.warning("ticket %d: the resume point and its tokens are lost: %s", resume.ticket, error)

    async def read(self, ticket: int) -> ResumePoint | None:
        try:
            entry = await self._bucket.get(f"part.{ticket}")
        except (*TRANSIENT, *MALFORMED, nats.js.errors.APIError):
            return None
        if not entry.value:
            return None
        try:
            return decode(entry.value, ResumePoint)
        except ValueError as error:
            self._refusals.add("resume point", f"ticket {ticket}: {error}")
            return None

    async def delete(self, ticket: int) -> None:
        """Delete without leaving a marker: there would be one for every ticket that ever came back."""
        bucket = self._names.state_bucket
        try:
            await self._broker.jetstream.purge_stream(f"KV_{bucket}", subject=f"$KV.{bucket}.part.{ticket}")
        except (*TRANSIENT, *MALFORMED, nats.js.errors.APIError) as error:
            log.info("ticket %d: the resume point was not deleted: %s", ticket, error)
