"""One emulated engine as its client sees it: requests, pauses, labels, and a timer for what is next."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from asyncrl_runtime.emulation.decode_batch import DecodeBatch, Totals
from asyncrl_runtime.emulation.decode_batch import Sequence as Response
from asyncrl_runtime.emulation.device import DeviceModel

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Pace:
    """How the model's time passes.

    Args:
        clock: returns seconds of this machine, or of a virtual event loop.
        speedup: model seconds per second of the clock.
        token_scale: tokens of the model that one token here stands for.
    """

    clock: Callable[[], float]
    speedup: float = 1.0
    token_scale: int = 1

    def now(self) -> float:
        """Return the time in model seconds."""
        return self.clock() * self.speedup

    async def sleep(self, seconds: float) -> None:
        """Let model seconds pass."""
        await asyncio.sleep(seconds / self.speedup)


@dataclass(frozen=True)
class EmulatedRequest:
    """A request for one response."""

    input_ids: Sequence[int]
    max_new_tokens: int
    seed: int
    ignores_end: bool = False
    """Whether the response goes on until the bound, whatever length is drawn for it."""


@dataclass(frozen=True)
class EmulatedAnswer:
    """What an engine has sampled."""

    output_ids: list[int]
    logprob: float
    """That of every token: they are drawn from all alike."""
    spans: tuple[tuple[str, int], ...]
    """Label and end of each run of tokens that was sampled under one label."""
    finish_reason: str
    """`stop`, `length` or `abort`."""
    num_retractions: int
    """How often it had to be prefilled again."""


@dataclass(eq=False)
class _Request:
    tokens: list[int]
    """All that may still come, within the request's bound."""
    is_cut: bool
    """Whether the bound comes before the response's own end."""
    done: asyncio.Future[EmulatedAnswer] = field(repr=False)


class EmulatedServer:
    """An engine of a device model. It belongs to one event loop.

    Args:
        vocabulary_size: tokens are drawn from all ids but the first `special_ids`.
    """

    def __init__(self, model: DeviceModel, pace: Pace, vocabulary_size: int, special_ids: int = 8) -> None:
        self._model = model
        self._pace = pace
        self._ids = min(special_ids, vocabulary_size - 1), vocabulary_size
        self._batch = DecodeBatch(model.engine)
        self._timer: asyncio.TimerHandle | None = None
        self._resumed = asyncio.Event()
        self._resumed.set()
        self._num_generated = 0

    # -- sampling

    async def sample(self, asked: EmulatedRequest) -> EmulatedAnswer:
        """Sample one response; while the engine is paused, wait at its gate. A cancellation breaks it off."""
        await self._resumed.wait()
        scale = self._pace.token_scale
        if asked.ignores_end:
            tokens = self._tokens(asked.seed, asked.max_new_tokens + 1)
        else:
            tokens = self._tokens(asked.seed, -(-self._model.responses.length(asked.seed) // scale))
            tokens = tokens[_earned(asked.input_ids, tokens) :]
        wanted = min(asked.max_new_tokens, len(tokens))
        request = _Request(
            tokens[:wanted].tolist(), len(tokens) > wanted, asyncio.get_running_loop().create_future()
        )
        prefix = hash(tuple(asked.input_ids))
        response = Response(len(asked.input_ids) * scale, wanted * scale, prefix, request)
        with self._changing():
            self._batch.submit(response)
        try:
            return await request.done
        finally:
            if not request.done.done() or request.done.cancelled():
                with self._changing():
                    self._batch.remove(response)

    def _tokens(self, seed: int, count: int) -> Tokens:
        low, high = self._ids
        return np.random.default_rng(seed).integers(low, high, count)

    def abort_all(self) -> None:
        """Break off every request; each is answered with what it has."""
        with self._changing():
            for response in self._batch.remove_all():
                self._answer(response, "abort")

    def _answer(self, response: Response, reason: str) -> None:
        request: _Request = response.payload
        scale = self._pace.token_scale
        count = min(len(request.tokens), round(response.produced / scale))
        spans: list[tuple[str, int]] = []
        for label, end in [*response.spans, (self._batch.label, response.produced)]:
            stop = min(count, round(end / scale))
            if stop > (spans[-1][1] if spans else 0):
                spans.append((label, stop))
        self._num_generated += count
        low, high = self._ids
        logprob = -float(np.log(high - low))
        if not request.done.done():
            answer = EmulatedAnswer(
                request.tokens[:count], logprob, tuple(spans), reason, response.num_retractions
            )
            request.done.set_result(answer)

    # -- control

    @property
    def label(self) -> str:
        """The version of the weights."""
        return self._batch.label

    def set_label(self, label: str) -> None:
        """Sample with other weights from now on."""
        with self._changing():
            self._batch.set_label(label)

    @property
    def is_paused(self) -> bool:
        return self._batch.is_paused

    def pause(self, *, retract: bool) -> None:
        """Stop sampling; new requests wait at the gate."""
        with self._changing():
            self._batch.pause(retract=retract)
            self._resumed.clear()

    def resume(self) -> None:
        """Go on sampling."""
        with self._changing():
            self._batch.resume()
            self._resumed.set()

    def flush(self) -> bool:
        """Forget the prompts in the cache; return whether that was possible, which it is while none runs."""
        with self._changing():
            return self._batch.flush()

    @property
    def totals(self) -> Totals:
        """Where the time went up to now."""
        with self._changing():
            return self._batch.totals

    @property
    def num_running(self) -> int:
        return self._batch.num_running

    @property
    def num_queued(self) -> int:
        return self._batch.num_waiting

    @property
    def num_generated_tokens(self) -> int:
        """The tokens of requests that have ended, as they are counted here."""
        return self._num_generated

    @property
    def num_used_tokens(self) -> int:
        """The tokens of running requests in the cache, as the model counts them."""
        return round(self._batch.num_used_tokens)

    @property
    def kv_usage(self) -> float:
        return self._batch.num_used_tokens / self._model.engine.kv_tokens

    # -- time

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Let time pass up to now, change something in the body, and come again at the next event."""
        self._batch.advance(self._pace.now())
        try:
            yield
        finally:
            self._settle()

    def _settle(self) -> None:
        for response in self._batch.take_finished():
            self._answer(response, "length" if response.payload.is_cut else "stop")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if (seconds := self._batch.next_event()) is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(seconds / self._pace.speedup, self._tick)

    def _tick(self) -> None:
        with self._changing():
            self._timer = None


def _earned(input_ids: Sequence[int], tokens: Tokens) -> int:
    """Return with how many tokens of a response the input ends: they were sampled before."""
    for place in np.flatnonzero(tokens[:-1] == input_ids[-1])[::-1]:
        count = int(place) + 1
        if count < len(input_ids) and list(input_ids[-count:]) == tokens[:count].tolist():
            return count
    return 0
