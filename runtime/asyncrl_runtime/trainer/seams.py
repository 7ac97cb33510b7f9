"""What an attempt asks of its streams, ranks and evaluator, so that others may stand behind these names."""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from asyncrl_runtime.contract.messages import PolicyVersion
from asyncrl_runtime.trainer.evaluation import Evaluated
from asyncrl_runtime.trainer.job_streams import LostStreams
from asyncrl_runtime.trainer.update.ranks import Command


class Streams(Protocol):
    """The job's streams; JobStreams says what each call does."""

    @property
    def identity(self) -> str: ...
    @property
    def lost(self) -> LostStreams: ...
    @property
    def is_nearly_full(self) -> bool: ...

    def requeue(self) -> None: ...
    async def mend(self, give_up_recorded: Callable[[], None]) -> None: ...
    async def has_read_everything(self) -> bool: ...
    async def purge_behind(self, sequence: int) -> None: ...
    async def announce(self, version: PolicyVersion) -> None: ...


class TrainerRanks(Protocol):
    """All ranks of the trainer; Ranks says what the call does."""

    async def run(self, command: Command) -> Any: ...


class Examiner(Protocol):
    """Who has held-out prompts answered; Evaluator says what the call does."""

    async def run(
        self, step: int, max_new_tokens: int, tick: Callable[[], Awaitable[None]]
    ) -> Evaluated | None: ...
