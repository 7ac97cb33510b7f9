"""The controller's part in weight epochs: who is in the group, and the four phases.

Why a group lasts for one membership: docs/decisions/0004-weight-epochs.md.

Outcomes are asymmetric: rank 0's broadcast may fail where engines have received everything, and the other
way round. So an engine has a version only when every one of its own answers said so, and a group in which
anything went wrong is given up: the next epoch has a new name, fewer members, and sends everything again.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from asyncrl_api.names import JobNames
from asyncrl_runtime.contract.messages import (
    CommitUpdate,
    ControlReply,
    JoinGroup,
    PolicyVersion,
    PrepareUpdate,
    ProbeEngine,
    ReceiveBucket,
)
from asyncrl_runtime.transport.broker import Broker
from asyncrl_runtime.transport.fleet import Fleet
from asyncrl_runtime.weights.bucket import Bucket
from asyncrl_runtime.weights.engines import Engines, Member, Published
from asyncrl_runtime.weights.group import GroupStore, host_group, leave_group, open_store

log = logging.getLogger(__name__)

T = TypeVar("T")

LoadBucket = Callable[[], Awaitable[Bucket]]
"""Gives a bucket when it is its turn: there is memory for one, and under ZeRO 3 its weights lie in pieces on
all ranks until then."""
MAX_EPOCHS = 4
"""Tries of one publication; each leaves out who failed in the one before."""
PROBE_SECONDS = 6.0
"""A worker's own probe of its engine lasts 5 s at most."""
SUSPECT_SECONDS = 1.0
"""After a broadcast that broke, for the words of those who broke it."""


class ChecksumMismatch(Exception):
    """Engines that were sent the same weights hold different ones."""


class WeightPublisher(Engines):
    """Brings engines to a version. One publication at a time.

    Args:
        attempt: of the trainer; with the epoch's number it names the group.
        host: where engines reach this process.
        timeout_seconds: of a phase; 0 scales it by the model's bytes.
        verify: compare the checksums of all engines that were brought to the same version.
    """

    def __init__(
        self,
        broker: Broker,
        names: JobNames,
        fleet: Fleet,
        *,
        attempt: int,
        host: str,
        backend: str,
        model_bytes: int,
        timeout_seconds: float = 0,
        verify: bool = False,
    ) -> None:
        super().__init__(
            broker, names, fleet, attempt=attempt, num_bytes=model_bytes, timeout_seconds=timeout_seconds
        )
        self._host = host
        self._backend = backend
        self._verify = verify
        self._epoch = 0
        self._store: GroupStore | None = None  # as long as the group: NCCL meets there at its first broadcast
        self._group: dist.ProcessGroup | None = None
        self._members: tuple[Member, ...] = ()
        self._published: PolicyVersion | None = None
        self._checksums: dict[str, str] = {}  # of that version, by worker
        self._side = ThreadPoolExecutor(1, thread_name_prefix="weights")

    async def publish(
        self, version: PolicyVersion, buckets: Sequence[LoadBucket], interrupt: str
    ) -> Published:
        """Send `version` to every engine that lives, is willing, and has another one.

        The trainer goes on with whoever is left, even nobody: who is missing gets the weights at the next
        boundary. Returns after MAX_EPOCHS at the latest, each within the phases' deadlines.

        Args:
            buckets: the weights, always in the same order, at least one.
            interrupt: `spec.rollout.interrupt`.

        Raises:
            ChecksumMismatch: with `verify`.
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
                await self._run_epoch(members, version, buckets, interrupt, checksums)
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
        return Published(tuple(checksums), tuple(worker for worker, _ in failed), num_epochs, checksums)

    async def leave(self) -> None:
        """Give up the group, if there is one; never waits for anybody."""
        group, self._group, self._members = self._group, None, ()
        if group is not None:
            await asyncio.to_thread(leave_group, group)
        if self._store is not None:
            self._store.close()
            self._store = None

    async def _run_epoch(
        self,
        members: list[Member],
        version: PolicyVersion,
        buckets: Sequence[LoadBucket],
        interrupt: str,
        checksums: dict[str, str],
    ) -> None:
        """Add worker -> checksum to `checksums` for those that have the version now.

        Raises:
            _EpochFailed: not all of `members`; those who have committed keep it nevertheless.
        """
        if set(self._members) != set(members):
            await self.leave()
            await self._join(members)
        name = self._group_name
        prepare = PrepareUpdate(
            group=name, version=version, interrupt=interrupt, timeout_seconds=self._timeout
        )
        self._expect(await self._ask(members, prepare, self._timeout), "prepare")
        await self._transfer(members, version, buckets)
        commit = CommitUpdate(group=name, version=version, checksum=self._verify)
        replies = await self._ask(members, commit, self._timeout + 60 * self._verify)
        for member, reply in replies.items():
            if reply is not None and reply.ok:
                self._at[member] = version
                checksums[member[0]] = reply.checksum
        self._expect(replies, "commit")

    @property
    def _group_name(self) -> str:
        return f"wu-{self._attempt}-{self._epoch}"

    async def _join(self, members: list[Member]) -> None:
        """Form a group of this process and `members`.

        All engines block in the join until everyone is there, so who is gone is left out before. It cannot be
        broken off as soon as one says no: an engine that comes to a dropped store hangs. If time runs out the
        store is dropped, which frees them; who had answered before that, or does not answer after it, is to
        blame.
        """
        self._epoch += 1
        probed = await self._ask(members, ProbeEngine(), PROBE_SECONDS)
        self._expect(probed, "probe")
        first_ranks, world_size = place({m: reply.num_ranks for m, reply in probed.items() if reply})
        store = open_store(self._host)
        requests = {
            member: JoinGroup(
                group=self._group_name,
                host=self._host,
                port=store.port,
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
            self._group = await self._in_side_thread(self._host_group, store, world_size)
        except (RuntimeError, TimeoutError) as error:
            store.close()
            early = {member for member, task in asked.items() if task.done()}
            replies = {member: await task for member, task in asked.items()}
            silent = {member for member, reply in replies.items() if reply is None}
            # Where all were freed alike nobody is to blame, and all are tried again in a new epoch.
            raise _EpochFailed(f"join: {_first_line(error)}", early | silent) from error
        self._store, self._members = store, tuple(members)
        self._expect({member: await task for member, task in asked.items()}, "join")

    def _host_group(self, store: GroupStore, world_size: int) -> dist.ProcessGroup:
        return host_group(store, world_size, self._group_name, self._backend, self._timeout)

    async def _transfer(
        self, members: list[Member], version: PolicyVersion, buckets: Sequence[LoadBucket]
    ) -> None:
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
                await self._in_side_thread(self._broadcast, bucket.data)
            except (RuntimeError, TimeoutError) as error:
                raise await self._broken_broadcast(asked, error) from error
            self._expect({member: await task for member, task in asked.items()}, "transfer")

    async def _broken_broadcast(
        self, asked: Mapping[Member, "asyncio.Task[ControlReply | None]"], error: Exception
    ) -> "_EpochFailed":
        """Leave the group, to free those who wait for what will not be sent any more, and find who broke it.

        Who says no before that has broken it, or had its data from one who is gone and fails the next probe.
        """
        await asyncio.wait(asked.values(), timeout=SUSPECT_SECONDS)
        early = [member for member, task in asked.items() if task.done()]
        await self.leave()
        replies = {member: await task for member, task in asked.items()}
        silent = {member for member, reply in replies.items() if reply is None}
        suspects = {member for member in early if (reply := replies[member]) and not reply.ok}
        return _EpochFailed(f"broadcast: {_first_line(error)}", silent, suspects)

    def _broadcast(self, data: Tensor) -> None:
        failure = ""
        try:
            dist.broadcast(data, src=0, group=self._group)
            if data.is_cuda:  # there it has only been begun
                torch.cuda.synchronize(data.device)
        except RuntimeError as error:
            failure = str(error)
        if failure:
            # Not from the error itself: its traceback would keep the group, and so its connections, alive.
            raise RuntimeError(failure)

    async def _in_side_thread(self, function: Callable[..., T], *arguments: object) -> T:
        """Run a collective where it can be abandoned: what hangs keeps its thread, and a new one is made."""
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._side, function, *arguments)
        done, _ = await asyncio.wait({future}, timeout=self._timeout + 10)
        if not done:
            self._side.shutdown(wait=False)
            self._side = ThreadPoolExecutor(1, thread_name_prefix="weights")
            raise TimeoutError("a collective outlasted its own deadline and was abandoned")
        return future.result()

    def _expect(self, replies: Mapping[Member, ControlReply | None], phase: str) -> None:
        """Raise unless all said yes."""
        culprits = {member for member, reply in replies.items() if reply is None or not reply.ok}
        if culprits:
            for member in culprits:
                self._at.pop(member, None)
            said = [f"{m[0]}: {r.message if (r := replies[m]) else 'no answer'}" for m in sorted(culprits)]
            raise _EpochFailed(f"{phase}: {'; '.join(said)}", culprits)


def place(num_ranks: Mapping[Member, int]) -> tuple[dict[Member, int], int]:
    """Return the first rank of each engine, one behind the other, and the size of the group.

    Rank 0 is the trainer's. An engine over several GPUs takes as many ranks, the first and those after it.
    """
    first_ranks, world_size = {}, 1
    for member, count in num_ranks.items():
        first_ranks[member] = world_size
        world_size += count
    return first_ranks, world_size


class _EpochFailed(Exception):
    """`suspects` are to blame if they are suspected once more."""

    def __init__(
        self, message: str, culprits: set[Member], suspects: frozenset[Member] | set[Member] = frozenset()
    ) -> None:
        super().__init__(message)
        self.culprits = culprits
        self.suspects = suspects


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
