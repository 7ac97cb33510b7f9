"""What SGLang's server says, as types, and what is made of it. Pure.

Answers are decoded into what is read of them and nothing else, which costs a tenth of making objects of all
that is in them. Numbers must be numbers of their kind: no true is taken for 1.
"""

import math
from collections.abc import Sequence

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from asyncrl_runtime.contract.messages import PolicyVersion, VersionSpan
from asyncrl_runtime.rollout.engine_api import (
    EngineFailed,
    EngineLoad,
    EngineLost,
    EngineRefused,
    Generation,
    WeightsSeen,
    merge_spans,
)

FINISH_REASONS = ("stop", "length", "abort")
NOT_UNDERSTOOD = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    OverflowError,
    RecursionError,
)
"""What reading an answer raises that is not of the form that it should have."""


class LogprobEntry(msgspec.Struct, array_like=True, gc=False):
    """`[logprob, token id, text]`, of which only the first is read; null is what JSON has for NaN."""

    logprob: float | None


class FinishReason(msgspec.Struct, gc=False):
    """Why an answer ended. One with a status failed after its stream had begun as a 200."""

    type: str
    status_code: int | None = None
    message: str | None = None


class AttestedSpan(msgspec.Struct, gc=False):
    """The tokens up to `end` that were sampled with the weights of this label."""

    version: str
    end: int


class MetaInfo(msgspec.Struct):
    """What is said about tokens."""

    output_token_logprobs: list[LogprobEntry]
    finish_reason: FinishReason | None = None
    completion_tokens: int = 0
    """The number of the answer's tokens so far."""
    weight_versions: list[AttestedSpan] | None = None
    """Only the last chunk of a stream has them."""

    @property
    def logprobs(self) -> list[float]:
        """One for each token; None stands for NaN, which the session refuses."""
        return [entry.logprob for entry in self.output_token_logprobs]  # type: ignore[misc]


class Answer(msgspec.Struct):
    """An answer to a request for tokens."""

    output_ids: list[int]
    meta_info: MetaInfo


class StreamError(msgspec.Struct):
    """What is said in a stream instead of a chunk."""

    message: str = "no message"


class Chunk(msgspec.Struct):
    """A piece of a streamed answer, or an error."""

    output_ids: list[int] = []
    meta_info: MetaInfo | None = None
    error: StreamError | None = None


decode_answers = msgspec.json.Decoder(list[Answer]).decode
decode_chunk = msgspec.json.Decoder(Chunk).decode


class StreamedAnswer:
    """A streamed answer so far: each chunk holds what is new, and only the last one attests versions.

    A server may be told to repeat everything in each chunk, so how much of one is new follows from its count.

    In a broken answer, what came before the first update since the request began is from the version that the
    engine had then; what came later may be from that version or a newer one, so it is dropped. If the request
    named an adapter, all of it is from that adapter.
    """

    def __init__(self, weights: WeightsSeen, adapter: PolicyVersion | None, vocab_size: int) -> None:
        self.last: MetaInfo | None = None
        self.output_ids: list[int] = []
        self.logprobs: list[float] = []
        self._vocab_size = vocab_size
        self._weights = weights
        self._adapter = adapter
        self._version = weights.version
        self._completed = weights.num_updates_completed
        self._updates = self._updates_now()
        self._num_before_update = 0

    @property
    def is_whole(self) -> bool:
        return self.last is not None and self.last.finish_reason is not None

    def take(self, data: bytes) -> None:
        """Take the next chunk; one that makes no sense raises something and leaves the answer as it was.

        Raises:
            EngineRefused: the engine says that something is wrong with the request.
            EngineLost: tokens are missing between the chunks.
            ValueError: the chunk is not understood.
        """
        chunk = decode_chunk(data)
        if chunk.error is not None:
            raise EngineRefused(chunk.error.message)
        meta, ids = chunk.meta_info, chunk.output_ids
        if meta is None:
            raise ValueError("a chunk without meta_info")
        logprobs = meta.logprobs
        num_new = meta.completion_tokens - len(self.output_ids)
        if num_new < 0 or len(logprobs) != len(ids):
            raise ValueError(f"{num_new} new tokens, {len(ids)} ids and {len(logprobs)} log-probs in a chunk")
        if num_new > len(ids):
            raise EngineLost(f"{num_new - len(ids)} tokens of a stream are missing")
        self.output_ids += ids[len(ids) - num_new :]
        self.logprobs += logprobs[len(ids) - num_new :]
        self.last = meta
        if self._updates_now() == self._updates:
            self._num_before_update = len(self.output_ids)

    def whole(self) -> Generation:
        """Return the answer once it is whole; raises what `generation` raises."""
        assert self.last is not None
        return generation(self.last, self._adapter, self.output_ids, self.logprobs)

    def earned(self) -> Generation:
        """Return what can be kept of a broken answer."""
        if self.last is None or self._version is None:
            return Generation([], [], (), "abort")
        untouched = self._adapter is not None or self._weights.num_updates_completed == self._completed
        count = len(self.output_ids) if untouched else self._num_before_update
        span = VersionSpan(self._version.attempt, self._version.version, count)
        try:
            ids, logprobs = self.output_ids[:count], self.logprobs[:count]
            earned = Generation(ids, logprobs, (span,) if count else (), "abort")
            check_generation(earned, self._vocab_size, len(ids))
        except NOT_UNDERSTOOD:
            return Generation([], [], (), "abort")
        return earned

    def _updates_now(self) -> tuple[int, int]:
        """Return both counts, since an update may have been under way already when the request began."""
        return self._weights.num_updates_begun, self._weights.num_updates_completed


def generation(
    meta: MetaInfo, adapter: PolicyVersion | None, output_ids: list[int], logprobs: list[float]
) -> Generation:
    """Return what an answer, or the last chunk of a streamed one, says of these tokens.

    Raises:
        EngineRefused, EngineFailed: the answer is an error that came after a stream had begun.
        EngineLost: the tokens were sampled with weights that are not this job's.
        ValueError: it does not say why the answer ended, or with which weights it was sampled.
    """
    reason = meta.finish_reason
    if reason is None:
        raise ValueError("no finish_reason")
    if status := reason.status_code:
        raise (EngineRefused if status < 500 else EngineFailed)(f"{status}: {reason.message}")
    if adapter is not None:
        span = VersionSpan(adapter.attempt, adapter.version, len(output_ids))
        return Generation(output_ids, logprobs, merge_spans([span]), reason.type)
    if meta.weight_versions is None:
        raise ValueError("no weight_versions")
    spans = []
    for attested in meta.weight_versions:
        version = PolicyVersion.parse(attested.version)
        if version is None:
            raise EngineLost(f"sampled with weights that are not this job's: {attested.version!r}")
        spans.append(VersionSpan(version.attempt, version.version, attested.end))
    return Generation(output_ids, logprobs, tuple(spans), reason.type)


def check_generation(answer: Generation, vocab_size: int, max_new_tokens: int) -> None:
    """Raise ValueError unless an answer can be that of the model to a request for so many tokens."""
    ids = answer.output_ids
    if outside(ids, vocab_size) is not None:
        raise ValueError(f"token ids outside the vocabulary of {vocab_size}")
    if len(ids) > max_new_tokens or len(answer.logprobs) != len(ids):
        raise ValueError(
            f"{len(ids)} tokens and {len(answer.logprobs)} log-probs; asked for: {max_new_tokens} tokens"
        )
    ends = [span.end for span in answer.spans]
    if sorted(ends) != ends or (ids and ends[-1:] != [len(ids)]):
        raise ValueError(f"versions up to {ends}, and {len(ids)} tokens")
    if ends and not 0 <= ends[0] <= ends[-1] <= len(ids):
        raise ValueError(f"versions up to {ends}, and {len(ids)} tokens")
    if answer.finish_reason not in FINISH_REASONS:
        raise ValueError(f"the finish reason {answer.finish_reason!r}")


def outside(ids: Sequence[int], vocab_size: int) -> int | None:
    """Return a token id outside the vocabulary; None if there is none."""
    if not ids:
        return None
    lowest, highest = min(ids), max(ids)
    return lowest if lowest < 0 else highest if highest >= vocab_size else None


def parse_load(text: str) -> EngineLoad:
    """Return the load from SGLang's metrics; label sets (ranks) are summed, and the largest usage counts."""
    values: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values.setdefault(sample.name.removeprefix("sglang:"), []).append(sample.value)

    def total(name: str) -> int:
        return int(sum(value for value in values.get(name, []) if math.isfinite(value)))

    return EngineLoad(
        kv_usage=max((value for value in values.get("token_usage", []) if math.isfinite(value)), default=0.0),
        num_queued=total("num_queue_reqs"),
        num_retracted=total("num_retracted_requests_total"),
        num_generated_tokens=total("generation_tokens_total"),
        num_used_tokens=total("num_used_tokens"),
    )
