"""What the worker and the weight updates ask of an engine, and what they are answered.

Who adds an engine writes one class that has what `Engine` says (`EngineClient` is the one for SGLang's HTTP,
which our CPU engine speaks too), chooses it in `assemble.py`, and runs `tests/contract/` against a server of
it: the tests there say in HTTP what is relied on beyond the signatures here.

Each control call ends within its deadline; a request for tokens takes as long as it takes, or until the
worker gives the engine up. An engine that was restarted knows nothing of what the process before it was told.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from asyncrl_runtime.contract.messages import JoinGroup, PolicyVersion, ReceiveBucket, VersionSpan

PROBE_SECONDS = 5.0
"""Deadline of what an engine answers at once, paused or not."""
CONTROL_SECONDS = 10.0
"""Deadline of a control call that moves no data: an engine answers between two decoding steps."""
CHECKSUM_SECONDS = 60.0
"""Deadline of the checksum over all weights."""


class EngineLost(Exception):
    """The engine died, hangs, or was told to stop: nothing wrong with the request. Try elsewhere."""

    is_reported = False
    """Whether this uses up the ticket's retry budget: a kill does not."""


class EngineFailed(EngineLost):
    """The engine lives and answered with an error of its own (5xx)."""

    is_reported = True


class EngineTimeout(EngineLost):
    """The engine did not answer a control call in time: it hangs."""


class EngineAbsent(EngineLost):
    """Nobody listens there: the engine is dead, or has yet to start."""


class EngineRefused(Exception):
    """The engine answered that this request can never work, or that the state it is in forbids it."""


@dataclass(frozen=True)
class SamplingRequest:
    """One sequence to be continued."""

    input_ids: Sequence[int]
    max_new_tokens: int
    temperature: float
    """0 is greedy."""
    seed: int
    """Of this turn; the engine derives the noise of a token from it and the token's absolute position."""


@dataclass(frozen=True)
class Generation:
    """What an engine sampled, and what it attests of it."""

    output_ids: list[int]
    logprobs: list[float]
    spans: tuple[VersionSpan, ...]
    finish_reason: str
    """`stop`, `length`, or `abort` for one that was broken off by request."""

    def followed_by(self, more: "Generation") -> "Generation":
        """Return both as one."""
        shift = len(self.output_ids)
        later = (VersionSpan(s.attempt, s.version, s.end + shift) for s in more.spans)
        return Generation(
            [*self.output_ids, *more.output_ids],
            [*self.logprobs, *more.logprobs],
            merge_spans([*self.spans, *later]),
            more.finish_reason,
        )


def merge_spans(spans: Sequence[VersionSpan]) -> tuple[VersionSpan, ...]:
    """Join neighbors of one version and drop empty spans."""
    merged: list[VersionSpan] = []
    for span in spans:
        if span.end <= (merged[-1].end if merged else 0):
            continue
        if merged and merged[-1].policy_version == span.policy_version:
            merged.pop()
        merged.append(span)
    return tuple(merged)


class BrokenStream(EngineLost):
    """The engine went away in mid answer; `earned` is what can be kept of it, finish reason `abort`."""

    def __init__(self, cause: EngineLost, earned: Generation) -> None:
        super().__init__(str(cause))
        self.is_reported = cause.is_reported
        self.earned = earned


@dataclass
class WeightsSeen:
    """What the worker itself saw of its engine's weights; whoever drives the updates keeps it."""

    version: PolicyVersion | None = None
    num_updates_begun: int = 0
    num_updates_completed: int = 0


@dataclass(frozen=True)
class EngineLoad:
    """What an engine says of itself at one moment."""

    kv_usage: float
    """Share of its KV cache in use, 0 to 1."""
    num_queued: int
    num_retracted: int
    """Since it started: running requests thrown out of the cache because it was full."""
    num_generated_tokens: int
    """Since it started, of requests that have ended."""
    num_used_tokens: int = 0
    """In the cache, of requests that run: grows with each token."""


class SamplingEngine(Protocol):
    """What is asked by those who only sample."""

    async def generate(
        self, requests: Sequence[SamplingRequest], *, cache_salt: str | None = None
    ) -> list[Generation]:
        """Sample continuations of several sequences at once, and answer when all have ended, in order.

        Args:
            cache_salt: keeps KV of requests with another salt from being used.

        Raises:
            EngineLost: no complete answer came.
            EngineRefused: a request can never work; the message is the engine's.
        """
        ...

    async def stream(self, request: SamplingRequest, *, cache_salt: str | None = None) -> Generation:
        """Sample one continuation, receiving it in pieces, so that little is lost with the engine.

        Raises:
            BrokenStream: the engine went away in mid answer.
            EngineLost: the engine failed at it, or attests weights that are not this job's: nothing is kept.
            EngineRefused: the request can never work.
        """
        ...


class Engine(SamplingEngine, Protocol):
    """One engine, as its worker has it.

    Where nothing else is said, a call raises EngineLost where no answer came or the engine failed
    (EngineTimeout after its deadline, EngineAbsent where nobody listens), and EngineRefused where the engine
    says no.
    """

    weights: WeightsSeen

    @property
    def name(self) -> str:
        """What the log calls it: its address, say."""
        ...

    @property
    def num_requests(self) -> int:
        """Requests in flight: asked for tokens and not answered yet."""
        ...

    @property
    def is_in_doubt(self) -> bool:
        """Whether a request has failed, and `label` was not answered since: the engine may be gone."""
        ...

    async def close(self) -> None:
        """Let go of it, at the worker's end."""
        ...

    def give_up(self) -> None:
        """End every request in flight with EngineLost: the engine is hung or gone."""
        ...

    async def abort_all(self) -> None:
        """Break off every request: each is answered with what it has, finish reason `abort`."""
        ...

    # -- health

    async def label(self) -> str:
        """Return which version the engine itself says that it has; answered while paused too."""
        ...

    async def num_ranks(self) -> int:
        """Return how many members the engine is in a weight group: its tensor-parallel size."""
        ...

    async def load(self) -> EngineLoad:
        """Return how busy it is."""
        ...

    async def take_over(self) -> None:
        """Begin with an engine process that this worker does not know: end what was asked of it before.

        That is requests in flight, and an update that was open. It stays paused if it was.
        """
        ...

    # -- updates of all weights, in this order: a group is joined, then for each update the engine is paused,
    # the update begun, buckets received, the update ended, and sampling resumed

    async def join_group(self, request: JoinGroup) -> None:
        """Become members `rank` and following of the weight group, within the request's deadline."""
        ...

    async def leave_group(self, group: str) -> None:
        """Leave the weight group, whatever became of the other members."""
        ...

    async def pause(self, interrupt: str) -> None:
        """Stop sampling between two tokens.

        Args:
            interrupt: `spec.rollout.interrupt`. With InPlace running requests keep their KV cache; otherwise
                they are computed anew, or broken off by an engine that cannot do that.
        """
        ...

    async def begin_update(self) -> None:
        """Be ready for buckets."""
        ...

    async def receive_bucket(self, request: ReceiveBucket, *, keeps_cache: bool) -> None:
        """Receive a bucket from rank 0 of the group, within the request's deadline.

        With the last one the engine has the update's version for its label, and its cache is flushed unless
        `keeps_cache`.
        """
        ...

    async def end_update(self) -> None:
        """Put the weights into force, or what has come of them if the update is given up."""
        ...

    async def checksum(self) -> str:
        """Return a digest of all weights, the same for engines that hold the same."""
        ...

    async def resume(self) -> None:
        """Go on sampling."""
        ...

    # -- adapters, of an engine that samples with them

    async def load_adapter(self, version: PolicyVersion, folder: Path, timeout_seconds: float) -> None:
        """Load an adapter in PEFT's form from a folder that the engine sees, and name it by its version."""
        ...

    async def unload_adapter(self, version: PolicyVersion) -> None:
        """Drop an adapter."""
        ...

    async def set_label(self, version: PolicyVersion, *, aborts: bool) -> None:
        """Have the engine say that it has `version`; with `aborts` break off every request."""
        ...
