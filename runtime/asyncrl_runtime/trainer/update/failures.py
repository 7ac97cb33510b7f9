"""Why a step ends before its end: by its own fault, in which micro-batch, or because it was stopped.

Its own fault is what the same samples would raise again, such as a token id that the model does not know, or
too little memory. A lost peer, a disk and a stop are not, and a kill raises nothing.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from asyncrl_runtime.trainer.update.packing import Announced, MicroBatch


class StepFailed(Exception):
    """A step raised an exception that is its own fault.

    Args:
        cause: the exception in one line.
        tickets: the tickets of the micro-batch that raised it; empty if that is not known.
        is_out_of_memory: whether smaller micro-batches may help.
    """

    def __init__(self, cause: str, tickets: tuple[int, ...] = (), *, is_out_of_memory: bool = False) -> None:
        super().__init__(cause)
        self.cause = cause
        self.tickets = tickets
        self.is_out_of_memory = is_out_of_memory


class StepStopped(Exception):
    """The step was stopped between two micro-batches, on all ranks at the same one.

    Args:
        num_updates: how many minibatches had been applied. With none the weights are still the step's first.
    """

    def __init__(self, num_updates: int) -> None:
        super().__init__(f"stopped within a step, after {num_updates} updates of it")
        self.num_updates = num_updates


def is_lost_peer(error: Exception) -> bool:
    """Return whether a collective raised this because a rank is lost; gloo has no exception type for that."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "/gloo/transport/" in str(error)
    )


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out, on a GPU or a CPU, where torch has no exception type for it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


class FailureNote:
    """A rank's word to rank 0 on why it ends, left in the store in which the ranks met.

    Without it rank 0 would only see that a peer is lost; with NCCL it would not even see that.
    """

    _KEY = "step-failure"

    def __init__(self, store: Store) -> None:
        self._store = store

    def leave(self, failure: StepFailed) -> None:
        """Leave word; rank 0 may be gone as well, and then nobody needs it."""
        values = [failure.cause, failure.tickets, failure.is_out_of_memory]
        with contextlib.suppress(RuntimeError):
            self._store.set(self._KEY, json.dumps(values))

    def find(self) -> StepFailed | None:
        """Return the failure of another rank; None if none has left word."""
        if not self._store.check([self._KEY]):
            return None
        cause, tickets, is_out_of_memory = json.loads(self._store.get(self._KEY))
        return StepFailed(cause, tuple(tickets), is_out_of_memory=is_out_of_memory)


class MicroBatchWatch:
    """Knows the tickets of the micro-batch that is being worked on."""

    def __init__(self) -> None:
        self._tickets: tuple[int, ...] = ()

    def over(self, batches: Sequence[MicroBatch], tickets: Sequence[Sequence[int]]) -> Sequence[MicroBatch]:
        """Return `batches` such that whoever iterates over them is watched.

        Args:
            tickets: the tickets of each.
        """
        # What comes after them, the optimizer say, is about all of them.
        return Announced(batches, lambda place: self.now_at(tickets[place]), lambda: self.now_at(()))

    def now_at(self, tickets: Sequence[int]) -> None:
        self._tickets = tuple(sorted(set(tickets)))

    @contextlib.contextmanager
    def naming_failures(self) -> Iterator[None]:
        """Turn what the body raises by its own fault into StepFailed."""
        try:
            yield
        except Exception as error:
            if isinstance(error, OSError | StepFailed | StepStopped) or is_lost_peer(error):
                raise
            # A GPU reports what a kernel met only later, perhaps in the next micro-batch.
            is_late = "CUDA error" in str(error)
            cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
            tickets = () if is_late else self._tickets
            raise StepFailed(cause[:500], tickets, is_out_of_memory=is_out_of_memory(error)) from error
