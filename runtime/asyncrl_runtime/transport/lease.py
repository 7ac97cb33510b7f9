"""Keeps a job to one controller at a time: a key with a time to live, renewed by compare-and-set.

The lease keeps two trainers of one attempt apart; between attempts the higher number wins at once, because
whoever starts a later attempt has made sure, or does not care, that the earlier one is gone. The ticket
fence and the ledger hold even where a lease does not.
"""

import asyncio
import logging

import msgspec
import nats.errors
import nats.js.errors

from asyncrl_api.names import JobNames
from asyncrl_runtime.history.ledger_writer import Superseded
from asyncrl_runtime.transport.broker import MALFORMED, TRANSIENT, WRONG_LAST_SEQUENCE, Broker

log = logging.getLogger(__name__)

KEY = "trainer"
TIME_TO_LIVE_SECONDS = 10
RENEW_SECONDS = 3.0


class Holder(msgspec.Struct, frozen=True):
    """The value of the key."""

    attempt: int
    identity: str
    """The name of the process, so that two processes of one attempt are told apart."""


def parse_holder(data: bytes) -> Holder | None:
    """Return who holds the lease; None for a value that names nobody, which is written over."""
    if not data:
        return None
    try:
        return msgspec.json.decode(data, type=Holder)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        log.warning("lease: its value names no holder, and is written over: %s: %r", error, data[:80])
        return None


class _HeldByAnother(Exception):
    """Another process holds the lease. The time to live ends that if the process is gone."""


class Lease:
    """The lease on a job, held by the controller from `acquire` on as long as `keep` runs."""

    def __init__(self, broker: Broker, names: JobNames, holder: Holder) -> None:
        self._broker = broker
        self._stream = f"KV_{names.lease_bucket}"
        self._subject = f"$KV.{names.lease_bucket}.{KEY}"
        self._holder = holder
        self._revision = 0

    async def acquire(self, deadline_seconds: float = 60) -> None:
        """Take the lease: at once from a lower attempt, after its time to live from the same attempt.

        Raises:
            Superseded: a higher attempt holds it.
            TransportError: not acquired within the deadline.
        """

        async def attempt() -> None:
            if not await self._try_take():
                raise _HeldByAnother(f"another process of attempt {self._holder.attempt} holds it")

        await self._broker.retry(attempt, f"lease {self._subject}", deadline_seconds, _HeldByAnother)

    async def keep(self) -> None:
        """Renew for ever. A lease that merely ran out, or was lost with the broker's files, is taken again.

        Consumes nothing; produces a newer revision of the key every RENEW_SECONDS. It waits for the broker's
        answer and for the next turn; nobody wakes it. An outage is waited for.

        Raises:
            Superseded: a higher attempt, or another process of this one, holds it.
        """
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            try:
                if not await self._write(self._revision):
                    await self._take_again()
            except (*TRANSIENT, *MALFORMED, nats.js.errors.APIError) as error:
                log.warning("lease: not renewed: %s: %s", type(error).__name__, error)

    async def _take_again(self) -> None:
        if not await self._try_take():
            holder, _ = await self._read()
            if holder is not None:
                raise Superseded(f"the lease is held by attempt {holder.attempt} ({holder.identity})")

    async def _try_take(self) -> bool:
        holder, revision = await self._read()
        if holder is not None and holder.attempt > self._holder.attempt:
            raise Superseded(f"attempt {holder.attempt} holds the lease; this is {self._holder.attempt}")
        if holder is not None and holder.attempt == self._holder.attempt and holder != self._holder:
            return False
        return await self._write(revision)

    async def _read(self) -> tuple[Holder | None, int]:
        """Return the holder and the key's revision; (None, 0) where there is none."""
        try:
            message = await self._broker.jetstream.get_last_msg(self._stream, self._subject, direct=True)
        except nats.js.errors.NotFoundError:
            return None, 0
        revision = message.seq or 0
        return parse_holder(message.data or b""), revision

    async def _write(self, revision: int) -> bool:
        headers = {
            "Nats-TTL": str(TIME_TO_LIVE_SECONDS),
            "Nats-Expected-Last-Subject-Sequence": str(revision),
        }
        payload = msgspec.json.encode(self._holder)
        try:
            ack = await self._broker.jetstream.publish(self._subject, payload, headers=headers)
        except nats.js.errors.APIError as error:
            if error.err_code == WRONG_LAST_SEQUENCE:
                return False
            raise
        self._revision = ack.seq
        return True
