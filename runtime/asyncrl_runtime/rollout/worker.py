"""The rollout worker: it pulls a ticket, runs the workflow on the engine, scores, publishes, acknowledges."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable

import msgspec

from asyncrl_api.job import Spec
from asyncrl_api.parsing import SpecError
from asyncrl_api.protocols import Workflow
from asyncrl_api.run_config import RunningSpec
from asyncrl_runtime.contract.bell import Bell
from asyncrl_runtime.contract.broker import Delivery, DeliverySource, TransportError, WorkerBroker
from asyncrl_runtime.contract.messages import (
    EVALUATION_ROWS,
    HEARTBEAT_SECONDS,
    ControlReply,
    CurrentVersion,
    Heartbeat,
    decode,
    decode_request,
    encode,
)
from asyncrl_runtime.contract.refused import Refusals, one_line
from asyncrl_runtime.rollout.concurrency import ConcurrencyLimit, Slots, Taken
from asyncrl_runtime.rollout.engine_api import Engine, EngineLoad, EngineLost
from asyncrl_runtime.rollout.engine_monitor import EngineMonitor
from asyncrl_runtime.rollout.engine_updates import UpdatesOf
from asyncrl_runtime.rollout.group_runner import GroupRunner
from asyncrl_runtime.rollout.prompts import PromptRenderer
from asyncrl_runtime.rollout.rewards.scorer import Scorer
from asyncrl_runtime.rollout.ticket_work import TicketWork

log = logging.getLogger(__name__)

STATE_POLL_SECONDS = 15.0
"""How often the job's state is read. Changes of it are pushed; this makes up for one that was missed."""
LOOK_SECONDS = 1.0
"""How long a loop that waits for a fit engine goes without looking, if nothing rings for it."""
DRAIN_SECONDS = 30
"""How long samples that are being scored are waited for at the end."""

Work = Callable[[Delivery, Taken], Awaitable[None]]


class Worker:
    """One worker and its engine.

    Consumes tickets and held-out prompts; produces trajectories and answers. Waits for an engine with
    weights, for room in it, and for messages, with which the broker wakes it. `run` ends when `stop` was
    called and everything in hand is finished or handed back.
    """

    def __init__(
        self,
        name: str,
        spec: Spec,
        broker: WorkerBroker,
        engine: Engine,
        updates_of: UpdatesOf,
        renderer: PromptRenderer,
        workflow: Workflow,
        scorer: Scorer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._incarnation = uuid.uuid4().hex
        self._spec = RunningSpec(spec)
        self._broker = broker
        self._engine = engine
        self._bells: list[Bell] = []
        """One for each loop that pulls."""
        self._slots = Slots(self._slot_freed)
        self._limit = ConcurrencyLimit(
            self._spec.frozen.sampling.group_size, self._spec.live.rollout.max_concurrency
        )
        self._updates = updates_of(engine, lambda: self._slots.num_taken)
        self._monitor = EngineMonitor(
            engine, self._updates, lambda: self._slots.num_taken, self._observe, clock
        )
        self._runner = GroupRunner(
            engine, renderer, workflow, scorer, self._cache_salt, clock, finished=self._limit.finished
        )
        self._work = TicketWork(name, self._spec.frozen, broker, self._runner, self.report_failure, clock)
        self._clock = clock
        self._in_hand: dict[tuple[bool, int], Delivery] = {}
        """The deliveries that are worked on, by kind and number."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._current: CurrentVersion | None = None
        self._refusals = Refusals()
        self._num_failures = 0
        self._last_error = ""
        self._heartbeat, self._pulse_at = self._make_heartbeat(), clock()

    def engine_fault(self) -> str | None:
        """Return why the engine must be restarted, for its liveness probe; None while it need not be."""
        return self._monitor.fault()

    def _cache_salt(self) -> str | None:
        """Return what keeps new samples from reusing KV of older weights, if KV is kept over updates."""
        return str(self._engine.weights.version) if self._spec.live.rollout.interrupt == "InPlace" else None

    def stop(self) -> None:
        """Begin to drain: take no more tickets, break off what is in flight and hand it back."""
        self._stopping.set()
        self._ring()

    def report_failure(self, message: str) -> None:
        log.warning("%s", message)
        self._num_failures += 1
        self._last_error = message[:500]

    async def run(self) -> None:
        """Work until stopped.

        Raises:
            TransportError: the broker closed this client for good.
        """
        await self._broker.answer_requests(self._update)
        await self._broker.hear_state(self._apply)
        prompts = await self._broker.tickets()
        questions = await self._broker.questions()
        loops = {
            "heartbeat": self._broker.beat(self._latest_heartbeat, HEARTBEAT_SECONDS),
            "pulse": self._keep_pulse(),
            "engine": self._monitor.run(),
            "state": self._poll_state(),
            "keep tickets": self._keep_alive(prompts.alive_seconds, are_tickets=True),
            "keep questions": self._keep_alive(questions.alive_seconds, are_tickets=False),
            "questions": self._pull(questions, self._work.answer, EVALUATION_ROWS),
            "prompts": self._pull(prompts, self._work.sample, self._spec.frozen.sampling.group_size),
            "stop": self._wait_for_the_end(),
        }
        running = [asyncio.create_task(loop, name=name) for name, loop in loops.items()]
        try:
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            await self._drain([task for task in running if task.get_name() in ("questions", "prompts")])
        finally:
            for task in (*running, *self._tasks):
                task.cancel()

    async def _wait_for_the_end(self) -> None:
        closed = asyncio.create_task(self._broker.closed.wait())
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({closed, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not self._stopping.is_set():
            raise TransportError("the broker closed this worker's connection for good")

    async def _pull(self, queue: DeliverySource, work: Work, size: int) -> None:
        """Take one message at a time while there is room, and work on each beside the others.

        Consumes the queue; produces a task for each message. Waits for a fit engine with room, for which a
        bell rings when it may be there, and for the next message, with which the broker wakes it. Ends after
        `stop`.
        """
        bell = Bell()
        self._bells.append(bell)
        while not self._stopping.is_set():
            if not (self.is_fit() and self._limit.has_room(self._slots.num_taken)):
                await bell.wait(LOOK_SECONDS)
                continue
            delivery = await queue.take()
            if delivery is None:
                continue
            if self._stopping.is_set() or not self.is_fit():  # not any more, but others may be
                await delivery.hand_back()
                continue
            if (held := self._in_hand.get(_key(delivery))) is not None:
                log.info("ticket %d is in hand already: it was handed back on our behalf", delivery.sequence)
                await held.renew(delivery)
                continue
            self._in_hand[_key(delivery)] = delivery
            self._heartbeat = self._make_heartbeat()  # at once, in case that user code blocks this loop next
            task = asyncio.create_task(self._handle(delivery, work, self._slots.take(size)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _ring(self) -> None:
        """Wake those who wait for a fit engine with room: there may be one."""
        for bell in self._bells:
            bell.ring()

    def _slot_freed(self) -> None:
        self._ring()
        if self._monitor.state == "drained":  # the trainer waits for it
            self._heartbeat = self._make_heartbeat()
            self._broker.beat_now()

    def _observe(self, load: EngineLoad, num_running: int) -> None:
        """Hear of the engine, which answers its monitor."""
        if self._monitor.state == "ready":  # in an update, all that ran may wait in its queue
            self._limit.observe(load, num_running)
        self._ring()

    def is_fit(self) -> bool:
        """Return whether the engine can sample, with weights that are not too old already."""
        mine, current = self._engine.weights.version, self._current
        if self._monitor.state != "ready" or mine is None:
            return False
        return current is None or mine.version + current.max_versions >= current.version.version

    async def _handle(self, delivery: Delivery, work: Work, slots: Taken) -> None:
        try:
            await work(delivery, slots)
        except Exception as error:  # the edge of this task: the ticket goes elsewhere, nothing is lost
            if not isinstance(error, TransportError):
                log.exception("delivery %d", delivery.sequence)
            self.report_failure(f"ticket {delivery.sequence}: {type(error).__name__}: {error}")
            await delivery.hand_back(delay_seconds=1)
        finally:
            del self._in_hand[_key(delivery)]
            slots.close()

    async def _keep_alive(self, seconds: float, *, are_tickets: bool) -> None:
        """Tell the broker every `seconds` that what is in hand is being worked on.

        Consumes the deliveries in hand; produces a sign of life for each. Nobody wakes it earlier.
        """
        while True:
            await asyncio.sleep(seconds)
            for delivery in [held for held in self._in_hand.values() if held.is_ticket == are_tickets]:
                await delivery.keep_alive()

    async def _keep_pulse(self) -> None:
        """Show that this loop runs, and note what there is to say about it.

        Consumes the state of worker and engine; produces the heartbeat that is sent next, every
        HEARTBEAT_SECONDS. Nobody wakes it earlier; user code may hold it up, which the heartbeats then tell.
        """
        while True:
            self._heartbeat, self._pulse_at = self._make_heartbeat(), self._clock()
            await asyncio.sleep(HEARTBEAT_SECONDS)

    def _latest_heartbeat(self) -> Heartbeat:
        """Return what to tell the trainer now; called from the thread that sends it."""
        late = self._clock() - self._pulse_at - HEARTBEAT_SECONDS
        return msgspec.structs.replace(self._heartbeat, late_seconds=max(0.0, late))

    def _make_heartbeat(self) -> Heartbeat:
        return Heartbeat(
            worker=self._name,
            incarnation=self._incarnation,
            engine=f"{self._incarnation}.{self._monitor.incarnation}",
            engine_state=self._monitor.state,
            version=self._engine.weights.version,
            num_running_samples=self._slots.num_taken,
            max_running_samples=self._limit.capacity(self._monitor.load, self._slots.num_taken),
            kv_usage=self._monitor.load.kv_usage,
            num_sampled_tokens=self._runner.num_sampled_tokens,
            num_failures=self._num_failures,
            last_error=self._last_error,
            held=tuple(sorted(number for is_ticket, number in self._in_hand if is_ticket)),
        )

    async def _update(self, request: bytes) -> bytes:
        """Handle one phase of an update of the weights; return the reply."""
        try:
            asked = decode_request(request)
        except ValueError as error:
            self._refusals.add("request of a trainer", str(error))
            return encode(ControlReply(ok=False, message=one_line(str(error)), worker=self._name))
        reply = await self._updates.handle(asked)
        self._ring()
        return encode(msgspec.structs.replace(reply, worker=self._name))

    async def _poll_state(self) -> None:
        """Act on the job's state, read every STATE_POLL_SECONDS, as on a change; nobody wakes it earlier."""
        while True:
            for key in ("live", "version"):
                try:
                    self._apply(key, await self._broker.state(key) or b"")
                except TransportError as error:
                    log.debug("%s", error)
            await asyncio.sleep(STATE_POLL_SECONDS)

    def _apply(self, key: str, data: bytes) -> None:
        if key == "version" and data:
            try:
                self._current = decode(data, CurrentVersion)
            except ValueError as error:
                self._refusals.add("announcement of a version", str(error))
        elif key == "live" and data:
            self._apply_live_values(data)
        self._ring()

    def _apply_live_values(self, data: bytes) -> None:
        try:
            passed_over = self._spec.take_over(json.loads(data))
        except (SpecError, ValueError, RecursionError) as error:
            self._refusals.add("live values", str(error))
            return
        if passed_over:
            log.warning("%s", passed_over)
        self._limit.ceiling = self._spec.live.rollout.max_concurrency

    async def _drain(self, pulls: list[asyncio.Task[None]]) -> None:
        """Break off what is in flight, so that its tokens are attested and handed on; leave the group."""
        log.info("draining: %d tickets in hand", len(self._in_hand))
        await asyncio.wait(pulls, timeout=5)
        for _ in range(DRAIN_SECONDS):
            try:
                await self._engine.abort_all()
            except EngineLost as error:
                log.info("while draining: %s", error)
                self._engine.give_up()
            if not self._tasks:
                break
            await asyncio.wait(self._tasks, timeout=1)  # a sample between two turns will ask once more
        for delivery in list(self._in_hand.values()):
            await delivery.hand_back()
        await self._updates.leave()


def _key(delivery: Delivery) -> tuple[bool, int]:
    return delivery.is_ticket, delivery.sequence
