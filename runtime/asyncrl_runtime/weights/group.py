"""The process group of a weight epoch: trainer rank 0 and engines, which are jobs of their own.

`init_process_group` makes one group per process, so the extra group is assembled by hand from the same
parts, as SGLang does: a TCP store on rank 0 and `_new_process_group_helper`. The name prefixes the keys in
the store and must be new for every group. A member that died spoils its group for good; the only way on is
a new group.

Everyone enters through `join_group`, rank 0 included, and so counts itself in the store
(`wait_for_workers`), as SGLang's engines do; serving the store waits for nobody. A member needs no deadline
of its own: when rank 0 drops the store, whoever waits in the join fails at once.
"""

import asyncio
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, Store, TCPStore
from torch.distributed.distributed_c10d import (
    Backend,
    GroupName,
    PrefixStore,
    _abort_process_group,
    _new_process_group_helper,
    _world,
)

JOIN_SECONDS = 1800.0
"""How long a member waits for the others when it is given no limit: torch's own default for gloo."""


ABANDON_SECONDS = 10.0
"""How much longer than its own deadline a collective is waited for."""

T = TypeVar("T")


class WeightGroup(Protocol):
    """A weight group that has formed, as rank 0 has it."""

    async def broadcast(self, data: Tensor) -> None:
        """Send `data` to all members.

        Raises:
            RuntimeError: a member is gone.
            TimeoutError: the collective hung and was abandoned.
        """
        ...

    async def leave(self) -> None:
        """Close this process's end, whatever became of the others; never waits for them."""
        ...


class MeetingPlace(Protocol):
    """The place where the members of a weight group meet, served by rank 0 as long as the group lives."""

    @property
    def port(self) -> int: ...

    async def form(self, world_size: int, name: str, backend: str, timeout_seconds: float) -> WeightGroup:
        """Be rank 0 of a group, and wait until all members have joined.

        Args:
            world_size: the number of ranks: rank 0 and those of all members.
            name: a name that is new for every group.
            timeout_seconds: the deadline of the join, and from then on of every broadcast.

        Raises:
            RuntimeError: someone did not join in time; close the place to set the others free.
            TimeoutError: the collective hung and was abandoned.
        """
        ...

    def close(self) -> None:
        """Free everyone who still waits to join."""
        ...


class WeightGroups(Protocol):
    """Makes the weight groups of one trainer, one after the other."""

    def open_place(self, host: str) -> MeetingPlace:
        """Serve a meeting place on `host`, an address of this machine that the members can reach."""
        ...


class GroupStore:
    """The TCP store in which members meet, served by this process on a free port of `host`.

    It listens from the start, so its port can be told to members before `host_group` runs. Closing it
    (or dropping it) frees everyone who still waits in the join.
    """

    def __init__(self, host: str) -> None:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind((host, 0))
        listener.listen(128)
        self.host = host
        self.port: int = listener.getsockname()[1]
        # The socket is bound already: no port is guessed, and none is lost to someone else in between.
        self._server: TCPStore | None = TCPStore(
            host, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    def close(self) -> None:
        self._server = None


class TorchGroups:
    """Weight groups over gloo or NCCL. Their collectives block, so they run in a thread beside the loop."""

    def __init__(self) -> None:
        self._side = ThreadPoolExecutor(1, thread_name_prefix="weights")

    def open_place(self, host: str) -> "TorchMeetingPlace":
        return TorchMeetingPlace(open_store(host), self)

    async def run(self, function: Callable[..., T], *arguments: object, timeout_seconds: float) -> T:
        """Run a collective where it can be abandoned: one that hangs keeps its thread; another is made."""
        future = asyncio.get_running_loop().run_in_executor(self._side, function, *arguments)
        del arguments  # a traceback, of a cancellation too, would keep a group and its connections alive
        try:
            done, _ = await asyncio.wait({future}, timeout=timeout_seconds + ABANDON_SECONDS)
            if not done:
                raise TimeoutError("a collective outlasted its own deadline and was abandoned")
            return future.result()
        finally:
            if not future.done():  # also if the caller does not want to wait any longer
                self._side.shutdown(wait=False)
                self._side = ThreadPoolExecutor(1, thread_name_prefix="weights")


class TorchMeetingPlace:
    """A meeting place at a TCP store."""

    def __init__(self, store: GroupStore, groups: TorchGroups) -> None:
        self.port = store.port
        self._store = store
        self._groups = groups

    async def form(self, world_size: int, name: str, backend: str, timeout_seconds: float) -> "TorchGroup":
        group = await self._groups.run(
            *(host_group, self._store, world_size, name, backend, timeout_seconds),
            timeout_seconds=timeout_seconds,
        )
        return TorchGroup(group, self._groups, timeout_seconds)

    def close(self) -> None:
        self._store.close()


class TorchGroup:
    """A weight group over gloo or NCCL that has formed."""

    def __init__(self, group: dist.ProcessGroup, groups: TorchGroups, timeout_seconds: float) -> None:
        self._group: dist.ProcessGroup | None = group
        self._groups = groups
        self._timeout = timeout_seconds

    async def broadcast(self, data: Tensor) -> None:
        assert self._group is not None
        failure = await self._groups.run(_broadcast, self._group, data, timeout_seconds=self._timeout)
        if failure:
            raise RuntimeError(failure)

    async def leave(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            await asyncio.to_thread(leave_group, group)


def _broadcast(group: dist.ProcessGroup, data: Tensor) -> str:
    """Return what went wrong: an error's own traceback would keep the group, and its connections, alive."""
    try:
        dist.broadcast(data, src=0, group=group)
        if data.is_cuda:  # on a GPU it has only been begun
            torch.cuda.synchronize(data.device)
    except RuntimeError as error:
        return str(error) or type(error).__name__
    return ""


def open_store(host: str) -> GroupStore:
    """Serve a store on `host`, an address of this machine that the members can reach."""
    return GroupStore(host)


def host_group(
    store: GroupStore, world_size: int, name: str, backend: str, timeout_seconds: float
) -> dist.ProcessGroup:
    """Form the group as rank 0 and wait until all members have joined.

    Args:
        store: keep it open as long as the group lives (NCCL connects at the first collective).
        world_size: the number of ranks: rank 0 and those of all members.
        backend: `gloo` or `nccl`.
        timeout_seconds: the deadline of the join, and from then on of every collective of the group.

    Raises:
        RuntimeError: someone did not join in time; close the store to set the others free.
    """
    return join_group(store.host, store.port, 0, world_size, name, backend, timeout_seconds)


def join_group(
    address: str,
    port: int,
    rank: int,
    world_size: int,
    name: str,
    backend: str,
    timeout_seconds: float = JOIN_SECONDS,
) -> dist.ProcessGroup:
    """Enter the group as `rank`, from 1 to world_size - 1; blocks until all members have entered.

    Raises:
        RuntimeError: nobody listens there, rank 0 dropped the store, or time ran out.
    """
    timeout = timedelta(seconds=timeout_seconds)
    store = TCPStore(address, port, world_size, is_master=False, timeout=timeout, wait_for_workers=True)
    return _make_group(store, rank, world_size, name, backend, timeout)


def leave_group(group: dist.ProcessGroup) -> None:
    """Close this process's end at once, whatever became of the others.

    NCCL waits for a dead peer for ever, in its collective and in its goodbye: its communicator is aborted.
    """
    if dist.get_backend(group) == "nccl":
        _abort_process_group(group)
    else:
        dist.destroy_process_group(group)


def _make_group(
    store: Store, rank: int, world_size: int, name: str, backend: str, timeout: timedelta
) -> dist.ProcessGroup:
    _ensure_default_group()
    store.set_timeout(timeout)
    group: dist.ProcessGroup
    group, _ = _new_process_group_helper(
        world_size,
        rank,
        [],  # no ranks of the default group: the members belong to other jobs
        Backend(backend),
        PrefixStore(name, store),
        group_name=GroupName(name),
        timeout=timeout,
    )
    _world.pg_group_ranks[group] = {i: i for i in range(world_size)}  # so that broadcast finds src=0
    return group


def _ensure_default_group() -> None:
    """Torch wants a default group before any other; one of this process alone needs no port."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
