"""What runs beside the training loop on rank 0: issue tickets, read trajectories, reap the dead, watch.

The state that these tasks share is in Books, which has no I/O. A task that ends ends the trainer.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import nats.js.errors

from asyncrl_api.base import parse_quantity
from asyncrl_api.job import Spec
from asyncrl_api.names import JobNames
from asyncrl_api.parsing import SpecError
from asyncrl_api.run_config import live_values, with_live_values
from asyncrl_runtime.contract.messages import CurrentVersion, PolicyVersion, Ticket, encode
from asyncrl_runtime.trainer.books.books import Books
from asyncrl_runtime.trainer.dataset import DictRow, PromptOrder
from asyncrl_runtime.transport.broker import (
    TRANSIENT,
    Broker,
    TransportError,
    WrongLastSequence,
)
from asyncrl_runtime.transport.fleet import Fleet, Reaper
from asyncrl_runtime.transport.reader import OrderedReader
from asyncrl_runtime.transport.streams import (
    TRAJECTORY_SHARE,
    delete_stream,
    identity_of,
    make_streams,
    stream_info,
)

log = logging.getLogger(__name__)

ISSUE_TOGETHER = 64
REAP_SECONDS = 0.5
WATCH_SECONDS = 1.0
HOLE_SECONDS = 30.0
"""Between two looks for tickets that are neither queued nor stored. Only a power cut makes such."""
FULL_SHARE = 0.7
"""Of the trajectory stream's byte limit: from there on a checkpoint is made, to purge behind it."""


class SideTasks:
    """The I/O around the books. `tasks` are its loops; the rest is called by the training loop."""

    def __init__(
        self,
        broker: Broker,
        names: JobNames,
        books: Books,
        fleet: Fleet,
        rows: Sequence[DictRow],
        base_spec: Spec,
        live_file: Path,
    ) -> None:
        self._broker = broker
        self._names = names
        self._books = books
        self._fleet = fleet
        self._rows = rows
        self._order = PromptOrder(len(rows), base_spec.dataset.seed)
        self._base_spec = base_spec
        self._live_file = live_file
        self._live_text, self._live_fault = "", ""
        self._storage_bytes = parse_quantity(base_spec.messaging.embedded.storage.size)
        self._reader = OrderedReader(broker, names.trajectory_stream, books.inbox.last_sequence + 1)
        self._suspected_holes: set[int] = set()
        self.trajectory_identity = ""
        self.trajectories_lost = False
        """The trajectory stream is gone, or another one of its name is there."""
        self.prompts_lost = False
        self.is_nearly_full = False
        self.stream_generation = 0

    def tasks(self) -> dict[str, Coroutine[Any, Any, None]]:
        """Return the loops by name. Each runs until cancelled, or ends with what must end the trainer."""
        return {
            "issue tickets": self._issue(),
            "read trajectories": self._read(),
            "reap": self._reap(),
            "watch streams": self._watch(),
            "watch live values": self._watch_live_values(),
        }

    async def open_streams(self, trajectory_identity: str | None) -> None:
        """Make what is missing, and see whether the trajectory stream is the one the checkpoint knows.

        Args:
            trajectory_identity: the checkpoint's; None for a job that begins.
        """
        self.trajectory_identity = trajectory_identity or ""
        info = await stream_info(self._broker.jetstream, self._names.trajectory_stream)
        self.prompts_lost = (
            await stream_info(self._broker.jetstream, self._names.prompt_stream) is None
            and trajectory_identity is not None
        )
        self.trajectories_lost = trajectory_identity is not None and (
            info is None or identity_of(info) != trajectory_identity
        )
        if not self.trajectories_lost and not self.prompts_lost:
            await self._make_streams({})

    async def make_streams_again(self) -> None:
        """Make lost streams again: PROMPT from the first open ticket, TRAJ behind the last message seen.

        Whatever had arrived through a lost trajectory stream is open again; a ticket above the first open
        one that is closed takes its sequence as an empty message, which workers acknowledge.
        """
        while self.trajectories_lost or self.prompts_lost:  # twice if the other is lost in between
            await self._make_lost_streams()

    async def _make_lost_streams(self) -> None:
        jetstream, names = self._broker.jetstream, self._names
        if self.trajectories_lost:
            log.warning("the trajectory stream is lost: open tickets are issued again")
            self._books.streams_lost()
            self.trajectory_identity = ""
            await delete_stream(jetstream, names.trajectory_stream)
        await delete_stream(jetstream, names.prompt_stream)
        first_open = self._books.book.low + 1
        log.warning("the prompt stream is made again from ticket %d on", first_open)
        await self._make_streams(
            {
                names.prompt_stream: first_open,
                names.trajectory_stream: self._books.inbox.last_sequence + 1,
            }
        )
        self._books.num_issued = first_open - 1
        self._suspected_holes.clear()

    async def announce(self, version: PolicyVersion) -> None:
        """Tell the workers the version that is current, before tickets of it are issued."""
        current = CurrentVersion(version=version, max_versions=self._books.spec.staleness.max_versions)
        await self._put("version", encode(current))

    async def purge_behind(self, sequence: int) -> None:
        """Delete trajectories up to `sequence`: no restorable checkpoint needs them."""
        with contextlib.suppress(*TRANSIENT, nats.js.errors.APIError):
            await self._broker.jetstream.purge_stream(self._names.trajectory_stream, seq=sequence + 1)
            self.is_nearly_full = False

    async def has_read_everything(self) -> bool:
        """Whether all that is stored now has been taken."""
        info = await stream_info(self._broker.jetstream, self._names.trajectory_stream)
        return info is None or self._books.inbox.last_sequence >= info.state.last_seq

    async def _make_streams(self, first_sequences: dict[str, int]) -> None:
        jetstream, names = self._broker.jetstream, self._names
        await make_streams(jetstream, names, self._storage_bytes, first_sequences)
        trajectories = await stream_info(jetstream, names.trajectory_stream)
        prompts = await stream_info(jetstream, names.prompt_stream)
        assert trajectories is not None and prompts is not None
        known, self.trajectory_identity = self.trajectory_identity, identity_of(trajectories)
        self._books.num_issued = prompts.state.last_seq
        self.prompts_lost = False
        # It may have gone unnoticed until now, and be another one.
        self.trajectories_lost = known not in ("", self.trajectory_identity)
        self.stream_generation += 1
        await self._hand_on_live_values()

    # -- issue

    async def _issue(self) -> None:
        """Publish tickets up to the limit of the books, as the only publisher of their stream."""
        while True:
            try:
                if not (self.prompts_lost or self.trajectories_lost):
                    await self._issue_allowed()
            except (TransportError, WrongLastSequence) as error:
                log.info("tickets: %s", error)
                await self._find_last_ticket()
            self._books.inbox.changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._books.inbox.changed.wait(), 0.5)

    async def _issue_allowed(self) -> None:
        books = self._books
        while (issued := books.num_issued) < (limit := books.limit):
            numbers = range(issued + 1, min(limit, issued + ISSUE_TOGETHER) + 1)
            payloads = [self._ticket(number) for number in numbers]
            subject = self._names.prompt("x").removesuffix(".x")
            books.num_issued = await self._broker.publish_fenced(subject, payloads, last_sequence=issued)

    def _ticket(self, number: int) -> bytes:
        """Return the message of a ticket; empty for one that needs no sampling any more."""
        if self._books.is_closed(number) or number in self._books.inbox.arrived:
            return b""
        sampling = self._books.spec.sampling
        return encode(
            Ticket(
                ticket=number,
                row=self._rows[self._order.index(number)],
                group_size=sampling.group_size,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
            )
        )

    async def _find_last_ticket(self) -> None:
        """After a publish that failed half way: the stream knows how far it got."""
        try:
            info = await stream_info(self._broker.jetstream, self._names.prompt_stream)
        except (*TRANSIENT, nats.js.errors.APIError) as error:
            log.info("tickets: %s", type(error).__name__)
            return
        if info is not None and not self.prompts_lost:
            self._books.num_issued = max(self._books.num_issued, info.state.last_seq)

    # -- read, reap

    async def _read(self) -> None:
        async for message in self._reader:
            self._books.take(message)

    async def _reap(self) -> None:
        reaper = Reaper(self._broker, self._names, self._fleet, time.monotonic)
        books = self._books
        while True:
            await asyncio.sleep(REAP_SECONDS)
            try:
                await reaper.reap(books.waiting_tickets)
            except (*TRANSIENT, nats.js.errors.APIError) as error:
                log.info("reaper: %s: %s", type(error).__name__, error)

    # -- watch

    async def _watch(self) -> None:
        """Notice streams that are gone, were made by someone else, jumped back, or fill up."""
        loop = asyncio.get_running_loop()
        looked_for_holes = loop.time()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self.trajectories_lost or self.prompts_lost:
                continue  # the training loop makes them again at its next boundary
            try:
                await self._inspect()
                if loop.time() - looked_for_holes > HOLE_SECONDS:
                    looked_for_holes = loop.time()
                    await self._look_for_holes()
            except (*TRANSIENT, nats.js.errors.APIError) as error:
                log.info("watching streams: %s: %s", type(error).__name__, error)

    async def _inspect(self) -> None:
        # What we know must be read before what the server knows: both grow meanwhile.
        seen, issued = self._books.inbox.last_sequence, self._books.num_issued
        trajectories = await stream_info(self._broker.jetstream, self._names.trajectory_stream)
        prompts = await stream_info(self._broker.jetstream, self._names.prompt_stream)
        self.trajectories_lost = (
            trajectories is None
            or identity_of(trajectories) != self.trajectory_identity
            or trajectories.state.last_seq < seen
        )
        self.prompts_lost = prompts is None or prompts.state.last_seq < issued
        limit = self._storage_bytes * TRAJECTORY_SHARE
        self.is_nearly_full = trajectories is not None and trajectories.state.bytes > FULL_SHARE * limit
        if self.trajectories_lost or self.prompts_lost:
            self._books.inbox.changed.set()

    async def _look_for_holes(self) -> None:
        """Find tickets that are open, have not arrived, and are not in the queue either.

        One that is stored but not read yet looks the same, so a hole must be seen twice.
        """
        info = await self._broker.jetstream.stream_info(
            self._names.prompt_stream, subjects_filter=self._names.prompt("*")
        )
        queued = {int(subject.rpartition(".")[2]) for subject in info.state.subjects or {}}
        books = self._books
        holes = {
            ticket
            for ticket in books.book.open_tickets(books.num_issued)
            if ticket not in queued and not books.is_known(ticket)
        }
        if confirmed := holes & self._suspected_holes:
            log.warning("tickets %s are neither queued nor stored: issued again", sorted(confirmed)[:20])
            self.prompts_lost = True
        self._suspected_holes = holes

    # -- live values

    async def _watch_live_values(self) -> None:
        """Follow the file of live fields and hand them on to the workers."""
        while True:
            if self.read_live_values():
                await self._hand_on_live_values()
            await asyncio.sleep(WATCH_SECONDS)

    def read_live_values(self) -> bool:
        """Take over changed live fields; returns whether there were any. A bad file changes nothing."""
        try:
            text = self._live_file.read_text()
            if text == self._live_text:
                self._live_fault = ""
                return False
            spec = with_live_values(self._base_spec, json.loads(text))
        except (OSError, ValueError, SpecError) as error:
            if str(error) != self._live_fault:  # once, though it is read again and again
                log.warning("live values in %s are ignored: %s", self._live_file, error)
                self._live_fault = str(error)
            return False
        self._live_text, self._live_fault = text, ""
        current = self._books.spec
        if spec.training.max_steps < current.training.max_steps:
            log.warning("spec.training.maxSteps may only grow; it stays %d", current.training.max_steps)
            training = spec.training.model_copy(update={"max_steps": current.training.max_steps})
            spec = spec.model_copy(update={"training": training})
        self._books.spec = spec
        self._books.inbox.changed.set()
        return True

    async def _hand_on_live_values(self) -> None:
        await self._put("live", json.dumps(live_values(self._books.spec)).encode())

    async def _put(self, key: str, data: bytes) -> None:
        try:
            await self._broker.jetstream.publish(f"$KV.{self._names.state_bucket}.{key}", data)
        except (*TRANSIENT, nats.js.errors.APIError) as error:
            log.warning("key %s was not written: %s", key, error)
