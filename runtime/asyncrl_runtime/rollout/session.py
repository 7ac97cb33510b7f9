"""One sample of a prompt group: its tokens, the versions that sampled them, and what can be handed on."""

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from asyncrl_api.protocols import Row, Score, Turn
from asyncrl_runtime.contract.messages import (
    Sample,
    SampleProgress,
    TurnRecord,
    VersionSpan,
    floats_from_bytes,
    floats_to_bytes,
    ids_from_bytes,
    ids_to_bytes,
    mask_to_bytes,
)
from asyncrl_runtime.contract.numbers import is_usable
from asyncrl_runtime.rollout.engine_api import (
    BrokenStream,
    EngineLost,
    EngineRefused,
    Generation,
    SamplingRequest,
    merge_spans,
)
from asyncrl_runtime.rollout.prompts import PromptRenderer

Sampler = Callable[[SamplingRequest], Awaitable[Generation]]
ScoreResponse = Callable[[str, str, Row], Awaitable[Score]]


class PromptTooLong(ValueError):
    """The prompt leaves no room for an answer. No retry helps, so the ticket is given up."""


@dataclass(frozen=True)
class SampleLimits:
    """The limits of a sample."""

    max_new_tokens: int
    """The most tokens of each turn."""
    context_length: int
    """The most tokens of prompt and response together."""
    temperature: float


def sampling_seed(seed: int, ticket: int, sample: int, turn: int) -> int:
    """Return the seed of one turn's noise, 63 bits; the engine adds the token's absolute position.

    So the same ticket and sample give the same tokens whatever else is in the batch, and a sample that is
    continued elsewhere goes on as it would have here.
    """
    digest = hashlib.blake2b(f"{seed}/{ticket}/{sample}/{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass
class _Response:
    """The tokens after the prompt, with what is known about each."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    spans: list[VersionSpan] = field(default_factory=list)

    def add_sampled(self, generation: Generation) -> None:
        start = len(self.ids)
        self.ids += generation.output_ids
        self.logprobs += generation.logprobs
        self.mask += [True] * len(generation.output_ids)
        self.spans += [VersionSpan(s.attempt, s.version, start + s.end) for s in generation.spans]

    def add_told(self, ids: Sequence[int]) -> None:
        self.ids += ids
        self.logprobs += [0.0] * len(ids)
        self.mask += [False] * len(ids)
        last = self.spans[-1]  # nobody sampled these; the span only has to cover them
        self.spans[-1] = VersionSpan(last.attempt, last.version, len(self.ids))


class SampleSession:
    """Implements asyncrl_api.protocols.Session.

    Args:
        seeds: returns the seed of the noise for a turn number.
        replay: turns that were sampled before, here or on another worker; each is handed out again if what
            precedes it is the same, and otherwise forgotten together with all that follow.
    """

    def __init__(
        self,
        index: int,
        row: Row,
        renderer: PromptRenderer,
        limits: SampleLimits,
        sampler: Sampler,
        scorer: ScoreResponse,
        seeds: Callable[[int], int],
        replay: Sequence[TurnRecord] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.index = index
        self.row = row
        self.prompt = renderer.text(row)
        self._renderer = renderer
        self._limits = limits
        self._sampler = sampler
        self._scorer = scorer
        self._seeds = seeds
        self._replay = list(replay)
        self._turns: list[TurnRecord] = []
        self._response = _Response()
        self._prompt_ids = renderer.prompt_ids(row)
        self._finish_reason = "length"
        self.engine_error: EngineLost | EngineRefused | None = None
        """The reason why this sample cannot be finished here, whatever the workflow does with the error."""
        self._clock = clock
        self._num_waiting = 0
        self._idle_since = clock()
        if len(self._prompt_ids) >= limits.context_length:
            raise PromptTooLong(
                f"the prompt has {len(self._prompt_ids)} tokens; spec.model.contextLength is "
                f"{limits.context_length}"
            )

    async def generate(self, max_new_tokens: int | None = None) -> Turn:
        """See the protocol. If the context is full, the turn is empty and its finish reason is `length`.

        Raises:
            EngineLost: the engine is gone; `progress` has the turns of this sample so far.
        """
        if self.engine_error is not None:
            raise self.engine_error
        before = [*self._prompt_ids, *self._response.ids]
        bound = self._limits.max_new_tokens if max_new_tokens is None else max_new_tokens
        room = min(bound, self._limits.max_new_tokens, self._limits.context_length - len(before))
        if room <= 0:
            return Turn("", [], "length")
        earned = self._recorded(before)
        if earned.finish_reason == "abort" and len(earned.output_ids) >= room:
            earned = Generation(earned.output_ids, earned.logprobs, earned.spans, "length")
        if earned.finish_reason == "abort":
            earned = await self._continue(before, earned, room)
        self._refuse_unusable(earned)
        self._response.add_sampled(earned)
        self._turns.append(_record(before, earned))
        self._finish_reason = earned.finish_reason
        return Turn(self._renderer.decode(earned.output_ids), earned.output_ids, earned.finish_reason)

    def _refuse_unusable(self, generation: Generation) -> None:
        """Fail this sample if its engine gave a log-prob that cannot be trained on.

        Raises:
            EngineRefused: it did; the same request would bring the same numbers.
        """
        for place, logprob in enumerate(generation.logprobs):
            if not is_usable(logprob):
                self.engine_error = EngineRefused(
                    f"the engine gave log-prob {logprob} to token {place} of turn {len(self._turns) + 1}; it "
                    "must be a finite number"
                )
                raise self.engine_error

    def tell(self, message: str) -> None:
        """See the protocol."""
        if not self._response.ids:
            raise ValueError("tell: there is no answer yet to reply to")
        self._response.add_told(self._renderer.next_turn_ids(message, self._response.ids[-1]))

    async def score(self, response: str) -> Score:
        """See the protocol."""
        with self._waiting():
            return await self._scorer(self.prompt, response, self.row)

    def idle_seconds(self, now: float) -> float:
        """Return how long the workflow has waited neither for the engine nor for a reward."""
        return 0.0 if self._num_waiting else now - self._idle_since

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        self._num_waiting += 1
        try:
            yield
        finally:
            self._num_waiting -= 1
            self._idle_since = self._clock()

    @property
    def progress(self) -> SampleProgress:
        """The turns of this sample so far, for whoever continues it."""
        return SampleProgress(index=self.index, turns=(*self._turns, *self._replay))

    def sample(self, reward: float) -> Sample:
        """Return the finished sample. Tokens that were told after the last answer are left out.

        Raises:
            EngineLost, EngineRefused: `generate` raised it; a workflow that hides that has made no sample.
            ValueError: nothing was sampled, or the reward is not a finite number within float32.
        """
        if self.engine_error is not None:
            raise self.engine_error
        if not is_usable(float(reward)):
            raise ValueError(
                f"the workflow returned {reward} as reward; it must be a finite number within float32"
            )
        response = self._response
        end = max((place + 1 for place, sampled in enumerate(response.mask) if sampled), default=0)
        if not end:
            raise ValueError("the workflow returned before any token was sampled with session.generate")
        spans = [VersionSpan(s.attempt, s.version, min(s.end, end)) for s in response.spans]
        return Sample(
            index=self.index,
            prompt_ids=ids_to_bytes(self._prompt_ids),
            response_ids=ids_to_bytes(response.ids[:end]),
            behavior_logprobs=floats_to_bytes(response.logprobs[:end]),
            response_mask=mask_to_bytes(response.mask[:end]),
            version_spans=merge_spans(spans),
            reward=float(reward),
            temperature=self._limits.temperature,
            finish_reason=self._finish_reason,
            num_turns=len(self._turns),
            max_new_tokens=self._limits.max_new_tokens,
            longest_turn=max(len(turn.output_ids) // 4 for turn in self._turns),
        )

    def _recorded(self, before: list[int]) -> Generation:
        """Return what was already sampled of the turn that follows `before`; empty if nothing was."""
        if self._replay:
            record = self._replay.pop(0)
            logprobs = floats_from_bytes(record.logprobs).tolist()
            if ids_from_bytes(record.input_ids).tolist() == before and all(map(is_usable, logprobs)):
                return Generation(
                    ids_from_bytes(record.output_ids).tolist(),
                    logprobs,
                    record.version_spans,
                    record.finish_reason or "abort",
                )
            self._replay.clear()
        return Generation([], [], (), "abort")

    async def _continue(self, before: list[int], earned: Generation, room: int) -> Generation:
        request = SamplingRequest(
            input_ids=[*before, *earned.output_ids],
            max_new_tokens=room - len(earned.output_ids),
            temperature=self._limits.temperature,
            seed=self._seeds(len(self._turns)),
        )
        try:
            with self._waiting():
                more = await self._sampler(request)
            if more.finish_reason == "abort":
                raise BrokenStream(EngineLost("broken off on request"), more)
        except asyncio.CancelledError:
            self._turns.append(_record(before, earned))
            raise
        except (EngineLost, EngineRefused) as error:
            if isinstance(error, BrokenStream):
                earned = earned.followed_by(error.earned)
            self._turns.append(_record(before, earned))
            self.engine_error = error
            raise
        return earned.followed_by(more)


def _record(before: list[int], generation: Generation) -> TurnRecord:
    return TurnRecord(
        input_ids=ids_to_bytes(before),
        output_ids=ids_to_bytes(generation.output_ids),
        logprobs=floats_to_bytes(generation.logprobs),
        version_spans=generation.spans,
        finish_reason="" if generation.finish_reason == "abort" else generation.finish_reason,
    )
