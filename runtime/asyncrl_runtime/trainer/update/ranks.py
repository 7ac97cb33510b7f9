"""Rank 0 decides, and all ranks act: collectives stay collective because every rank runs the same commands.

Rank 0 runs its event loop (tickets, lease, weights) in the main thread and commands in one other thread, so
that a backward pass never holds up a heartbeat. The other ranks only run the loop of `follow`. What reads or
writes files for long is done beside an exchange of all ranks (`together.py`), and has no time limit.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from asyncrl_runtime.trainer.turn_clock import Measure, TurnClock, folder_bytes
from asyncrl_runtime.trainer.update.failures import (
    FailureNote,
    MicroBatchWatch,
    StepFailed,
    StepStopped,
    is_lost_peer,
)
from asyncrl_runtime.trainer.update.packing import TrainingSample, pack
from asyncrl_runtime.trainer.update.policy_api import TrainedPolicy
from asyncrl_runtime.trainer.update.shares import (
    ShareOutline,
    StepShare,
    outline,
    receive_share,
    send_share,
)
from asyncrl_runtime.trainer.update.step import StepOutcome, StepPlan, train_step
from asyncrl_runtime.trainer.update.together import DiskWork, WorkFailed, work_together
from asyncrl_runtime.weights.copies import RankCopy

log = logging.getLogger(__name__)

T = TypeVar("T")

COMMAND_SECONDS = 600.0
"""The longest time that a rank waits for the others within a command, and for the next command."""
NOTE_SECONDS = 1.0
"""How often rank 0 looks, within a step, whether another rank has failed: its launcher then gives it 5 s."""
PING_SECONDS = 60.0
"""The time between two pings of a rank 0 that waits for a batch; without them it would be taken for dead."""


@dataclass(frozen=True, eq=False)
class Train:
    """Train a step; rank 0 has all of it, and sends each rank its share."""

    plan: StepPlan


@dataclass(frozen=True)
class TrainShare:
    """Train what rank 0 sends next: this is what the other ranks hear of `Train`."""

    outline: ShareOutline


@dataclass(frozen=True)
class Save:
    folder: Path


@dataclass(frozen=True)
class Load:
    folder: Path
    scratch: Path


@dataclass(frozen=True)
class Export:
    folder: Path


@dataclass(frozen=True)
class Logprobs:
    """Compute the log-probs of samples under the present weights; every rank computes all of them."""

    samples: tuple[TrainingSample, ...]


@dataclass(frozen=True)
class CopyWeights:
    """Copy what is published: every rank copies its share."""


@dataclass(frozen=True)
class Ping:
    pass


@dataclass(frozen=True)
class Stop:
    pass


class PeerLost(Exception):
    """Another rank has died or hangs; this one cannot go on without it."""


Command = Train | TrainShare | Save | Load | Export | Logprobs | CopyWeights | Ping | Stop


class Ranks:
    """All ranks of the trainer, as rank 0 sees them.

    Args:
        commands_group: the group over which commands travel; it is gloo, whatever the policy's backend is.
        tokenizer: the tokenizer that exports contain.
        copy: this rank's part of the copy that is published.
        clock: is told of every command; while one is carried out it is the trainer's turn.
    """

    def __init__(
        self,
        policy: TrainedPolicy,
        commands_group: dist.ProcessGroup,
        tokenizer: Any,
        copy: RankCopy,
        clock: TurnClock,
    ) -> None:
        self.policy = policy
        self._copy = copy
        self._clock = clock
        self._commands_group = commands_group
        self._tokenizer = tokenizer
        self._failure_note = FailureNote(dist.distributed_c10d._get_default_store())
        self._rank = dist.get_rank()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="copy")
        self._idle = asyncio.Event()
        self.must_stop: Callable[[], bool] = lambda: False
        """Rank 0's answer, before each micro-batch, to whether the step that is under way must not go on."""

    async def run(self, command: Command) -> Any:
        """Let every rank carry out `command`; return rank 0's result, or raise what it raised."""
        loop = asyncio.get_running_loop()
        if isinstance(command, CopyWeights):
            await self.read_copy(_nothing)  # what was given up may still be reading it
        if isinstance(command, Stop):
            await self.read_copy(self._copy.close)
        self._idle.set()
        with self._clock.turn(_written_by(command)):
            work = loop.run_in_executor(self._thread, self._run_everywhere, command)
            if isinstance(command, Train) and dist.get_world_size() > 1:
                return await self._unless_another_failed(work)
            return await work

    async def _unless_another_failed(self, work: asyncio.Future[Any]) -> Any:
        """Return the result of a step, or raise what another rank has failed with.

        Raises:
            StepFailed: another rank left word; its launcher soon ends this one too.
        """
        while True:
            done, _ = await asyncio.wait({work}, timeout=NOTE_SECONDS)
            is_lost = bool(done) and isinstance(work.exception(), PeerLost)
            if (is_lost or not done) and (failure := await asyncio.to_thread(self._failure_note.find)):
                raise failure
            if done:
                return work.result()

    async def read_copy(self, read: Callable[..., T], *arguments: Any) -> T:
        """Run a function that reads the copy, beside commands, and after whatever read it before.

        Raises:
            PeerLost: a rank whose share it needs is gone.
        """

        def named() -> T:
            with _naming_lost_peers():
                return read(*arguments)

        return await asyncio.get_running_loop().run_in_executor(self._reader, named)

    async def keep_awake(self) -> None:
        """Ping the other ranks while there is nothing to do, until cancelled."""
        while dist.get_world_size() > 1:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), PING_SECONDS)
                continue
            await self.run(Ping())

    @contextlib.asynccontextmanager
    async def awake(self) -> AsyncIterator[None]:
        """Ping during the body. If a rank is lost meanwhile, the next command says so."""
        pinging = asyncio.create_task(self.keep_awake(), name="ranks")
        try:
            yield
        finally:
            pinging.cancel()
            await asyncio.wait([pinging])

    def follow(self) -> None:
        """Carry out rank 0's commands until it says stop; the other ranks call this.

        Raises:
            PeerLost: rank 0 is gone, or has sent nothing for COMMAND_SECONDS.
        """
        serving = threading.Thread(target=self._serve_copy, name="copy", daemon=True)
        serving.start()
        while True:
            box: list[Command | None] = [None]
            with _naming_lost_peers():
                dist.broadcast_object_list(box, src=0, group=self._commands_group)
                if isinstance(box[0], Stop):
                    serving.join(COMMAND_SECONDS)
                    return
                assert box[0] is not None
                try:
                    self._execute(box[0])
                except (WorkFailed, StepStopped) as error:  # all ranks raise it; rank 0 decides what then
                    log.warning("%s: %s", type(box[0]).__name__, error)

    def _serve_copy(self) -> None:
        try:
            self._copy.serve()
        except RuntimeError as error:  # the next command says it as well
            log.warning("rank 0 takes no more shares of the weights: %s", str(error).splitlines()[0])

    def _run_everywhere(self, command: Command) -> Any:
        with _naming_lost_peers():
            if isinstance(command, Train):
                return self._train_everywhere(command.plan)
            self._tell(command)
            return self._execute(command)

    def _tell(self, command: Command) -> None:
        if dist.get_world_size() > 1:
            dist.broadcast_object_list([command], src=0, group=self._commands_group)

    def _train_everywhere(self, plan: StepPlan) -> StepOutcome:
        with MicroBatchWatch().naming_failures():
            own, *others = shares = plan.shares(dist.get_world_size())
        self._tell(TrainShare(outline(shares)))
        for rank, share in enumerate(others, start=1):
            send_share(share, rank, self._commands_group)
        return self._train(own)

    def _execute(self, command: Command) -> Any:
        match command:
            case TrainShare(told):
                self._train(receive_share(told, self._rank, self._commands_group))
            case Save(folder):
                self._write(self.policy.save(folder), folder_bytes(folder))
            case Load(folder, scratch):
                self._write(self.policy.convert(folder, scratch))
                self._write(lambda _: self.policy.load(folder, scratch))
            case Export(folder):
                self._write(self.policy.export(folder, self._tokenizer), folder_bytes(folder))
            case CopyWeights():
                self._copy.take()
            case Logprobs(samples):
                return [self.policy.logprobs([pack([sample])])[0] for sample in samples]
        return None

    def _train(self, share: StepShare) -> StepOutcome:
        try:
            return train_step(self.policy, share, made=self._clock.moved, go_on=self._go_on)
        except StepFailed as failure:
            if self._rank != 0:
                log.error("this rank cannot train the step", exc_info=failure.__cause__)
                self._failure_note.leave(failure)
            raise

    def _write(self, work: DiskWork, measure: Measure = lambda: 0) -> None:
        work_together(work, self._commands_group, self._clock.moved, measure)

    def _go_on(self, num_updates: int) -> None:
        """Agree with the other ranks whether the step goes on; collective, before each micro-batch.

        It costs one small broadcast between CPUs: a few tenths of a millisecond on one machine.

        Raises:
            StepStopped: it does not, on any rank.
        """
        must_stop = self._rank == 0 and self.must_stop()
        if dist.get_world_size() > 1:
            vote = torch.tensor([int(must_stop)])
            dist.broadcast(vote, src=0, group=self._commands_group)
            must_stop = bool(vote.item())
        if must_stop:
            raise StepStopped(num_updates)


def _written_by(command: Command) -> Measure | None:
    """Return a measure of the progress of a command that may write for long, since a disk may be slow."""
    return folder_bytes(command.folder) if isinstance(command, Save | Export) else None


def make_commands_group() -> dist.ProcessGroup:
    """Make the group for commands; collective, and called once by every rank."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=COMMAND_SECONDS))
    assert isinstance(group, dist.ProcessGroup)
    return group


def _nothing() -> None:
    pass


@contextlib.contextmanager
def _naming_lost_peers() -> Iterator[None]:
    """Turn what collectives raise when a rank is lost into PeerLost."""
    try:
        yield
    except RuntimeError as error:
        if is_lost_peer(error):
            raise PeerLost(f"another rank is gone; its log says why: {str(error).splitlines()[0]}") from error
        raise
