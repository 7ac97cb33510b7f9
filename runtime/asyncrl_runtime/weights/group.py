"""The process group of a weight epoch: trainer rank 0 and engines, which are jobs of their own.

`init_process_group` makes one group per process, so the extra group is put together by hand from the
same parts, as SGLang does: a TCP store on rank 0 and `_new_process_group_helper`. The name prefixes the
keys in the store and must be new for every group; a member that died spoils its group for good, and the
way on is a new one.

Everyone enters through `join_group`, rank 0 included, and so counts itself in the store
(`wait_for_workers`), as SGLang's engines do; the store itself is served without waiting for anyone. A
member needs no deadline of its own: when rank 0 drops the store, whoever waits in the join fails at once.
"""

import socket
from datetime import timedelta

import torch.distributed as dist
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
        # A socket that is bound already: no port is guessed, and none is lost to someone else in between.
        self._server: TCPStore | None = TCPStore(
            host, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    def close(self) -> None:
        self._server = None


def open_store(host: str) -> GroupStore:
    """Serve a store on `host`, an address of this machine that the members can reach."""
    return GroupStore(host)


def host_group(
    store: GroupStore, world_size: int, name: str, backend: str, timeout_seconds: float
) -> dist.ProcessGroup:
    """Form the group as rank 0 and wait until all members have joined.

    Args:
        store: keep it open as long as the group lives (NCCL connects at the first collective).
        world_size: rank 0 and all members.
        backend: `gloo` or `nccl`.
        timeout_seconds: for the join, and from then on for every collective of the group.

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
    """Enter the group, 1 <= rank < world_size; blocks until all have.

    Raises:
        RuntimeError: nobody listens there, rank 0 dropped the store, or time ran out.
    """
    timeout = timedelta(seconds=timeout_seconds)
    store = TCPStore(address, port, world_size, is_master=False, timeout=timeout, wait_for_workers=True)
    return _make_group(store, rank, world_size, name, backend, timeout)


def leave_group(group: dist.ProcessGroup) -> None:
    """Close this process's end; works at once, whatever became of the others.

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
        [],  # no ranks of the default group: the members are of other jobs
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
