"""Everything that crosses a process boundary, as frozen structs that refuse to exist in a wrong state.

The wire format is msgpack by msgspec, array-like; each message is tagged with its name and a version. A
field is added with a default and never renamed or reused. Per-token arrays are raw little-endian bytes,
policy versions are spans, masks are bits: 8 bytes per token (no pickle, which would run code in the reader).
"""

import functools
import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Self, TypeVar, get_args, overload

import msgspec
import numpy as np
from numpy.typing import NDArray

from asyncrl_runtime.contract.numbers import is_usable


class Message(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """The base of all messages; subclasses carry a tag."""


class PolicyVersion(msgspec.Struct, frozen=True, array_like=True, order=True, gc=False):
    """Names the weights that sampled a token: the start of the trainer that published them, and the step.

    Engines carry it as the label `<attempt>.<version>`.
    """

    attempt: int
    version: int

    def __str__(self) -> str:
        return f"{self.attempt}.{self.version}"

    @classmethod
    def parse(cls, label: str) -> Self | None:
        """Return the version that an engine's label names; None for an engine's own label ("default")."""
        attempt, dot, version = label.partition(".")
        if not (dot and _is_number(attempt) and _is_number(version)):
            return None
        return cls(int(attempt), int(version))


def _is_number(text: str) -> bool:
    """Return whether a text is a number as an engine's label holds it, and not a foreign one without end."""
    return text.isascii() and text.isdigit() and len(text) <= 19


class VersionSpan(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The tokens from the end of the previous span to `end` (exclusive), all from one policy version."""

    attempt: int
    version: int
    end: int

    @property
    def policy_version(self) -> PolicyVersion:
        return PolicyVersion(self.attempt, self.version)


class Ticket(Message, frozen=True, kw_only=True, tag="ticket.v1"):
    """The right to sample one prompt group. Its number is the stream sequence of this message."""

    ticket: int
    row: dict[str, Any]
    group_size: int
    max_new_tokens: int
    temperature: float


class Sample(Message, frozen=True, kw_only=True, tag="sample.v1"):
    """One sampled response (all turns of it) and what the trainer needs to learn from it."""

    index: int
    """The sample's place in the group, 0 <= index < group_size."""
    prompt_ids: bytes
    """int32."""
    response_ids: bytes
    """int32; everything after the prompt, including what the environment told between turns."""
    behavior_logprobs: bytes
    """float32, natural log at `temperature` under the policy that sampled the token; 0 where none did."""
    response_mask: bytes
    """Bits, the first token in the lowest one; set where the policy sampled the token."""
    version_spans: tuple[VersionSpan, ...]
    """The policy versions that sampled the tokens, as the engine attested; the spans cover the response."""
    reward: float
    temperature: float
    finish_reason: str
    """The finish reason of the last turn: `stop` or `length`."""
    num_turns: int = 1
    max_new_tokens: int = 0
    """The bound on the tokens of each turn under which it was sampled; 0: an older worker does not say."""
    longest_turn: int = 0
    """The number of tokens of its longest turn; 0: an older worker does not say."""

    def __post_init__(self) -> None:
        covered = self.version_spans[-1].end if self.version_spans else 0
        sizes = len(self.response_ids), len(self.behavior_logprobs), len(self.response_mask)
        if sizes != (4 * covered, 4 * covered, (covered + 7) // 8):
            raise ValueError(
                f"sample {self.index}: versions for {covered} tokens, but {sizes[0]} bytes of response ids, "
                f"{sizes[1]} of log-probs and {sizes[2]} of mask; must be 4, 4 and 1/8 per token"
            )
        if covered == 0 or not self.prompt_ids or len(self.prompt_ids) % 4:
            raise ValueError(
                f"sample {self.index}: {len(self.prompt_ids)} bytes of prompt ids and {covered} response "
                "tokens; neither may be empty, and an id has 4 bytes"
            )
        if any(a.end >= b.end for a, b in pairwise(self.version_spans)) or self.version_spans[0].end <= 0:
            raise ValueError(f"sample {self.index}: version spans {self.version_spans} do not ascend")

    @property
    def num_tokens(self) -> int:
        return len(self.response_ids) // 4

    @property
    def num_sampled(self) -> int:
        """The number of tokens that the policy sampled: of set bits, without an array."""
        bits = int.from_bytes(self.response_mask, "little")
        return (bits & ((1 << self.num_tokens) - 1)).bit_count()

    def mask(self) -> NDArray[np.bool_]:
        """[num_tokens] bool, True where the policy sampled the token."""
        bits = np.frombuffer(self.response_mask, dtype=np.uint8)
        return np.unpackbits(bits, count=self.num_tokens, bitorder="little").astype(np.bool_)


def unusable_number(sample: Sample) -> str:
    """Return which number of a sample cannot be trained on, in words; empty if there is none.

    Not part of the message's own checks: one such sample would take a whole group, resume point or
    evaluation with it.
    """
    logprobs = floats_from_bytes(sample.behavior_logprobs)
    if not np.isfinite(logprobs).all():
        place = int(np.argmin(np.isfinite(logprobs)))
        return f"token {place} of sample {sample.index} has log-prob {logprobs[place]}"
    for name, value in (("reward", sample.reward), ("temperature", sample.temperature)):
        if not is_usable(value):
            return f"sample {sample.index} has {name} {value}"
    for span in sample.version_spans:
        if not (0 <= span.version < 2**31 and 0 <= span.attempt < 2**31):
            return f"sample {sample.index} was sampled at version {span.policy_version}"
    return ""


class SampleFailure(Message, frozen=True, kw_only=True, tag="failure.v1"):
    """A sample that left its group because its generation or reward failed as often as is allowed."""

    index: int
    reason: str
    """The cause in one word, for counting: `reward_timeout`, `reward_error`, `workflow_error`."""
    message: str = ""


class Group(Message, frozen=True, kw_only=True, tag="group.v1"):
    """The outcome of a ticket: its samples, in the order of their index, and those that failed."""

    ticket: int
    group_size: int
    samples: tuple[Sample, ...]
    failures: tuple[SampleFailure, ...] = ()
    worker: str = ""
    seconds: float = 0.0
    """The time from taking the ticket to publishing."""

    def __post_init__(self) -> None:
        indices = sorted([s.index for s in self.samples] + [f.index for f in self.failures])
        if not indices or len(indices) != self.group_size or indices != list(range(len(indices))):
            raise ValueError(f"ticket {self.ticket}: samples {indices} of a group of {self.group_size}")


class GroupPart(Message, frozen=True, kw_only=True, tag="grouppart.v1"):
    """One sample of a group that is too large for one message; `group_size` parts make it complete."""

    ticket: int
    group_size: int
    outcome: Sample | SampleFailure
    worker: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.outcome.index < self.group_size:
            raise ValueError(
                f"ticket {self.ticket}: part {self.outcome.index} of a group of {self.group_size}"
            )


class Tombstone(Message, frozen=True, kw_only=True, tag="tombstone.v1"):
    """A ticket that was given up after its retry budget; counted as discarded."""

    ticket: int
    reason: str
    """The cause in one word, for counting: `prompt_too_long`, `generation_error`."""
    message: str = ""
    worker: str = ""


class TurnRecord(Message, frozen=True, kw_only=True, tag="turn.v1"):
    """A turn, finished or broken off, that another worker can hand out again instead of sampling it."""

    input_ids: bytes
    """int32; everything before this turn. The record is used only if this agrees."""
    output_ids: bytes
    logprobs: bytes
    version_spans: tuple[VersionSpan, ...]
    finish_reason: str
    """`stop`, `length`, or "" if the turn was broken off."""

    def __post_init__(self) -> None:
        ends = [0, *(span.end for span in self.version_spans)]
        sizes = len(self.output_ids), len(self.logprobs)
        if len(self.input_ids) % 4 or sizes != (4 * ends[-1], 4 * ends[-1]):
            raise ValueError(
                f"turn: versions for {ends[-1]} tokens, but {sizes[0]} bytes of ids and {sizes[1]} of "
                f"log-probs, after {len(self.input_ids)} bytes of ids; must be 4 per token"
            )
        if any(a >= b for a, b in pairwise(ends)):
            raise ValueError(f"turn: version spans {self.version_spans} do not ascend")


class SampleProgress(Message, frozen=True, kw_only=True, tag="progress.v1"):
    """The turns that a sample had when its worker or engine went away."""

    index: int
    turns: tuple[TurnRecord, ...]


class ResumePoint(Message, frozen=True, kw_only=True, tag="resume.v1"):
    """What is kept of a ticket that was handed back, under the key `part.<ticket>`."""

    ticket: int
    num_failures: int = 0
    """The reported failures of the whole group; a kill does not count."""
    outcomes: tuple[Sample | SampleFailure, ...] = ()
    progress: tuple[SampleProgress, ...] = ()


EVALUATION_ROWS = 16
"""The most rows of one evaluation ticket."""


class EvaluationTicket(Message, frozen=True, kw_only=True, tag="evalticket.v1"):
    """Held-out prompts that are answered greedily, one sample each, outside the staleness gate."""

    evaluation: str
    """The name of the evaluation, so that a late answer is not taken for that of another one."""
    first_index: int
    """The place of the first row in the evaluation."""
    rows: tuple[dict[str, Any], ...]
    max_new_tokens: int


class EvaluationResult(Message, frozen=True, kw_only=True, tag="evalresult.v1"):
    """The answers to one evaluation ticket; an outcome's `index` is its row's place in the evaluation."""

    evaluation: str
    outcomes: tuple[Sample | SampleFailure, ...]


class CurrentVersion(Message, frozen=True, kw_only=True, tag="version.v1"):
    """The controller's current version, under the key `version`. An engine further behind than `max_versions`
    takes no tickets: its samples would be too old before they could be trained.
    """

    version: PolicyVersion
    max_versions: int


HEARTBEAT_SECONDS = 1.0
"""How often a worker gives a sign of life."""


class Heartbeat(Message, frozen=True, kw_only=True, tag="heartbeat.v1"):
    """A worker's sign of life, every HEARTBEAT_SECONDS."""

    worker: str
    incarnation: str
    engine: str
    """The incarnation of the engine process; a new one has no weights and no group."""
    engine_state: str
    """One of ENGINE_STATES."""
    version: PolicyVersion | None
    """The version that the engine samples with; None before its first weights."""
    num_running_samples: int = 0
    max_running_samples: int = 0
    """The samples that the engine could run at once, by what is known of its cache."""
    kv_usage: float = 0.0
    num_sampled_tokens: int = 0
    """The tokens sampled since the worker started."""
    num_failures: int = 0
    """The failures reported since the worker started."""
    last_error: str = ""
    held: tuple[int, ...] = ()
    """The tickets that this worker holds; they are handed back when it falls silent."""
    late_seconds: float = 0.0
    """The time for which the worker's event loop has not run although it should: user code may block it. It
    can have been given tickets meanwhile that it does not know of."""


ENGINE_STATES = ("down", "empty", "ready", "draining", "drained", "updating", "dirty")
"""The states of an engine. down: it does not answer. empty: it has no weights of this job yet. ready: it
samples. draining: it lets samples finish before an update. drained: they have finished. updating: it is in
an epoch. dirty: only part of an update arrived, so it stays paused until it has everything again."""


class DrainEngine(Message, frozen=True, kw_only=True, tag="drain.v1"):
    """Before phase 1, if samples may finish: take no more tickets; `ok` once nothing is in flight."""

    version: PolicyVersion | None = None
    """The version that is to come. An engine that has it already goes on: nothing would end its wait."""


class ProbeEngine(Message, frozen=True, kw_only=True, tag="probe.v1"):
    """Before phase 1: `ok` if the engine answers. One that is gone would keep the others in the join."""


class BucketLayout(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Which weights a bucket holds, one behind the other without gaps; the same in every version."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    """The dtypes as torch calls them: `bfloat16`."""
    shapes: tuple[tuple[int, ...], ...]


class JoinGroup(Message, frozen=True, kw_only=True, tag="join.v2"):
    """Phase 1 of a weight epoch: leave any older group and join this one; blocks until all have joined."""

    group: str
    host: str
    port: int
    rank: int
    world_size: int
    backend: str
    timeout_seconds: float
    layout: tuple[BucketLayout, ...]
    """The buckets of every update of this group, in order."""


class PrepareUpdate(Message, frozen=True, kw_only=True, tag="prepare.v2"):
    """Phase 2, to the members of `groups`: pause the engine and open the update; the answer comes before any
    collective starts.
    """

    groups: tuple[str, ...]
    version: PolicyVersion
    interrupt: str
    """`Retract`, `InPlace` or `Drain`; with the last there is nothing left to interrupt."""
    timeout_seconds: float


class ReceiveWeights(Message, frozen=True, kw_only=True, tag="weights.v1"):
    """Phase 3, to the members of `groups`: receive all buckets by broadcast, one after the other."""

    groups: tuple[str, ...]
    version: PolicyVersion
    timeout_seconds: float
    """The deadline of each bucket."""


class CommitUpdate(Message, frozen=True, kw_only=True, tag="commit.v2"):
    """Phase 4, to the members of `groups`: close the update and go on sampling."""

    groups: tuple[str, ...]
    version: PolicyVersion
    checksum: bool = False
    """Whether to answer with the engine's checksum."""


class AdapterChunk(Message, frozen=True, kw_only=True, tag="adapterpart.v1"):
    """A chunk of an adapter's weights; the chunks of a version arrive in order, one after the other."""

    version: PolicyVersion
    offset: int
    data: bytes


class LoadAdapter(Message, frozen=True, kw_only=True, tag="adapter.v1"):
    """Make the engine load the adapter that came in chunks, and go on sampling with it."""

    version: PolicyVersion
    num_bytes: int
    config: str
    """PEFT's adapter_config.json."""
    interrupt: str
    """`Retract` or `Drain`."""
    timeout_seconds: float


ControlRequest = (
    DrainEngine
    | ProbeEngine
    | JoinGroup
    | PrepareUpdate
    | ReceiveWeights
    | CommitUpdate
    | AdapterChunk
    | LoadAdapter
)


class ControlReply(Message, frozen=True, kw_only=True, tag="reply.v1"):
    """A worker's answer to a phase."""

    ok: bool
    message: str = ""
    checksum: str = ""
    num_ranks: int = 1
    """The engine's ranks in a weight group, one for each of its GPUs, in the answer to ProbeEngine."""
    is_refusal: bool = False
    """Whether the engine itself, alive and well, answered no (an HTTP 4xx, or no success)."""
    worker: str = ""
    """Whose answer it is: one to a request that went to all is not known by where it comes from."""
    bucket: int = 0
    """The number, from 1 on, of the bucket at which ReceiveWeights failed; 0 if it was at none."""
    paused_seconds: float = 0.0
    """How long the engine sampled nothing; in the answer to CommitUpdate."""


LONGEST_TIMEOUT_SECONDS = 7 * 24 * 3600.0
"""Longer than any phase of an update; `weightSync.timeoutSeconds` has no bound of its own."""
NOT_A_MESSAGE = (msgspec.DecodeError, UnicodeDecodeError, OverflowError, RecursionError, MemoryError)
"""What msgspec raises for bytes that are none of ours: also for lists in lists without end, and for a date
beyond all calendars."""


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


A = TypeVar("A", bound=Message)
B = TypeVar("B", bound=Message)
C = TypeVar("C", bound=Message)


@overload
def decode(data: bytes, kind: type[A], /) -> A: ...
@overload
def decode(data: bytes, kind: type[A], other: type[B], /) -> A | B: ...
@overload
def decode(data: bytes, kind: type[A], other: type[B], third: type[C], /) -> A | B | C: ...
def decode(data: bytes, *kinds: type[Message]) -> Message:
    """Return the message in `data`, which must be one of `kinds`.

    Raises:
        ValueError: the bytes are not such a message, or one of a version unknown to this code; names both.
    """
    result: Message = _decode(data, kinds)
    return result


def _decode(data: bytes, kinds: tuple[type[Message], ...]) -> Any:
    try:
        return _decoder(kinds).decode(data)
    except NOT_A_MESSAGE as error:
        expected = " or ".join(str(kind.__struct_config__.tag) for kind in kinds)
        raise ValueError(
            f"expected {expected}, got {_tag(data)}: {error} ({len(data)} bytes: {data[:24]!r})"
        ) from error


def decode_request(data: bytes) -> ControlRequest:
    """Return the controller's request to a worker.

    Raises:
        ValueError: as for `decode`, or its deadline is none.
    """
    request: ControlRequest = _decode(data, get_args(ControlRequest))
    seconds = getattr(request, "timeout_seconds", LONGEST_TIMEOUT_SECONDS)
    if not 0 < seconds <= LONGEST_TIMEOUT_SECONDS:
        raise ValueError(f"timeout_seconds {seconds}; must be above 0, {LONGEST_TIMEOUT_SECONDS:.0f} at most")
    return request


def _tag(data: bytes) -> str:
    """Return the tag that `data` carries."""
    try:
        match msgspec.msgpack.decode(data):
            case [str(tag), *_]:
                return tag
    except NOT_A_MESSAGE:
        pass
    return "no message"


@functools.cache
def _decoder(kinds: tuple[type[Message], ...]) -> Any:
    """Return a decoder, made only once: making one takes longer than decoding a small message."""
    return msgspec.msgpack.Decoder(functools.reduce(operator.or_, kinds))


_encoder = msgspec.msgpack.Encoder()


def ids_to_bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, dtype="<i4").tobytes()


def ids_from_bytes(data: bytes) -> NDArray[np.int32]:
    """Return a read-only view."""
    return np.frombuffer(data, dtype="<i4")


def floats_to_bytes(values: Sequence[float]) -> bytes:
    return np.asarray(values, dtype="<f4").tobytes()


def floats_from_bytes(data: bytes) -> NDArray[np.float32]:
    """Return a read-only view."""
    return np.frombuffer(data, dtype="<f4")


def mask_to_bytes(mask: Sequence[bool]) -> bytes:
    return np.packbits(np.asarray(mask, dtype=np.bool_), bitorder="little").tobytes()
