"""What the worker and the weight updates ask of an engine, and the answers that they get.

To add an engine, write one class that has the methods of `Engine` (`EngineClient` is the one for SGLang's
HTTP, which our CPU engine speaks too), choose it in `assemble.py`, and run `tests/contract/` against a server
of it: the tests there say in HTTP what is relied on beyond the signatures here.

Each control call ends within its deadline; a request for tokens takes as long as it takes, or until the
worker gives the engine up. An engine that was restarted knows nothing of what the process before it was told.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from asyncrl_runtime.contract.messages import BucketLayout, JoinGroup, PolicyVersion, VersionSpan

PROBE_SECONDS = 5.0
"""The deadline of calls that an engine answers at once, paused or not."""
CONTROL_SECONDS = 10.0
"""The deadline of a control call that moves no data: an engine answers between two decoding steps."""
CHECKSUM_SECONDS = 60.0
"""The deadline of the checksum over all weights."""


@dataclass(frozen=True)
class IncomingBucket:
    """A bucket that rank 0 is about to broadcast."""

    group: str
    version: PolicyVersion
    layout: BucketLayout
    is_last: bool
    """Whether the update is whole with it."""
    timeout_seconds: float


class EngineLost(Exception):
    """The engine died, hangs, or was told to stop; nothing is wrong with the request. Try elsewhere."""

    is_reported = False
    """Whether this counts against the ticket's retry budget; a kill does not."""


class EngineFailed(EngineLost):
    """The engine is alive and answered with an error of its own (5xx)."""

    is_reported = True


class EngineTimeout(EngineLost):
    """The engine did not answer a control call in time, so it hangs."""


class EngineAbsent(EngineLost):
    """Nobody listens at the engine's address: it is dead, or has yet to start."""


class EngineRefused(Exception):
    """The engine answered that this request can never work, or that its state forbids it."""


@dataclass(frozen=True)
class SamplingRequest:
    """One sequence that must be continued."""

    input_ids: Sequence[int]
    max_new_tokens: int
    temperature: float
    """The divisor of the logits; 0 is greedy."""
    seed: int
    """The seed of this turn; the engine derives a token's noise from it and the token's absolute position."""


@dataclass(frozen=True)
class Generation:
    """What an engine sampled, and the versions that it attests."""

    output_ids: list[int]
    logprobs: list[float]
    spans: tuple[VersionSpan, ...]
    finish_reason: str
    """`stop`, `length`, or `abort` if it was broken off by request."""

    def followed_by(self, more: "Generation") -> "Generation":
        """Return this generation and its continuation as one."""
        shift = len(self.output_ids)
        later = (VersionSpan(s.attempt, s.version, s.end + shift) for s in more.spans)
        return Generation(
            [*self.output_ids, *more.output_ids],
            [*self.logprobs, *more.logprobs],
            merge_spans([*self.spans, *later]),
            more.finish_reason,
        )


def merge_spans(spans: Sequence[VersionSpan]) -> tuple[VersionSpan, ...]:
    """Join neighboring spans of one version and drop empty ones."""
    merged: list[VersionSpan] = []
    for span in spans:
        if span.end <= (merged[-1].end if merged else 0):
            continue
        if merged and merged[-1].policy_version == span.policy_version:
            merged.pop()
        merged.append(span)
    return tuple(merged)


class BrokenStream(EngineLost):
    """The engine went away in mid-answer; `earned` is what can be kept of it, with finish reason `abort`."""

    def __init__(self, cause: EngineLost, earned: Generation) -> None:
        super().__init__(str(cause))
        self.is_reported = cause.is_reported
        self.earned = earned


@dataclass
class WeightsSeen:
    """What the worker itself has seen of its engine's weights; whoever drives the updates maintains it."""

    version: PolicyVersion | None = None
    num_updates_begun: int = 0
    num_updates_completed: int = 0


@dataclass(frozen=True)
class EngineLoad:
    """What an engine reports about itself at one moment."""

    kv_usage: float
    """The share of its KV cache that is in use, 0 to 1."""
    num_queued: int
    num_retracted: int
    """The running requests that were thrown out of a full cache since the engine started."""
    num_generated_tokens: int
    """The tokens of requests that have ended since the engine started."""
    num_used_tokens: int = 0
    """The tokens of running requests in the cache, which grow with each token sampled."""


class SamplingEngine(Protocol):
    """The part of an engine that is used by those who only sample."""

    async def generate(
        self, requests: Sequence[SamplingRequest], *, cache_salt: str | None = None
    ) -> list[Generation]:
        """Sample continuations of several sequences at once, and answer when all have ended, in order.

        Args:
            cache_salt: keeps the KV cache of requests with another salt from being used.

        Raises:
            EngineLost: no complete answer came.
            EngineRefused: a request can never work; the message is the engine's.
        """
        ...

    async def stream(self, request: SamplingRequest, *, cache_salt: str | None = None) -> Generation:
        """Sample one continuation, receiving it in pieces, so that little is lost with the engine.

        Raises:
            BrokenStream: the engine went away in mid-answer.
            EngineLost: the engine failed, or attests weights that are not this job's; nothing is kept.
            EngineRefused: the request can never work.
        """
        ...


class Engine(SamplingEngine, Protocol):
    """One engine, as its worker uses it.

    Unless stated otherwise, a call raises EngineLost if no answer came or the engine failed (EngineTimeout
    after its deadline, EngineAbsent if nobody listens), and EngineRefused if the engine says no.
    """

    weights: WeightsSeen

    @property
    def name(self) -> str:
        """The engine's name in the log, such as its address."""
        ...

    @property
    def num_requests(self) -> int:
        """The number of requests for tokens that are not answered yet."""
        ...

    @property
    def is_in_doubt(self) -> bool:
        """Whether a request has failed and `label` has not been answered since: the engine may be gone."""
        ...

    async def close(self) -> None:
        """Release what belongs to the engine, when the worker ends."""
        ...

    def give_up(self) -> None:
        """End every request in flight with EngineLost: the engine is hung or gone."""
        ...

    async def abort_all(self) -> None:
        """Break off every request; each is answered with what it has, with finish reason `abort`."""
        ...

    # -- health

    async def label(self) -> str:
        """Return the version that the engine itself reports; it is answered in a pause too."""
        ...

    async def num_ranks(self) -> int:
        """Return the number of the engine's members in a weight group: its tensor-parallel size."""
        ...

    async def load(self) -> EngineLoad:
        """Return how busy the engine is."""
        ...

    async def take_over(self) -> None:
        """Begin with an engine process that this worker does not know: end what was asked of it before.

        That means requests in flight, and an open update. An engine that was paused stays paused.
        """
        ...

    # -- updates of all weights, in this order: a group is joined; then, in each update, the engine is paused,
    # the update is begun, buckets are received, the update is ended, and sampling is resumed

    async def join_group(self, request: JoinGroup) -> None:
        """Join the weight group as member `rank` (and those after it), within the request's deadline."""
        ...

    async def leave_group(self, group: str) -> None:
        """Leave the weight group, whatever has become of the other members."""
        ...

    async def pause(self, interrupt: str) -> None:
        """Stop sampling between two tokens.

        Args:
            interrupt: `spec.rollout.interrupt`. With InPlace, running requests keep their KV cache; otherwise
                it is computed anew, or they are broken off by an engine that cannot do that.
        """
        ...

    async def begin_update(self) -> None:
        """Get ready to receive buckets."""
        ...

    async def receive_bucket(self, bucket: IncomingBucket, *, keeps_cache: bool) -> None:
        """Receive a bucket from rank 0 of the group, within its deadline.

        With the last bucket the engine takes the update's version as its label, and flushes its cache unless
        `keeps_cache` is set.
        """
        ...

    async def end_update(self) -> None:
        """Put the weights into force, or those that have come if the update is given up."""
        ...

    async def checksum(self) -> str:
        """Return a digest of all weights; engines with equal weights have equal digests."""
        ...

    async def resume(self) -> None:
        """Go on sampling."""
        ...

    async def load_folder(
        self, folder: Path, version: PolicyVersion, timeout_seconds: float, *, keeps_cache: bool
    ) -> None:
        """Load all weights from a folder that the engine sees, in a pause, without a group and an update.

        The engine takes `version` as its label, and flushes its cache unless `keeps_cache` is set.
        """
        ...

    # -- adapters, for an engine that samples with them

    async def load_adapter(self, version: PolicyVersion, folder: Path, timeout_seconds: float) -> None:
        """Load an adapter in PEFT's format from a folder that the engine sees; its name is its version."""
        ...

    async def unload_adapter(self, version: PolicyVersion) -> None:
        """Drop an adapter."""
        ...

    async def set_label(self, version: PolicyVersion, *, aborts: bool) -> None:
        """Make the engine report `version`; with `aborts`, break off every request."""
        ...
