"""What workers hold, and how it is taken back from the dead.

`ack_wait` is long, because a broker outage beyond it would redeliver every ticket in flight. So a dead
worker's tickets come back another way: anybody may publish a NAK to the acknowledgement subject of a
delivery (redelivered in 2.5 ms, measured). What a worker holds lies under a key without time to live, so
that a restarted controller knows it too. NAKs are not fenced: one that comes late makes a ticket sampled
twice and trained once.
"""

import logging
from collections.abc import Callable, Mapping

import nats.js.errors
from nats.js.kv import KeyValue

from asyncrl_api.names import JobNames
from asyncrl_runtime.contract.messages import Heartbeat, HeldTickets, decode, encode
from asyncrl_runtime.transport.broker import TRANSIENT, Broker

log = logging.getLogger(__name__)

SILENCE_SECONDS = 3.0
"""A worker that says nothing for so long is dead; it speaks every second."""


class HeldRecord:
    """A worker's own record of what it holds."""

    def __init__(self, bucket: KeyValue, worker: str, incarnation: str) -> None:
        self._bucket = bucket
        self._worker = worker
        self._incarnation = incarnation

    async def write(self, deliveries: Mapping[int, str]) -> None:
        """Store what is held now. Entries that are closed meanwhile do no harm: their NAK is ignored."""
        held = HeldTickets(worker=self._worker, incarnation=self._incarnation, deliveries=dict(deliveries))
        try:
            await self._bucket.put(key_of(self._worker), encode(held))
        except (*TRANSIENT, nats.js.errors.APIError) as error:
            log.warning("what this worker holds was not recorded: %s: %s", type(error).__name__, error)


def key_of(worker: str) -> str:
    return f"held.{worker}"


async def hand_back_all(broker: Broker, bucket: KeyValue, worker: str) -> int:
    """NAK everything that a dead `worker` held, then delete its record.

    Returns:
        How many deliveries were handed back.
    """
    try:
        entry = await bucket.get(key_of(worker))
    except nats.js.errors.NotFoundError:
        return 0
    if entry.value is None:
        return 0
    held = decode(entry.value, HeldTickets)
    for ack_subject in held.deliveries.values():
        await broker.client.publish(ack_subject, b"-NAK")
    try:
        await bucket.delete(key_of(worker), last=entry.revision)
    except nats.js.errors.APIError as error:
        log.info("record of %s changed while it was reaped: %s", worker, error)
    return len(held.deliveries)


class Fleet:
    """Who is alive, by their heartbeats. Pure but for the clock that is passed in."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started = clock()
        self._last: dict[str, tuple[float, Heartbeat]] = {}

    def heard(self, heartbeat: Heartbeat) -> None:
        self._last[heartbeat.worker] = (self._clock(), heartbeat)

    def seconds_heard(self) -> float:
        """How long this controller has been listening."""
        return self._clock() - self._started

    @property
    def living(self) -> list[Heartbeat]:
        """The last word of every worker that is not silent, in order of their names."""
        now = self._clock()
        alive = [beat for heard, beat in self._last.values() if now - heard < SILENCE_SECONDS]
        return sorted(alive, key=lambda beat: beat.worker)

    def is_silent(self, worker: str) -> bool:
        """Whether a worker is dead. One never heard is given SILENCE_SECONDS from this controller's start."""
        heard, _ = self._last.get(worker, (self._started, None))
        return self._clock() - heard >= SILENCE_SECONDS


class Reaper:
    """Hands back what dead workers held."""

    def __init__(self, broker: Broker, names: JobNames, bucket: KeyValue, fleet: Fleet) -> None:
        self._broker = broker
        self._bucket = bucket
        self._fleet = fleet
        self._stream = f"KV_{names.live_bucket}"
        self._prefix = f"$KV.{names.live_bucket}."

    async def reap(self) -> int:
        """Do it once. Returns how many deliveries were handed back.

        Raises:
            one of broker.TRANSIENT or APIError: the broker is away; call again.
        """
        total = 0
        info = await self._broker.jetstream.stream_info(self._stream, subjects_filter=f"{self._prefix}held.>")
        for subject in info.state.subjects or {}:
            worker = subject.removeprefix(f"{self._prefix}held.")
            if not self._fleet.is_silent(worker):
                continue
            if count := await hand_back_all(self._broker, self._bucket, worker):
                log.warning("worker %s is silent: handed back %d tickets", worker, count)
                total += count
        return total
