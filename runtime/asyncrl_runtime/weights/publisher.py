"""The controller's part in weight epochs: who is in the group, and its four phases.

Why a group lasts for one membership: docs/decisions/0004-weight-epochs.md.

Outcomes are asymmetric: rank 0's broadcast may fail where engines have received everything, and the other
way round. So an engine has a version only when every one of its own answers said so, and a group in which
anything went wrong is given up: the next epoch has a new name, fewer members, and sends everything again.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

from asyncrl_api.names import JobNames
from asyncrl_runtime.contract.broker import Requests
from asyncrl_runtime.contract.messages import (
    CommitUpdate,
    ControlReply,
    JoinGroup,
    PolicyVersion,
    PrepareUpdate,
    ProbeEngine,
    ReceiveBucket,
)
from asyncrl_runtime.contract.refused import Refusals
from asyncrl_runtime.weights.bucket import Bucket
from asyncrl_runtime.weights.engines import Engines, Member, Published
from asyncrl_runtime.weights.fleet import Fleet
from asyncrl_runtime.weights.group import MeetingPlace, WeightGroup, WeightGroups

log = logging.getLogger(__name__)

LoadBucket = Callable[[], Awaitable[Bucket]]
"""Returns a bucket when its turn has come: there is memory for one, and under ZeRO 3 its weights lie in
pieces on all ranks until then."""
ListBuckets = Callable[[], Sequence[LoadBucket]]
"""Returns the weights as they are now, always in the same order, in at least one bucket."""
MAX_EPOCHS = 4
"""The maximum number of tries of one publication; each leaves out whoever failed in the one before."""
PROBE_SECONDS = 6.0
"""How long a worker may take to answer a probe; its own probe of its engine lasts 5 s at most."""
SUSPECT_SECONDS = 1.0
"""How long, after a broadcast that broke, the answers of those who broke it are waited for."""


class ChecksumMismatch(Exception):
    """Engines that were sent the same weights hold different ones."""


class WeightPublisher(Engines):
    """Brings engines to a version. One publication at a time.

    Args:
        buckets: lists what is published.
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
        buckets: ListBuckets,
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
        self._buckets = buckets
        self._groups = groups
        self._host = host
        self._backend = backend
        self._verify = verify
        self._epoch = 0
        self._place: MeetingPlace | None = None  # as long as the group: NCCL meets there to broadcast first
        self._group: WeightGroup | None = None
        self._members: tuple[Member, ...] = ()
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
        num_epochs = 0
        while num_epochs < MAX_EPOCHS:
            members = [member for member in self.behind(version) if member not in failed]
            if interrupt == "Drain":
                members = await self._drained(members)
            if not members:
                break
            num_epochs += 1
            try:
                await self._run_epoch(members, version, interrupt, checksums)
            except _EpochFailed as error:
                log.warning("weights %s, epoch %d: %s", version, self._epoch, error)
                failed |= error.culprits | (error.suspects & suspected)
                suspected |= error.suspects
                self._remember_failures(failed)
                await self.leave()
        earlier = self._checksums if version == self._published else {}
        self._published, self._checksums = version, earlier | checksums
        if len(set(self._checksums.values())) > 1:
            raise ChecksumMismatch(f"version {version}: {self._checksums}")
        self._check_refusals()
        return Published(tuple(checksums), tuple(worker for worker, _ in failed), num_epochs, checksums)

    async def leave(self) -> None:
        """Give up the group, if there is one; never waits for anybody."""
        group, self._group, self._members = self._group, None, ()
        if group is not None:
            await group.leave()
        if self._place is not None:
            self._place.close()
            self._place = None

    async def _run_epoch(
        self,
        members: list[Member],
        version: PolicyVersion,
        interrupt: str,
        checksums: dict[str, str],
    ) -> None:
        """Bring `members` to the version; add the checksum of each that has it now to `checksums`, by worker.

        Raises:
            _EpochFailed: not all of `members` got the version; those who have committed keep it nevertheless.
        """
        if set(self._members) != set(members):
            await self.leave()
            await self._join(members)
        name = self._group_name
        prepare = PrepareUpdate(
            group=name, version=version, interrupt=interrupt, timeout_seconds=self._timeout
        )
        self._expect(await self._ask(members, prepare, self._timeout), "prepare")
        await self._transfer(members, version)
        commit = CommitUpdate(group=name, version=version, checksum=self._verify)
        replies = await self._ask(members, commit, self._timeout + 60 * self._verify)
        for member, reply in replies.items():
            if reply is not None and reply.ok:
                self._got(member, version)
                checksums[member[0]] = reply.checksum
        self._expect(replies, "commit")

    @property
    def _group_name(self) -> str:
        return f"wu-{self._attempt}-{self._epoch}"

    async def _join(self, members: list[Member]) -> None:
        """Form a group of this process and `members`.

        All engines block in the join until everyone is there, so whoever is gone is left out beforehand. It
        cannot be broken off as soon as one says no: an engine that comes to a closed place hangs. If time
        runs out, the place is closed, which frees them; whoever had answered before that, or does not answer
        after it, is to blame.
        """
        self._epoch += 1
        probed = await self._ask(members, ProbeEngine(), PROBE_SECONDS)
        self._expect(probed, "probe")
        first_ranks, world_size = assign_ranks({m: reply.num_ranks for m, reply in probed.items() if reply})
        place = self._groups.open_place(self._host)
        requests = {
            member: JoinGroup(
                group=self._group_name,
                host=self._host,
                port=place.port,
                rank=rank,
                world_size=world_size,
                backend=self._backend,
                timeout_seconds=self._timeout + 5,
            )
            for member, rank in first_ranks.items()
        }
        asked = {
            member: asyncio.create_task(self._ask_one(member, request, self._timeout + 10))
            for member, request in requests.items()
        }
        try:
            self._group = await place.form(world_size, self._group_name, self._backend, self._timeout)
        except (RuntimeError, TimeoutError) as error:
            place.close()
            early = {member for member, task in asked.items() if task.done()}
            replies = {member: await task for member, task in asked.items()}
            silent = {member for member, reply in replies.items() if reply is None}
            # If all were freed alike, nobody is to blame, and all are tried again in a new epoch.
            raise _EpochFailed(f"join: {_first_line(error)}", early | silent) from error
        self._place, self._members = place, tuple(members)
        self._expect({member: await task for member, task in asked.items()}, "join")

    async def _transfer(self, members: list[Member], version: PolicyVersion) -> None:
        assert self._group is not None  # it was joined
        buckets = self._buckets()
        for number, load in enumerate(buckets, start=1):
            bucket = await load()
            request = ReceiveBucket(
                group=self._group_name,
                version=version,
                names=bucket.names,
                dtypes=bucket.dtypes,
                shapes=bucket.shapes,
                is_last=number == len(buckets),
                timeout_seconds=self._timeout,
            )
            asked = {
                member: asyncio.create_task(self._ask_one(member, request, self._timeout + 10))
                for member in members
            }
            try:
                await self._group.broadcast(bucket.data)
            except (RuntimeError, TimeoutError) as error:
                raise await self._broken_broadcast(asked, error) from error
            self._expect({member: await task for member, task in asked.items()}, "transfer")

    async def _broken_broadcast(
        self, asked: Mapping[Member, "asyncio.Task[ControlReply | None]"], error: Exception
    ) -> "_EpochFailed":
        """Leave the group, to free those who wait for what will not be sent any more, and find who broke it.

        An engine that says no before that has broken it, or got its data from one that is gone and fails the
        next probe.
        """
        await asyncio.wait(asked.values(), timeout=SUSPECT_SECONDS)
        early = [member for member, task in asked.items() if task.done()]
        await self.leave()
        replies = {member: await task for member, task in asked.items()}
        silent = {member for member, reply in replies.items() if reply is None}
        suspects = {member for member in early if (reply := replies[member]) and not reply.ok}
        return _EpochFailed(f"broadcast: {_first_line(error)}", silent, suspects)

    def _expect(self, replies: Mapping[Member, ControlReply | None], phase: str) -> None:
        """Raise _EpochFailed unless all said yes."""
        culprits = {member for member, reply in replies.items() if reply is None or not reply.ok}
        if culprits:
            for member in culprits:
                self._at.pop(member, None)
            said = [f"{m[0]}: {r.message if (r := replies[m]) else 'no answer'}" for m in sorted(culprits)]
            raise _EpochFailed(f"{phase}: {'; '.join(said)}", culprits)


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
