"""The batch of an emulated engine: what it decodes, and when the next thing happens. Pure, in model seconds.

All sequences of a batch advance by one token in each decode step, so between two events (a sequence ends, the
KV cache is full) the time of k steps is a quadratic in k, and nothing has to be stepped through.
"""

import heapq
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from asyncrl_runtime.emulation.device import EngineModel

NEVER = -1.0


@dataclass(eq=False, slots=True)
class Sequence:
    """One response on its way."""

    prompt_tokens: int
    """The tokens before the response."""
    wanted: float
    """The tokens of the response in all."""
    prefix: int = 0
    """Names the prompt: whoever shares it with a sequence that came before finds it in the cache."""
    payload: Any = None
    spans: list[tuple[str, float]] = field(default_factory=list)
    """The labels under which tokens were sampled, each with the number of tokens up to its end."""
    produced: float = 0.0
    """The tokens sampled up to when it last entered or left the batch."""
    entered_at: float = NEVER
    """The batch's step at which it entered; NEVER while it is not in the batch."""
    entry: int = 0
    """Numbers its entries into the batch; 0 while it is not there."""
    order: int = 0
    num_retractions: int = 0
    """How often its part of the cache was taken from it, by a full cache or a pause."""


@dataclass(slots=True)
class Totals:
    """Where an engine's time went, in model seconds, and what came of it."""

    seconds: float = 0.0
    idle: float = 0.0
    paused: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    sequence_seconds: float = 0.0
    """The sequences in the batch, integrated over the time of decoding."""
    tokens: float = 0.0
    retractions: int = 0
    """Sequences that were thrown out of a full cache; those that a pause throws out do not count."""
    finished: int = 0


class DecodeBatch:
    """The sequences of one engine.

    Whoever uses it calls `advance` with the time before anything else, `take_finished` after it, and comes
    again after `next_event` seconds.

    Args:
        headroom: the tokens of the cache that are left free for each sequence when another one is admitted.
    """

    def __init__(self, model: EngineModel, headroom: float = 16.0) -> None:
        self._model = model
        self._headroom = headroom
        self._running: set[Sequence] = set()
        self._waiting: deque[Sequence] = deque()
        self._ends: list[tuple[float, int, Sequence]] = []
        """A heap of (step at which it ends, number of its entry, sequence); what has left is passed over."""
        self._num_entries = 0
        self._steps = 0.0
        self._base = 0.0  # tokens in the cache, less steps * sequences
        self._debt = 0.0  # seconds of prefill to be done before the next step
        self._now = 0.0
        self._num_seen = 0
        self._cached: set[int] = set()
        self.label = "default"
        """The version of the weights, as the engine attests it."""
        self.is_paused = False
        self.totals = Totals()

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_used_tokens(self) -> float:
        """The tokens in the cache."""
        return self._base + len(self._running) * self._steps

    # -- time

    def advance(self, now: float) -> None:
        """Let everything happen up to `now`, at most until the next event."""
        seconds, self._now = max(0.0, now - self._now), max(now, self._now)
        totals = self.totals
        totals.seconds += seconds
        if self.is_paused:
            totals.paused += seconds
            return
        if not self._running:
            totals.idle += seconds
            return
        prefill = min(seconds, self._debt)
        self._debt -= prefill
        totals.prefill += prefill
        decode = seconds - prefill
        if decode > 0:
            steps = self._steps_within(decode)
            totals.decode += decode
            totals.sequence_seconds += decode * len(self._running)
            totals.tokens += steps * len(self._running)
            self._steps += steps

    def next_event(self) -> float | None:
        """Return the seconds from the last `advance` to the next event; None if nothing happens by itself."""
        if self.is_paused or not self._running:
            return None
        self._forget_gone()
        steps = max(0.0, self._ends[0][0] - self._steps)
        count = len(self._running)
        room = self._model.kv_tokens - self.num_used_tokens
        if count > 1 and room < steps * count:
            steps = max(room, 0.0) / count + 1e-3  # a little later: then it is over its bound
        growth = self._model.step_seconds_per_token * count
        return self._debt + steps * self._seconds_per_step() + growth * steps * steps / 2

    def _seconds_per_step(self) -> float:
        return self._model.step_seconds + self._model.step_seconds_per_token * self.num_used_tokens

    def _steps_within(self, seconds: float) -> float:
        """Return the decode steps of that time: the positive root of growth/2 k^2 + first k - seconds."""
        first = self._seconds_per_step()
        half_growth = self._model.step_seconds_per_token * len(self._running) / 2
        # Without the difference of two large numbers that the usual formula has.
        return 2 * seconds / (first + math.sqrt(first * first + 4 * half_growth * seconds))

    def take_finished(self) -> list[Sequence]:
        """Take out what has ended, make room in a full cache, and admit what waits."""
        done: list[Sequence] = []
        while self._running:
            self._forget_gone()
            end, _, sequence = self._ends[0]
            if end - self._steps > 1e-6:
                break
            self._leave(sequence)
            sequence.produced = sequence.wanted
            done.append(sequence)
        self.totals.finished += len(done)
        while len(self._running) > 1 and self.num_used_tokens > self._model.kv_tokens:
            youngest = max(self._running, key=lambda sequence: sequence.order)
            self._leave(youngest)
            youngest.num_retractions += 1
            if all(each.prefix != youngest.prefix for each in self._running):
                self._cached.discard(youngest.prefix)
            self.totals.retractions += 1
            self._waiting.appendleft(youngest)
        self._admit()
        return done

    # -- what comes and goes

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence; `take_finished` admits it."""
        self._num_seen += 1
        sequence.order = self._num_seen
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Break a sequence off."""
        if sequence in self._running:
            self._leave(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def remove_all(self) -> list[Sequence]:
        """Break everything off; return it, the oldest first."""
        gone = sorted((*self._running, *self._waiting), key=lambda sequence: sequence.order)
        for sequence in gone:
            self.remove(sequence)
        return gone

    def produced(self, sequence: Sequence) -> float:
        """Return the tokens that a sequence has by now."""
        if sequence.entered_at == NEVER:
            return sequence.produced
        return min(sequence.wanted, sequence.produced + self._steps - sequence.entered_at)

    # -- updates of the weights

    def pause(self, *, retract: bool) -> None:
        """Stop between two tokens.

        Args:
            retract: whether the cache of running sequences is dropped, so that it is computed anew.
        """
        self.is_paused = True
        if retract:
            for sequence in sorted(self._running, key=lambda sequence: -sequence.order):
                self._leave(sequence)
                sequence.num_retractions += 1
                self._waiting.appendleft(sequence)
            self._debt = 0.0
            self._cached.clear()

    def resume(self) -> None:
        """Go on; `take_finished` admits what waits."""
        self.is_paused = False

    def flush(self) -> bool:
        """Forget all prompts, and return True; False if running sequences hold the cache."""
        if self._running:
            return False
        self._cached.clear()
        return True

    def set_label(self, label: str) -> None:
        """Sample with other weights from now on."""
        for sequence in (*self._running, *self._waiting):
            if (produced := self.produced(sequence)) > 0:
                sequence.spans.append((self.label, produced))
        self.label = label
        self._cached.clear()

    # -- inside

    def _leave(self, sequence: Sequence) -> None:
        produced = self.produced(sequence)
        self._base -= sequence.prompt_tokens + sequence.produced - sequence.entered_at
        self._running.remove(sequence)
        sequence.produced, sequence.entered_at, sequence.entry = produced, NEVER, 0
        if not self._running:
            self._base = self._debt = 0.0

    def _admit(self) -> None:
        model = self._model
        while self._waiting and not self.is_paused and len(self._running) < model.max_running:
            sequence = self._waiting[0]
            size = sequence.prompt_tokens + sequence.produced
            kept_free = self._headroom * (len(self._running) + 1)
            if self._running and self.num_used_tokens + size + kept_free > model.kv_tokens:
                return
            self._waiting.popleft()
            is_cached = sequence.prefix in self._cached
            self._cached.add(sequence.prefix)
            sequence.entered_at = self._steps
            self._running.add(sequence)
            self._base += size - self._steps
            left = sequence.wanted - sequence.produced
            self._num_entries += 1
            sequence.entry = self._num_entries
            heapq.heappush(self._ends, (self._steps + left, sequence.entry, sequence))
            new = sequence.produced if is_cached else size
            self._debt += new / model.prefill_tokens_per_second

    def _forget_gone(self) -> None:
        while self._ends and self._ends[0][2].entry != self._ends[0][1]:
            heapq.heappop(self._ends)
