"""The loops beside the training loop on rank 0: issuing, reading, returning dead workers' tickets, watching.

They share their state through Books, which has no I/O. If one of them ends, the trainer ends.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from asyncrl_api.parsing import SpecError
from asyncrl_api.run_config import RunningSpec
from asyncrl_runtime.contract.broker import TicketStreams, TransportError
from asyncrl_runtime.contract.messages import Ticket, encode
from asyncrl_runtime.trainer.books.books import Books
from asyncrl_runtime.trainer.dataset import DictRow, PromptOrder
from asyncrl_runtime.trainer.job_streams import JobStreams
from asyncrl_runtime.trainer.reaper import Reaper
from asyncrl_runtime.weights.fleet import LATE_SECONDS, Fleet

log = logging.getLogger(__name__)

ISSUE_TOGETHER = 64
ISSUE_SECONDS = 0.5
"""How often the gate is looked at although no bell has rung, so that a failed publish is tried again."""
REAP_SECONDS = 0.5
WATCH_SECONDS = 1.0
HOLE_SECONDS = 30.0
"""How often tickets are looked for that are neither queued nor stored. Only a power cut leaves any."""


class SideTasks:
    """The loops around the books.

    Args:
        rows: the rows to train on; a ticket's number decides which of them it gets.
        spec: the job's spec, whose fields marked L are read from `live_file` again and again.
        clock: returns monotonic seconds.
    """

    def __init__(
        self,
        broker: TicketStreams,
        streams: JobStreams,
        books: Books,
        fleet: Fleet,
        rows: Sequence[DictRow],
        spec: RunningSpec,
        live_file: Path,
        clock: Callable[[], float],
    ) -> None:
        self._broker = broker
        self._streams = streams
        self._books = books
        self._rows = rows
        self._order = PromptOrder(len(rows), spec.frozen.dataset.seed)
        self._fleet = fleet
        self._reaper = Reaper(broker, fleet, clock, spec.frozen.sampling.group_size)
        self._spec = spec
        self._live_file = live_file
        self._live_text, self._live_fault = "", ""
        self._clock = clock

    def loops(self) -> dict[str, Coroutine[Any, Any, None]]:
        """Return the loops by name. Each runs until it is cancelled, or raises what must end the trainer."""
        return {
            "issue tickets": self._issue(),
            "read trajectories": self._read(),
            "reap": self._reap(),
            "watch streams": self._watch(),
            "watch live values": self._watch_live_values(),
        }

    # -- issue

    async def _issue(self) -> None:
        """Publish tickets up to the limit of the books, as the only publisher of their stream.

        Consumes the limit of the books and the rows; produces the messages of the prompt stream. Waits for
        the books, which wake it by `gate_moved` when the limit may have moved, and looks again after
        ISSUE_SECONDS in any case. Issues nothing while a stream is lost.
        """
        while True:
            try:
                if not self._streams.lost:
                    await self._issue_allowed()
            except TransportError as error:
                log.info("tickets: %s", error)
                await self._find_last_ticket()
            await self._books.gate_moved.wait(ISSUE_SECONDS)

    async def _issue_allowed(self) -> None:
        books = self._books
        while (last := books.num_issued) < (limit := books.limit):
            numbers = range(last + 1, min(limit, last + ISSUE_TOGETHER) + 1)
            payloads = [self._ticket(number) for number in numbers]
            books.issued(await self._broker.issue(payloads, last))

    def _ticket(self, number: int) -> bytes:
        """Return the message of a ticket; empty if it no longer needs to be sampled."""
        if self._books.is_closed(number) or number in self._books.inbox.arrived:
            return b""
        live = self._books.live.sampling
        return encode(
            Ticket(
                ticket=number,
                row=self._rows[self._order.index(number)],
                group_size=self._spec.frozen.sampling.group_size,
                max_new_tokens=live.max_new_tokens,
                temperature=live.temperature,
            )
        )

    async def _find_last_ticket(self) -> None:
        """Ask the stream how far a publish got that failed half way."""
        try:
            last = await self._streams.last_ticket()
        except TransportError as error:
            log.info("tickets: %s", error)
            return
        if last is not None and not self._streams.lost:
            self._books.issued(max(self._books.num_issued, last))

    # -- read, reap, watch

    async def _read(self) -> None:
        """Take trajectories into the books, in order, as they come.

        Consumes the trajectory stream behind the last message taken; produces groups in the books' inbox, and
        the books ring for the training loop. Waits for the next message, which the reader hands over, and
        through outages of the broker.
        """
        async for message in self._broker.read_trajectories(self._books.inbox.last_sequence + 1):
            self._books.take(message)

    async def _reap(self) -> None:
        """Hand back the tickets of workers that fell silent.

        Consumes what the fleet has heard and the tickets that the books wait for; produces deliveries of
        those tickets to other workers. Looks every REAP_SECONDS; nobody wakes it earlier. After this loop was
        held up itself, it first listens again: what workers said meanwhile has not been heard.
        """
        while True:
            began = self._clock()
            await asyncio.sleep(REAP_SECONDS)
            if self._clock() - began - REAP_SECONDS > LATE_SECONDS:
                self._fleet.was_deaf()
            try:
                await self._reaper.reap(self._books.waiting_tickets)
            except TransportError as error:
                log.info("reaper: %s", error)

    async def _watch(self) -> None:
        """Look whether streams are lost; the training loop mends them at its next boundary.

        Consumes what the broker knows of the streams, every WATCH_SECONDS, and which tickets it has queued,
        every HOLE_SECONDS; produces `lost` of the streams, and with it a ring for the training loop. Nobody
        wakes it earlier, and it only waits while something is lost.
        """
        looked_for_holes = self._clock()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self._streams.lost:
                continue
            try:
                await self._streams.inspect()
                if self._clock() - looked_for_holes > HOLE_SECONDS:
                    looked_for_holes = self._clock()
                    await self._streams.look_for_holes()
            except TransportError as error:
                log.info("watching streams: %s", error)

    # -- live values

    async def _watch_live_values(self) -> None:
        """Follow the file of live fields.

        Consumes the file, which it reads every WATCH_SECONDS; produces the live values in the books, which
        ring for the issuer of tickets and the training loop, and in the job's state, where the workers hear
        them. Nobody wakes it earlier.
        """
        while True:
            if self.read_live_values():
                await self._streams.hand_on(self._spec.live_values())
            await asyncio.sleep(WATCH_SECONDS)

    def read_live_values(self) -> bool:
        """Take over changed live fields; return whether there were any. A bad file changes nothing."""
        try:
            text = self._live_file.read_text()
            if text == self._live_text:
                self._live_fault = ""
                return False
            passed_over = self._spec.take_over(json.loads(text))
        except (OSError, ValueError, RecursionError, SpecError) as error:
            if str(error) != self._live_fault:  # once, though it is read again and again
                log.warning("live values in %s are ignored: %s", self._live_file, error)
                self._live_fault = str(error)
            return False
        self._live_text, self._live_fault = text, ""
        if passed_over:
            log.warning("%s", passed_over)
        self._books.use(self._spec.live)
        return True
