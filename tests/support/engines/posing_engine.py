"""A CPU engine that poses as one on several GPUs: in a weight group it is that many members.

They are ranks as SGLang's tensor-parallel processes are, one behind the other, each with its own connection
and buffer. The weights that the model gets are those of the first, once all have received the same.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from asyncrl_runtime.engine import app
from asyncrl_runtime.engine.model import CausalModel
from asyncrl_runtime.engine.weight_loading import InitGroup, Tensors, WeightLoader

T = TypeVar("T")

SECONDS = timedelta(seconds=60)


def pose(tp_size: int) -> None:
    """Make the engine of this process pose as one on `tp_size` GPUs."""
    PosingLoader.tp_size = tp_size
    vars(app)["WeightLoader"] = PosingLoader


class PosingLoader(WeightLoader):
    """Takes part in weight groups as `tp_size` members."""

    def __init__(self, model: CausalModel) -> None:
        super().__init__(model)
        self._members: dict[str, list[dist.ProcessGroupGloo]] = {}

    def init_group(self, body: InitGroup) -> str:
        self._members[body.group_name] = self._side_by_side(
            partial(_join, body, body.rank_offset + rank) for rank in range(self.tp_size)
        )
        return "Succeeded to initialize custom process group."

    def destroy_group(self, name: str) -> str:
        del self._members[name]
        return "Succeeded to destroy custom process group."

    def _broadcast(self, body: Tensors) -> list[tuple[str, Tensor]]:
        assert body.load_format == "flattened_bucket"
        dtypes = [getattr(torch, name) for name in body.dtypes]
        sizes = [
            torch.Size(shape).numel() * dtype.itemsize
            for dtype, shape in zip(dtypes, body.shapes, strict=True)
        ]
        first, *others = self._side_by_side(
            partial(_receive, member, sum(sizes)) for member in self._members[body.group_name]
        )
        assert all(torch.equal(first, other) for other in others), "the members were sent different weights"
        parts = [
            part.view(dtype).view(shape)
            for part, dtype, shape in zip(torch.split(first, sizes), dtypes, body.shapes, strict=True)
        ]
        return list(zip(body.names, parts, strict=True))

    def _side_by_side(self, calls: Iterable[Callable[[], T]]) -> list[T]:
        with ThreadPoolExecutor(self.tp_size) as pool:
            return [done.result() for done in [pool.submit(call) for call in calls]]


def _join(body: InitGroup, rank: int) -> dist.ProcessGroupGloo:
    """Join as `join_group` does, but without torch's registry, which takes a name only once per process."""
    store: Store = TCPStore(
        body.master_address, body.master_port, body.world_size, is_master=False, timeout=SECONDS
    )
    for prefix in (body.group_name, f"{body.group_name}/", "cpu/"):
        store = PrefixStore(prefix, store)
    return dist.ProcessGroupGloo(store, rank, body.world_size, SECONDS)


def _receive(member: dist.ProcessGroupGloo, num_bytes: int) -> Tensor:
    received = torch.empty(num_bytes, dtype=torch.uint8)
    options = dist.BroadcastOptions()  # from rank 0
    work = member.broadcast([received], options)  # type: ignore[attr-defined]
    work.wait()
    return received
