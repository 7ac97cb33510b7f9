"""The streams of a job as its trainer knows them: which are there, which are lost, and how they come back.

The life of a lost stream: `inspect`, which a side task calls, sees that the stream is gone, or is another one
under its name; or the training loop itself says through `requeue` that the prompt stream no longer fits the
books. Either sets `lost` and rings for the training loop. While anything is lost, no ticket is issued and
nothing is inspected. The training loop sees `lost` at its next boundary, saves what is trained, and calls
`mend`, which tells the books, has the recorded steps given up that were lost with the stream, and makes the
streams again. Nothing else clears `lost`.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from asyncrl_api.trajectory_room import FULL_SHARE
from asyncrl_runtime.contract.broker import JobQueues, StreamMessage, TransportError
from asyncrl_runtime.contract.messages import CurrentVersion, PolicyVersion, encode
from asyncrl_runtime.trainer.books.books import Books

log = logging.getLogger(__name__)

READ_SECONDS = 30.0
"""How long a trajectory that is stored is waited for."""


@dataclass(frozen=True)
class LostStreams:
    """Which streams are gone, or have been replaced by others of the same name."""

    trajectories: bool = False
    prompts: bool = False

    def __bool__(self) -> bool:
        return self.trajectories or self.prompts


class JobStreams:
    """Opens, watches and mends the streams, and puts into the job's state what the workers are told.

    Args:
        live_values: the fields marked L that workers are told, until `hand_on` is called with others.
    """

    def __init__(self, broker: JobQueues, books: Books, live_values: Mapping[str, Any]) -> None:
        self._broker = broker
        self._books = books
        self._live_values = live_values
        self._suspected_holes: set[int] = set()
        self._announced = b""  # what the workers were told last of the version
        self.identity = ""
        """The identity of the trajectory stream that the books are about."""
        self.lost = LostStreams()
        self.is_nearly_full = False
        """Whether trajectories take so much room that there may soon be too little for a batch."""
        self.generation = 0
        """How often the streams have been made; what was asked in earlier ones is gone with them."""

    async def open(self, identity: str | None) -> None:
        """Make what is missing, and see whether the trajectory stream is the one the checkpoint knows.

        Args:
            identity: the stream's identity in the checkpoint; None for a job that begins.

        Raises:
            TransportError: the broker is away or refuses.
        """
        self.identity = identity or ""
        if identity is None:
            await self._broker.delete_streams()  # those of an earlier object
        else:
            trajectories, prompts = await self._broker.trajectories(), await self._broker.prompts()
            self.lost = LostStreams(
                trajectories is None or trajectories.identity != identity, prompts is None
            )
        if not self.lost:
            await self._make()

    # -- lost streams

    async def inspect(self) -> None:
        """Notice streams that are gone, were made by someone else, have jumped back, or are filling up.

        Raises:
            TransportError: the broker is away; call again.
        """
        # What we know must be read before what the server knows: both grow meanwhile.
        seen, issued = self._books.inbox.last_sequence, self._books.num_issued
        before = self.generation, self.lost
        trajectories, prompts = await self._broker.trajectories(), await self._broker.prompts()
        if before != (self.generation, self.lost):
            return  # mended or lost meanwhile: what was seen no longer holds
        self.is_nearly_full = (
            trajectories is not None and trajectories.num_bytes > FULL_SHARE * trajectories.max_bytes
        )
        if self.is_nearly_full:
            self._books.news.ring()
        self._lose(
            LostStreams(
                trajectories is None
                or trajectories.identity != self.identity
                or trajectories.last_sequence < seen,
                prompts is None or prompts.last_sequence < issued,
            )
        )

    async def look_for_holes(self) -> None:
        """Find tickets that are open, have not arrived, and are not in the queue either.

        A ticket whose group is stored but not read yet looks the same, so a hole must be seen twice.

        Raises:
            TransportError: the broker is away; call again.
        """
        queued = await self._broker.queued_tickets()
        books = self._books
        holes = {
            ticket
            for ticket in books.book.open_tickets(books.num_issued)
            if ticket not in queued and not books.is_known(ticket)
        }
        if confirmed := holes & self._suspected_holes:
            log.warning("tickets %s are neither queued nor stored: issued again", sorted(confirmed)[:20])
            self.requeue()
        self._suspected_holes = holes

    def requeue(self) -> None:
        """Have the prompt stream made again, because tickets that are open are no longer queued in it."""
        self._lose(LostStreams(self.lost.trajectories, prompts=True))

    def start_over(self) -> None:
        """Have both streams made again, because trajectories are gone from a stream that is still there.

        It would not take their tickets' new ones: it remembers the message ids of the old.
        """
        self._lose(LostStreams(trajectories=True, prompts=True))

    def _lose(self, lost: LostStreams) -> None:
        self.lost = lost
        if lost:
            self._books.news.ring()

    async def mend(self, give_up_recorded: Callable[[], Awaitable[None]]) -> None:
        """Make lost streams again: prompts from the first open ticket, trajectories behind the last one seen.

        Tickets that had arrived through a lost trajectory stream are open again. A closed ticket above the
        first open one takes its sequence as an empty message, which workers acknowledge.

        Args:
            give_up_recorded: called when steps that are still to be repeated have lost their trajectories.
                That happens before a checkpoint knows the new stream. Otherwise the next attempt would wait
                in it for the recorded steps, and "repeat" them with groups that were sampled anew.

        Raises:
            TransportError: the broker is away or refuses.
        """
        while self.lost:  # again if the other stream is lost in between
            if self.lost.trajectories:
                log.warning("the trajectory stream is lost: open tickets are issued again")
                self._books.streams_lost()
            if self._books.is_recorded_lost:
                await give_up_recorded()
            await self._make_again()

    async def _make_again(self) -> None:
        if self.lost.trajectories:
            self.identity = ""
            await self._broker.delete_trajectories()
        await self._broker.delete_prompts()
        first_open = self._books.book.low + 1
        log.warning("the prompt stream is made again from ticket %d on", first_open)
        await self._make(first_open, self._books.inbox.last_sequence + 1)
        self._books.issue_from(first_open)
        self._suspected_holes.clear()

    async def _make(self, first_ticket: int | None = None, first_trajectory: int | None = None) -> None:
        await self._broker.make_streams(first_ticket, first_trajectory)
        trajectories, prompts = await self._broker.trajectories(), await self._broker.prompts()
        if trajectories is None or prompts is None:
            raise TransportError("a stream that was just made is gone")
        self._books.issued(prompts.last_sequence)
        # The trajectory stream may have been replaced by another one unnoticed until now.
        known, self.identity = self.identity, trajectories.identity
        self.lost = LostStreams(trajectories=known not in ("", self.identity))
        self.generation += 1
        await self.hand_on(self._live_values)
        if self._announced:  # it may have been lost with the streams
            await self._put("version", self._announced)

    # -- how far they are

    async def last_ticket(self) -> int | None:
        """Return the last ticket that was issued; None if the prompt stream is gone.

        Raises:
            TransportError: the broker is away.
        """
        facts = await self._broker.prompts()
        return None if facts is None else facts.last_sequence

    async def has_read_everything(self) -> bool:
        """Return whether every trajectory that is stored now has been taken into the books.

        Raises:
            TransportError: the broker is away.
        """
        facts = await self._broker.trajectories()
        return facts is None or self._books.inbox.last_sequence >= facts.last_sequence

    async def stored(self, after: int, last: int) -> AsyncGenerator[StreamMessage, None]:
        """Yield the trajectories behind `after`, up to `last`, once more; all of them must be stored.

        Raises:
            TransportError: the next one did not come in READ_SECONDS.
        """
        if last <= after:
            return
        messages = self._broker.read_trajectories(after + 1)
        try:
            while True:
                try:
                    message = await asyncio.wait_for(anext(messages), READ_SECONDS)
                except TimeoutError as error:
                    raise TransportError(
                        f"trajectories {after + 1} to {last}: none could be read for {READ_SECONDS:.0f} s"
                    ) from error
                if message.sequence <= last:
                    yield message
                if message.sequence >= last:
                    return
        finally:
            await messages.aclose()

    async def purge_behind(self, sequence: int) -> None:
        """Delete trajectories up to `sequence`: no restorable checkpoint needs them."""
        try:
            await self._broker.purge_trajectories(sequence)
        except TransportError as error:
            log.info("trajectories were not purged, the next checkpoint will do it: %s", error)
            return
        self.is_nearly_full = False

    # -- what workers are told

    async def announce(self, version: PolicyVersion) -> None:
        """Tell the workers once which version is current, before tickets are issued for it."""
        current = CurrentVersion(version=version, max_versions=self._books.live.staleness.max_versions)
        told = encode(current)
        if told != self._announced and await self._put("version", told):
            self._announced = told

    async def hand_on(self, live_values: Mapping[str, Any]) -> None:
        """Tell the workers the fields marked L, now and whenever the streams are made again."""
        self._live_values = live_values
        await self._put("live", json.dumps(live_values).encode())

    async def _put(self, key: str, data: bytes) -> bool:
        """Write a key of the job's state; return whether the broker has it."""
        try:
            await self._broker.put(key, data)
        except TransportError as error:
            log.warning("key %s was not written: %s", key, error)
            return False
        return True
