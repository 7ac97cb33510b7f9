"""The controller's part in weight epochs: who is in the group, and its four phases.

Why a group lasts for one membership: docs/decisions/0004-weight-epochs.md.

Outcomes are asymmetric: rank 0's broadcast may fail where engines have received everything, and the other
way round. So an engine has a version only when every one of its own answers said so, and a group in which
anything went wrong is given up: the next epoch has a new name, fewer members, and sends everything again.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from asyncrl_api.names import JobNames
from asyncrl_runtime.contract.broker import Requests
from asyncrl_runtime.contract.messages import (
    CommitUpdate,
    ControlReply,
    JoinGroup,
    PolicyVersion,
    PrepareUpdate,
    ProbeEngine,
    ReceiveWeights,
)
from asyncrl_runtime.contract.refused import Refusals
from asyncrl_runtime.weights.bucket import PublishedWeights
from asyncrl_runtime.weights.engines import Engines, Member, PhaseAnswers, Published, UpdateSeconds
from asyncrl_runtime.weights.fleet import Fleet
from asyncrl_runtime.weights.group import MeetingPlace, WeightGroup, WeightGroups

log = logging.getLogger(__name__)

MAX_EPOCHS = 4
"""The maximum number of tries of one publication; each leaves out whoever failed in the one before."""
MAX_GROUPS = 2
"""The maximum number of groups that a version is sent to: each costs one more broadcast of everything, and
joining all in one costs every engine a stop."""
PROBE_SECONDS = 6.0
"""How long a worker may take to answer a probe; its own probe of its engine lasts 5 s at most."""
SUSPECT_SECONDS = 1.0
"""How long, after a broadcast that broke, the answers of those who broke it are waited for."""


class ChecksumMismatch(Exception):
    """Engines that were sent the same weights hold different ones."""


@dataclass(frozen=True, eq=False)
class _Epoch:
    """A weight epoch: one membership, and its group."""

    name: str
    members: frozenset[Member]
    group: WeightGroup
    place: MeetingPlace
    """Open as long as the group: NCCL meets there to broadcast first."""


class WeightPublisher(Engines):
    """Brings engines to a version. One publication at a time.

    An engine that comes late joins a group of its own, beside the one of the others, who go on sampling. The
    groups stay, and take part in every publication, until the next change or until there are too many: then
    all join one.

    Args:
        weights: what is published.
        groups: makes the groups of its epochs.
        attempt: the trainer's attempt; with the epoch's number it names the group.
        host: the address at which engines reach this process.
        timeout_seconds: the deadline of a phase; 0 scales it by the model's bytes.
        verify: whether to compare the checksums of all engines that were brought to the same version.
        refusals: counts what arrives and is not taken.
    """

    def __init__(
        self,
        broker: Requests,
        names: JobNames,
        fleet: Fleet,
        weights: PublishedWeights,
        groups: WeightGroups,
        *,
        attempt: int,
        host: str,
        backend: str,
        model_bytes: int,
        timeout_seconds: float = 0,
        verify: bool = False,
        refusals: Refusals | None = None,
    ) -> None:
        super().__init__(
            broker,
            names,
            fleet,
            attempt=attempt,
            num_bytes=model_bytes,
            timeout_seconds=timeout_seconds,
            refusals=refusals,
        )
        self.weights = weights
        self._groups = groups
        self._host = host
        self._backend = backend
        self._verify = verify
        self._num_epochs = 0
        self._epochs: list[_Epoch] = []
        self._published: PolicyVersion | None = None
        self._checksums: dict[str, str] = {}  # those of that version, by worker

    async def publish(self, version: PolicyVersion, interrupt: str) -> Published:
        """See `Publisher`. Returns after MAX_EPOCHS at the latest, each within the phases' deadlines.

        Raises:
            ChecksumMismatch: with `verify`, engines at this version hold different weights.
            WeightsRefused: see `Publisher`.
        """
        failed: set[Member] = set()
        suspected: set[Member] = set()
        checksums: dict[str, str] = {}
        num_tries, seconds = 0, UpdateSeconds()
        while num_tries < MAX_EPOCHS:
            members = [member for member in self.behind(version) if member not in failed]
            if interrupt == "Drain":
                members = await self._drained(members, version)
            if not members:
                break
            num_tries += 1
            try:
                await self._update(members, version, interrupt, checksums, seconds)
            except _EpochFailed as error:
                log.warning("weights %s, epoch %d: %s", version, self._num_epochs, error)
                failed |= error.culprits | (error.suspects & suspected)
                suspected |= error.suspects
                self._remember_failures(failed)
        earlier = self._checksums if version == self._published else {}
        self._published, self._checksums = version, earlier | checksums
        if len(set(self._checksums.values())) > 1:
            raise ChecksumMismatch(f"version {version}: {self._checksums}")
        self._check_refusals()
        told = seconds if checksums else None
        return Published(tuple(checksums), tuple(worker for worker, _ in failed), num_tries, checksums, told)

    async def leave(self) -> None:
        """Give up all groups; never waits for anybody."""
        await self._leave(self._epochs)

    async def _leave(self, epochs: Iterable[_Epoch]) -> None:
        for epoch in list(epochs):
            if epoch in self._epochs:
                self._epochs.remove(epoch)
                await epoch.group.leave()
                epoch.place.close()

    async def _update(
        self,
        members: list[Member],
        version: PolicyVersion,
        interrupt: str,
        checksums: dict[str, str],
        seconds: UpdateSeconds,
    ) -> None:
        """Bring `members` to the version; add the checksum of each that has it now to `checksums`, by worker.

        Raises:
            _EpochFailed: not all of `members` got the version; those who have committed keep it nevertheless.
        """
        epochs = await self._epochs_of(members)
        groups = tuple(epoch.name for epoch in epochs)
        try:
            async with _Gathering(self.weights, seconds) as gathering:
                prepare = PrepareUpdate(
                    groups=groups, version=version, interrupt=interrupt, timeout_seconds=self._timeout
                )
                self._expect(await self._ask_all(members, prepare, self._timeout), "prepare")
                await self._transfer(epochs, members, version, gathering)
            commit = CommitUpdate(groups=groups, version=version, checksum=self._verify)
            replies = await self._ask_all(members, commit, self._timeout + 60 * self._verify)
            for member, reply in replies.items():
                if reply is not None and reply.ok:
                    self._got(member, version)
                    checksums[member[0]] = reply.checksum
                    seconds.pause = max(seconds.pause, reply.paused_seconds)
            self._expect(replies, "commit")
        except BaseException:  # also if it is broken off: engines would wait for the next bucket
            await self._leave(epochs)
            raise

    async def _epochs_of(self, members: list[Member]) -> list[_Epoch]:
        """Return epochs whose members are these: those that there are, and another one if it is needed.

        An epoch of which only some are meant has changed, and ends. Then all who are meant join one.
        """
        meant = set(members)
        living = {(beat.worker, beat.engine) for beat in self._fleet.living if beat.engine_state != "down"}
        await self._leave([epoch for epoch in self._epochs if not epoch.members & (living | meant)])
        kept = [epoch for epoch in self._epochs if epoch.members <= meant]
        changed = [epoch for epoch in self._epochs if epoch.members & meant and epoch not in kept]
        late = meant.difference(*(epoch.members for epoch in kept))
        if changed or len(kept) + bool(late) > MAX_GROUPS:
            await self._leave([*kept, *changed])
            kept, late = [], meant
        if late:
            kept.append(await self._join([member for member in members if member in late]))
            self._epochs.append(kept[-1])
        return kept

    async def _join(self, members: list[Member]) -> _Epoch:
        """Form a group of this process and `members`.

        All engines block in the join until everyone is there, so whoever is gone is left out beforehand. It
        cannot be broken off as soon as one says no: an engine that comes to a closed place hangs. If time
        runs out, the place is closed, which frees them; whoever had answered before that, or does not answer
        after it, is to blame.
        """
        self._num_epochs += 1
        name = f"wu-{self._attempt}-{self._num_epochs}"
        probed = await self._ask(members, ProbeEngine(), PROBE_SECONDS)
        self._expect(probed, "probe")
        first_ranks, world_size = assign_ranks({m: reply.num_ranks for m, reply in probed.items() if reply})
        place = self._groups.open_place(self._host)
        requests = {
            member: JoinGroup(
                group=name,
                host=self._host,
                port=place.port,
                rank=rank,
                world_size=world_size,
                backend=self._backend,
                timeout_seconds=self._timeout + 5,
                layout=self.weights.layout,
            )
            for member, rank in first_ranks.items()
        }
        asked = {
            member: asyncio.create_task(self._ask_one(member, request, self._timeout + 10))
            for member, request in requests.items()
        }
        try:
            group = await place.form(world_size, name, self._backend, self._timeout)
        except asyncio.CancelledError:
            place.close()
            raise
        except (RuntimeError, TimeoutError) as error:
            place.close()
            early = {member for member, task in asked.items() if task.done()}
            replies = {member: await task for member, task in asked.items()}
            silent = {member for member, reply in replies.items() if reply is None}
            # If all were freed alike, nobody is to blame, and all are tried again in a new epoch.
            raise _EpochFailed(f"join: {_first_line(error)}", early | silent) from error
        epoch = _Epoch(name, frozenset(members), group, place)
        try:
            self._expect({member: await task for member, task in asked.items()}, "join")
        except _EpochFailed:
            await epoch.group.leave()
            epoch.place.close()
            raise
        return epoch

    async def _transfer(
        self, epochs: list[_Epoch], members: list[Member], version: PolicyVersion, gathering: "_Gathering"
    ) -> None:
        """Broadcast all buckets. Each engine receives them one by one, and answers once, after the last."""
        receive = ReceiveWeights(
            groups=tuple(epoch.name for epoch in epochs),
            version=version,
            timeout_seconds=self._bucket_timeout,
        )
        answers, longest = PhaseAnswers(members), self._bucket_timeout * (1 + len(self.weights.layout)) + 10
        asking = asyncio.create_task(self._collect(answers, receive, longest))
        sent = dict.fromkeys(epochs, 0)
        try:
            async for bucket in gathering:
                began = self._fleet.now()
                if error := await self._broadcast(bucket, sent, answers):
                    raise await self._broken_broadcast(answers, asking, sent, error)
                gathering.seconds.transfer += self._fleet.now() - began
            began = self._fleet.now()
            await asyncio.wait({asking}, timeout=self._bucket_timeout + 10)
            if asking.done():
                asking.result()
            self._expect(answers.all, "transfer")
            gathering.seconds.load += self._fleet.now() - began
        finally:
            asking.cancel()

    async def _broadcast(
        self, bucket: Tensor, sent: dict[_Epoch, int], answers: PhaseAnswers
    ) -> Exception | None:
        """Send a bucket to all groups, and count it in `sent`; return what went wrong.

        A member that says no does not take part in this broadcast, so it is not waited for to the deadline.
        """
        if answers.is_refused.is_set():
            return RuntimeError("a member has said no")

        async def send() -> None:
            for epoch in sent:
                await epoch.group.broadcast(bucket)
                sent[epoch] += 1

        sending, refused = asyncio.create_task(send()), asyncio.create_task(answers.is_refused.wait())
        try:
            await asyncio.wait({sending, refused}, return_when=asyncio.FIRST_COMPLETED)
            done, _ = await asyncio.wait({sending}, timeout=SUSPECT_SECONDS)
            if not done:
                return TimeoutError("a member has said no, and the others wait for it")
            sending.result()
        except (RuntimeError, TimeoutError) as error:
            return error
        finally:
            sending.cancel()
            refused.cancel()
        return None

    async def _broken_broadcast(
        self,
        answers: PhaseAnswers,
        asking: "asyncio.Task[None]",
        sent: Mapping[_Epoch, int],
        error: Exception,
    ) -> "_EpochFailed":
        """Leave the groups, to free those who wait for what will not be sent any more, and find who broke it.

        Who failed with a bucket that its group has been sent is to blame. Who failed with a later one before
        the group was left has broken it, or got its data from one that is gone and fails the next probe.
        """
        await asyncio.wait({asking}, timeout=SUSPECT_SECONDS)
        early = {member: reply for member, reply in answers.all.items() if reply and not reply.ok}
        await self._leave(sent)
        await asyncio.wait({asking}, timeout=self._bucket_timeout + 10)
        num_sent = {member: count for epoch, count in sent.items() for member in epoch.members}
        failed_alone = {member for member, reply in early.items() if reply.bucket <= num_sent[member]}
        culprits = answers.missing | failed_alone
        return _EpochFailed(f"broadcast: {_first_line(error)}", culprits, set(early) - culprits)

    @property
    def _bucket_timeout(self) -> float:
        """How long an engine may be at one bucket. It begins to wait for it before it is gathered, and must
        outlast the broadcast, or one engine that hangs would make all others miss their deadline.
        """
        return 2 * self._timeout

    def _expect(self, replies: Mapping[Member, ControlReply | None], phase: str) -> None:
        """Raise _EpochFailed unless all said yes."""
        culprits = {member for member, reply in replies.items() if reply is None or not reply.ok}
        if culprits:
            for member in culprits:
                self._at.pop(member, None)
            said = [f"{m[0]}: {r.message if (r := replies[m]) else 'no answer'}" for m in sorted(culprits)]
            raise _EpochFailed(f"{phase}: {'; '.join(said)}", culprits)


class _Gathering:
    """Gathers the buckets, each while the one before is sent; the first one before the engines are paused."""

    def __init__(self, weights: PublishedWeights, seconds: UpdateSeconds) -> None:
        self._weights = weights
        self._next: asyncio.Future[Tensor] | None = None
        self.seconds = seconds

    async def __aenter__(self) -> Self:
        self._begin(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._next is not None:
            self._next.cancel()

    def _begin(self, number: int) -> None:
        layout = self._weights.layout
        self._next = None
        if number < len(layout):
            self._next = asyncio.ensure_future(self._weights.gather(layout[number].names))

    async def __aiter__(self) -> AsyncIterator[Tensor]:
        clock, number = asyncio.get_running_loop().time, 0
        while self._next is not None:
            began = clock()
            bucket = await self._next
            self.seconds.gather += clock() - began
            number += 1
            self._begin(number)
            yield bucket


def assign_ranks(num_ranks: Mapping[Member, int]) -> tuple[dict[Member, int], int]:
    """Return the first rank of each engine, in the order given, and the size of the group.

    Rank 0 is the trainer's. An engine over several GPUs takes as many ranks: the first and those after it.
    """
    first_ranks, world_size = {}, 1
    for member, count in num_ranks.items():
        first_ranks[member] = world_size
        world_size += count
    return first_ranks, world_size


class _EpochFailed(Exception):
    """An epoch did not end well: `culprits` are to blame, `suspects` are if they are suspected once more."""

    def __init__(
        self, message: str, culprits: set[Member], suspects: frozenset[Member] | set[Member] = frozenset()
    ) -> None:
        super().__init__(message)
        self.culprits = culprits
        self.suspects = suspects


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
