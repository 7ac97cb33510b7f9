"""The engines as trainer rank 0 knows them: who lives, who has which version, and how they are asked."""

import asyncio
import contextlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from asyncrl_api.names import JobNames
from asyncrl_runtime.contract.broker import Requests
from asyncrl_runtime.contract.messages import (
    HEARTBEAT_SECONDS,
    ControlReply,
    DrainEngine,
    Heartbeat,
    Message,
    PolicyVersion,
    decode,
    encode,
)
from asyncrl_runtime.contract.refused import Refusals
from asyncrl_runtime.weights.fleet import LATE_SECONDS, Fleet

Member = tuple[str, str]
"""A worker and its engine process: a restarted engine is another member."""

REFUSED_SECONDS = 300.0
"""The time for which every engine must refuse every update until the job ends: long enough for each to be
restarted in between."""
MIN_REFUSALS = 5
"""How often each of them must have refused in that time."""
MAX_RANKS = 4096
"""More ranks than any engine has."""
BASE_SECONDS = 15.0
SLOWEST_BYTES_PER_SECOND = 50e6


@dataclass(frozen=True)
class Published:
    """What became of one publication."""

    engines: tuple[str, ...] = ()
    """The workers whose engines have got the version by this publication."""
    failed: tuple[str, ...] = ()
    num_epochs: int = 0
    checksums: Mapping[str, str] = field(default_factory=dict)
    seconds: "UpdateSeconds | None" = None
    """What the time went into; None if no weights were sent."""


@dataclass
class UpdateSeconds:
    """What the time of a publication goes into, in seconds."""

    gather: float = 0.0
    """Waiting for buckets to be gathered; that of one runs beside the transfer of the one before."""
    transfer: float = 0.0
    """Broadcasts, each of which waits until every engine has loaded the bucket before."""
    load: float = 0.0
    """Waiting, after the last broadcast, until every engine has loaded all."""
    pause: float = 0.0
    """The time that the engine sampled nothing which was paused longest."""


class WeightsRefused(Exception):
    """Every engine has refused every update for so long that it is not a passing fault."""


@dataclass
class _Refusal:
    """An unbroken row of refusals of one worker's engine, all in the same words."""

    words: str
    message: str
    """The last of them as it came, with its numbers."""
    since: float
    count: int = 0


class RefusedUpdates:
    """Tells an engine that can never take the weights from one that could not just now.

    An engine that answers an update with a refusal is well, so nobody restarts it, and the trainer would
    go on alone until the gate closes, and then wait for ever. Only a success or other words end a row: an
    engine that is restarted meanwhile and refuses again goes on with its row. Numbers are no part of the
    words, because versions and the names of groups are among them.
    """

    def __init__(self) -> None:
        self._rows: dict[str, _Refusal] = {}  # by worker

    def refused(self, worker: str, message: str, now: float) -> None:
        words = re.sub(r"\d+", "N", message)
        row = self._rows.get(worker)
        if row is None or row.words != words:
            row = self._rows[worker] = _Refusal(words, message, now)
        row.count += 1
        row.message = message

    def accepted(self, worker: str) -> None:
        self._rows.pop(worker, None)

    def check(self, workers: Collection[str], now: float) -> None:
        """Look whether anybody is left who may take the weights.

        Raises:
            WeightsRefused: all `workers`, at least one, have refused MIN_REFUSALS times in REFUSED_SECONDS
                or more.
        """
        rows = {worker: self._rows[worker] for worker in workers if worker in self._rows}
        is_over = [row.count >= MIN_REFUSALS and now - row.since >= REFUSED_SECONDS for row in rows.values()]
        if not workers or len(rows) < len(workers) or not all(is_over):
            return
        said = "; ".join(f"{worker}: {row.message}" for worker, row in sorted(rows.items()))
        raise WeightsRefused(
            f"every engine has refused every update for {REFUSED_SECONDS:.0f} s, so nobody would ever sample "
            f"with the policy ({said}); see that spec.rollout.engine.image and args fit spec.model and "
            "spec.training.lora, and read the engines' logs"
        )


def parse_reply(data: bytes) -> ControlReply:
    """Return a worker's answer.

    Raises:
        ValueError: it is none, or an engine of that many ranks cannot be.
    """
    reply = decode(data, ControlReply)
    if not 1 <= reply.num_ranks <= MAX_RANKS:
        raise ValueError(f"an engine of {reply.num_ranks} ranks")
    return reply


class Publisher(Protocol):
    """Brings engines to a version, whatever kind of weights is trained. One publication at a time."""

    def behind(self, version: PolicyVersion) -> Sequence[Member]:
        """Return the engines that live and are not known to have `version`."""
        ...

    def num_engines(self, version: PolicyVersion) -> int:
        """Return how many living engines sample with `version`."""
        ...

    async def publish(self, version: PolicyVersion, interrupt: str) -> Published:
        """Send `version` to every engine that lives, is willing, and has another one.

        An engine that is left out gets the weights at the next boundary: the trainer goes on with whoever is
        left, even nobody.

        Args:
            interrupt: `spec.rollout.interrupt`.

        Raises:
            WeightsRefused: there are engines, and none of them will ever take the weights.
        """
        ...

    async def leave(self) -> None:
        """Let go of the engines; never waits for anybody."""
        ...


class PhaseAnswers:
    """What the members who are meant have answered so far to a request that went to all workers."""

    def __init__(self, members: Iterable[Member]) -> None:
        self._members = {member[0]: member for member in members}
        self._replies: dict[Member, ControlReply] = {}
        self.is_complete = asyncio.Event()
        """Set once all have answered, or nobody can."""
        self.is_refused = asyncio.Event()
        """Set once one has said no."""

    @property
    def all(self) -> dict[Member, ControlReply | None]:
        """The answers by member; None if there is none yet."""
        return {member: self._replies.get(member) for member in self._members.values()}

    @property
    def missing(self) -> set[Member]:
        """Those who have not answered yet."""
        return set(self._members.values()) - self._replies.keys()

    def take(self, reply: ControlReply) -> Member | None:
        """Take an answer; return whose it is, None if others were meant, or it is not the first."""
        member = self._members.get(reply.worker)
        if member is None or member in self._replies:
            return None
        self._replies[member] = reply
        if not reply.ok:
            self.is_refused.set()
        if len(self._replies) == len(self._members):
            self.is_complete.set()
        return member


class Engines:
    """What publishers of weights and publishers of adapters share.

    Args:
        attempt: the trainer's attempt.
        num_bytes: the size of what is published.
        timeout_seconds: the deadline of a phase; 0 scales it by the bytes.
        refusals: counts what arrives and is not taken.
    """

    def __init__(
        self,
        broker: Requests,
        names: JobNames,
        fleet: Fleet,
        *,
        attempt: int,
        num_bytes: int,
        timeout_seconds: float = 0,
        refusals: Refusals | None = None,
    ) -> None:
        self._refusals = refusals or Refusals()
        self._broker = broker
        self._names = names
        self._fleet = fleet
        self._attempt = attempt
        self._timeout = timeout_seconds or BASE_SECONDS + num_bytes / SLOWEST_BYTES_PER_SECOND
        self._at: dict[Member, PolicyVersion] = {}
        self._refused_updates = RefusedUpdates()
        self._failed_after: dict[str, Heartbeat] = {}  # worker -> its last word before it failed
        self._drains_after: dict[Member, Heartbeat] = {}  # its last word before it was asked to drain

    def behind(self, version: PolicyVersion) -> list[Member]:
        """Return the engines that live and are not known to have `version`.

        One that has failed is asked again once its worker has spoken again: it may have died just now. One
        whose worker is busy is left out, or all others would wait, paused, until it missed a deadline.
        """
        return [
            (beat.worker, beat.engine)
            for beat in self._fleet.living
            if beat.engine_state != "down"
            and beat.late_seconds < LATE_SECONDS
            and not self._has(beat, version)
            and beat is not self._failed_after.get(beat.worker)
        ]

    def num_engines(self, version: PolicyVersion) -> int:
        """Return how many living engines sample with `version`."""
        return sum(beat.engine_state != "down" and self._has(beat, version) for beat in self._fleet.living)

    async def leave(self) -> None:
        """Let go of the engines; never waits for anybody."""

    async def _drained(self, members: list[Member], version: PolicyVersion) -> list[Member]:
        """Have all let their samples finish; return those that did.

        Each is asked once, or twice if its heartbeat crosses the question. After that its heartbeats say how
        far it is, and one comes as soon as it is done: this may be called at every heartbeat of every worker.
        """
        beats = {(beat.worker, beat.engine): beat for beat in self._fleet.living}
        states = {member: self._drain_state(member, beats[member]) for member in members if member in beats}
        unasked = [member for member in members if states.get(member) not in ("draining", "drained", "asked")]
        replies = await self._ask(unasked, DrainEngine(version=version), self._timeout)
        self._drains_after = {member: beat for member, beat in self._drains_after.items() if member in beats}
        answered = {member: reply for member, reply in replies.items() if reply is not None}
        self._drains_after |= {member: beats[member] for member in answered if member in beats}
        done = {member for member, reply in answered.items() if reply.ok}
        return [member for member in members if member in done or states.get(member) == "drained"]

    def _drain_state(self, member: Member, beat: Heartbeat) -> str:
        """Return an engine's state by its last word, or `asked` if it has said nothing since it was asked."""
        if beat is self._drains_after.get(member):
            return "asked"
        is_outdated = beat.version != self._at.get(member, beat.version)  # it got a version since it spoke
        return "ready" if is_outdated else beat.engine_state

    def _remember_failures(self, failed: Iterable[Member]) -> None:
        failed = set(failed)
        self._failed_after |= {
            beat.worker: beat for beat in self._fleet.living if (beat.worker, beat.engine) in failed
        }

    async def _ask(
        self, members: Iterable[Member], request: Message, timeout_seconds: float
    ) -> dict[Member, ControlReply | None]:
        """Ask all members at the same time; None stands for no answer in time."""
        members = list(members)
        replies = await asyncio.gather(*(self._ask_one(m, request, timeout_seconds) for m in members))
        return dict(zip(members, replies, strict=True))

    async def _ask_one(self, member: Member, request: Message, timeout_seconds: float) -> ControlReply | None:
        subject = self._names.control(member[0])
        answer = await self._broker.request(subject, encode(request), timeout_seconds)
        if answer is None:
            return None
        reply = self._parse(subject, answer)
        if reply is not None:
            self._note_refusal(member, reply)
        return reply

    async def _ask_all(
        self, members: Collection[Member], request: Message, timeout_seconds: float
    ) -> dict[Member, ControlReply | None]:
        """Put one request to all workers, of whom `members` are meant; None stands for no answer in time."""
        answers = PhaseAnswers(members)
        await self._collect(answers, request, timeout_seconds)
        return answers.all

    async def _collect(self, answers: "PhaseAnswers", request: Message, timeout_seconds: float) -> None:
        """Put one request to all workers, and wait for the answers of those who are meant.

        Nobody is waited for who has fallen silent, or has another engine now, while others are heard.
        """
        subject, gone = self._names.control_all, set[Member]()

        def heard(data: bytes | None) -> None:
            reply = None if data is None else self._parse(subject, data)
            if reply is not None and (member := answers.take(reply)) is not None:
                self._note_refusal(member, reply)
            if data is None:  # nobody listens
                answers.is_complete.set()

        async with self._broker.request_all(subject, encode(request), heard):
            deadline = self._fleet.now() + timeout_seconds
            while (left := deadline - self._fleet.now()) > 0 and not answers.is_complete.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(answers.is_complete.wait(), min(left, HEARTBEAT_SECONDS))
                living = {(beat.worker, beat.engine) for beat in self._fleet.living}
                missing = answers.missing - living if living else set()
                if answers.missing <= (
                    missing & gone
                ):  # missing twice: the first beats after a pause come singly
                    return
                gone = missing

    def _parse(self, subject: str, answer: bytes) -> ControlReply | None:
        try:
            return parse_reply(answer)
        except ValueError as error:
            self._refusals.add("reply of a worker", f"{subject}: {error}")
            return None

    def _note_refusal(self, member: Member, reply: ControlReply) -> None:
        if reply.is_refusal:
            self._refused_updates.refused(member[0], reply.message, self._fleet.now())

    def _got(self, member: Member, version: PolicyVersion) -> None:
        """Note that an engine has said that it is at `version`."""
        self._at[member] = version
        self._refused_updates.accepted(member[0])

    def _check_refusals(self) -> None:
        """Raise WeightsRefused if all living engines have refused for too long."""
        self._refused_updates.check([beat.worker for beat in self._fleet.living], self._fleet.now())

    def _has(self, beat: Heartbeat, version: PolicyVersion) -> bool:
        """Return whether an engine has `version`. What we saw committed counts before the heartbeat."""
        said = None if beat.engine_state == "dirty" else beat.version
        return self._at.get((beat.worker, beat.engine), said) == version
