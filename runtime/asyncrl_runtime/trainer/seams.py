"""What an attempt is made of, and what it asks of streams, ranks and examiner, whoever stands behind them."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from asyncrl_api.ledger import StepFailure
from asyncrl_api.spec_views import FrozenSpec
from asyncrl_runtime.contract.broker import StreamMessage
from asyncrl_runtime.contract.messages import PolicyVersion
from asyncrl_runtime.history.ledger_writer import Ledger
from asyncrl_runtime.trainer.books.books import Books
from asyncrl_runtime.trainer.books.checkpoints import Checkpoints
from asyncrl_runtime.trainer.evaluation import Evaluated
from asyncrl_runtime.trainer.job_streams import LostStreams
from asyncrl_runtime.trainer.loop_watch import LoopWatch
from asyncrl_runtime.trainer.metrics import Metrics
from asyncrl_runtime.trainer.update.ranks import Command
from asyncrl_runtime.weights.engines import Publisher
from asyncrl_runtime.weights.fleet import Fleet


class Streams(Protocol):
    """The job's streams; JobStreams says what each call does."""

    @property
    def identity(self) -> str: ...
    @property
    def lost(self) -> LostStreams: ...
    @property
    def is_nearly_full(self) -> bool: ...

    def requeue(self) -> None: ...
    def start_over(self) -> None: ...
    async def mend(self, give_up_recorded: Callable[[], Awaitable[None]]) -> None: ...
    async def has_read_everything(self) -> bool: ...
    def stored(self, after: int, last: int) -> AsyncGenerator[StreamMessage, None]: ...
    async def purge_behind(self, sequence: int) -> None: ...
    async def announce(self, version: PolicyVersion) -> None: ...


class TrainerRanks(Protocol):
    """All ranks of the trainer; Ranks says what each call does."""

    must_stop: Callable[[], bool]

    async def run(self, command: Command) -> Any: ...
    async def keep_awake(self) -> None: ...


class Examiner(Protocol):
    """The part that has held-out prompts answered; Evaluator says what each call does."""

    async def run(
        self, step: int, max_new_tokens: int, tick: Callable[[], Awaitable[None]]
    ) -> Evaluated | None: ...


def _none_announced() -> str:
    return ""


@dataclass(frozen=True)
class AttemptParts:
    """What an Attempt is made of."""

    attempt: int
    uid: str
    spec: FrozenSpec
    """The spec as the attempt began; the fields marked L are in the books."""
    folder: Path
    books: Books
    streams: Streams
    ledger: Ledger
    ranks: TrainerRanks
    fleet: Fleet
    weights: Publisher
    """Publishes what the ranks have copied last."""
    checkpoints: Checkpoints
    examiner: Examiner | None
    """None if nothing is held out."""
    metrics: Metrics
    clock: Callable[[], float] = time.monotonic
    failures: tuple[StepFailure, ...] = ()
    """The failures of recorded steps that earlier attempts have met."""
    in_thread: Callable[..., Awaitable[Any]] = asyncio.to_thread
    """Calls a function that may wait for a disk, apart from the event loop."""
    loop_watch: LoopWatch = field(default_factory=LoopWatch)
    disruption: Callable[[], str] = _none_announced
    """Returns what is about to end this trainer's pod; empty if nothing is announced."""
