"""Rewards in their own processes: one that hangs, crashes or forks costs a process, not the worker."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Self

import msgspec

from asyncrl_api.protocols import Score
from asyncrl_runtime.rollout.rewards import linux
from asyncrl_runtime.rollout.rewards.backend import RewardFailure
from asyncrl_runtime.rollout.rewards.frames import (
    Failed,
    Ready,
    Refused,
    Scored,
    ScoreRequest,
    Setup,
    pack,
    receive,
)
from asyncrl_runtime.rollout.rewards.reward_types import process_reward

MAX_START_SECONDS = 120.0
"""The time for loading a reward; reasoning-gym takes 8 s on an idle machine."""
MAX_STOP_SECONDS = 10.0
"""The time for killing what a reward has started."""

_greetings: msgspec.msgpack.Decoder[Ready | Refused] = msgspec.msgpack.Decoder(Ready | Refused)
_answers: msgspec.msgpack.Decoder[Scored | Failed] = msgspec.msgpack.Decoder(Scored | Failed)

logger = logging.getLogger(__name__)


class RewardNotLoaded(Exception):
    """The reward cannot be loaded at all: its name is wrong, for example, or its import fails."""


class RewardPool:
    """Scores with `num_processes` reward processes.

    A list of requests goes to one process, which scores them in turn; while all are busy, callers wait.
    """

    def __init__(self, setup: Setup, *, num_processes: int) -> None:
        self._processes = [RewardProcess(setup) for _ in range(num_processes)]
        self._idle: asyncio.Queue[RewardProcess] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        """Start all processes and wait until they have loaded the reward.

        Raises:
            RewardNotLoaded: a process could not load it.
        """
        try:
            async with asyncio.TaskGroup() as starting:
                starts = [starting.create_task(process.start()) for process in self._processes]
        except BaseException as error:
            await self._stop()
            raise (error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error) from None
        notes = {start.result() for start in starts} - {""}
        logger.info("%s", "; ".join([f"{len(starts)} reward processes are ready", *notes]))
        for process in self._processes:
            self._idle.put_nowait(process)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def attempt(self, requests: Sequence[ScoreRequest]) -> list[Score | RewardFailure]:
        """Score each response once, in order."""
        process = await self._idle.get()
        try:
            return await process.score(requests)
        finally:
            self._idle.put_nowait(process)

    async def _stop(self) -> None:
        await asyncio.gather(*(process.stop() for process in self._processes))


class RewardProcess:
    """One reward process, started anew whenever it has ended."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._max_seconds = setup.timeout_seconds + process_reward(setup.type).spare_seconds
        self._link: _Link | None = None
        self._end: asyncio.Task[int | None] | None = None
        """The end of the previous process: a task, which is awaited even if its caller is cancelled."""

    async def start(self) -> str:
        """Start the process, wait until it has loaded the reward, and return its note for the log.

        Raises:
            RewardNotLoaded: the process could not load it, and has ended.
        """
        self._link = link = await _Link.to_new_process(self._setup)
        try:
            async with asyncio.timeout(MAX_START_SECONDS):
                await link.send(self._setup)
                greeting = await receive(link.reader, _greetings)
        except TimeoutError:
            await self.stop()
            raise RewardNotLoaded(f"loading it took more than {MAX_START_SECONDS:g} s") from None
        except msgspec.DecodeError as error:
            await self.stop()
            raise RewardNotLoaded(f"something wrote to our socket while it loaded: {error}") from None
        except (EOFError, ConnectionError):
            status = await self.stop(patience_seconds=MAX_STOP_SECONDS)
            raise RewardNotLoaded(f"the process that was loading it {describe_end(status)}") from None
        except BaseException:
            await self.stop()
            raise
        if isinstance(greeting, Refused):
            await self.stop()
            raise RewardNotLoaded(greeting.message)
        if greeting.is_worker_exposed:
            linux.set_inspectable(False)
        return greeting.note

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Score | RewardFailure]:
        """Score each response once; one that kills the process costs only its own attempt."""
        outcomes: list[Score | RewardFailure] = []
        try:
            while rest := requests[len(outcomes) :]:
                if self._link is None or self._link.reader.at_eof():
                    await self.stop()
                    await self.start()
                await self._score_up_to_a_fault(rest, outcomes)
        except RewardNotLoaded as error:
            outcomes += [RewardFailure("reward_error", f"no process for it: {error}")] * len(rest)
        except BaseException:
            await self.stop()  # nobody waits for what the process is still working on
            raise
        return outcomes

    async def stop(self, patience_seconds: float = 0) -> int | None:
        """Wait until the process and everything that it has started have ended; return its exit status.

        Args:
            patience_seconds: the time that it has to end by itself.
        """
        if self._link is not None:
            self._end = asyncio.create_task(self._link.close(patience_seconds))
            self._link = None
        return await asyncio.shield(self._end) if self._end else None

    async def _score_up_to_a_fault(
        self, requests: Sequence[ScoreRequest], outcomes: list[Score | RewardFailure]
    ) -> None:
        """Add outcomes until all are there or the process had to be ended; the last outcome then says why."""
        link = self._link
        assert link is not None
        for number in range(len(requests)):
            try:
                async with asyncio.timeout(self._max_seconds):  # answers come in order, so this one has begun
                    if number == 0:
                        await link.send(requests)
                    answer = await receive(link.reader, _answers)
            except TimeoutError:
                await self.stop()
                outcomes.append(RewardFailure("reward_timeout", f"no answer in {self._max_seconds:g} s"))
                return
            except msgspec.DecodeError as error:
                await self.stop()
                outcomes.append(RewardFailure("reward_error", f"something wrote to our socket: {error}"))
                return
            except (EOFError, ConnectionError):
                status = await self.stop(patience_seconds=MAX_STOP_SECONDS)
                outcomes.append(RewardFailure("reward_error", f"the reward process {describe_end(status)}"))
                return
            if isinstance(answer, Scored):
                outcomes.append(Score(answer.reward, answer.feedback))
            else:
                outcomes.append(RewardFailure("reward_error", answer.message))


class _Link(NamedTuple):
    """A running process and our end of its socket pair."""

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def to_new_process(cls, setup: Setup) -> Self:
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            try:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-u", "-m", "asyncrl_runtime.rollout.rewards.process"),
                    *(str(theirs.fileno()), str(os.getpid())),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=2,  # what a reward prints goes to the worker's log
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                    env=process_reward(setup.type).environment(),
                )
            except BaseException:
                writer.close()
                raise
        return cls(process, reader, writer)

    async def send(self, message: object) -> None:
        self.writer.write(pack(message))
        await self.writer.drain()

    async def close(self, patience_seconds: float) -> int | None:
        """Hang up, end the process and all that it has started, and return its exit status, if any."""
        self.writer.close()
        try:
            async with asyncio.timeout(patience_seconds):
                return await self.process.wait()
        except TimeoutError:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()  # also if we are cancelled
        try:
            async with asyncio.timeout(MAX_STOP_SECONDS):
                return await self.process.wait()
        except TimeoutError:  # killed now, it would leave behind what it is still killing
            logger.error("reward process %d has yet to end what it has started", self.process.pid)
            return None


def describe_end(status: int | None) -> str:
    """Return in words how a process ended, given its exit status as a shell would report it."""
    if status is not None and 128 < status < 128 + signal.NSIG:
        return f"was killed by signal {status - 128} ({signal.strsignal(status - 128)})"
    return f"ended with status {status}"
