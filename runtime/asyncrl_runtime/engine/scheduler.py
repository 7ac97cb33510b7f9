"""The scheduler: one thread that owns the model and admits, decodes, pauses and retracts requests."""

import queue
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from asyncrl_runtime.engine.batch import RunningRows
from asyncrl_runtime.engine.cache import PrefixCache
from asyncrl_runtime.engine.fields import BadRequest
from asyncrl_runtime.engine.model import CausalModel
from asyncrl_runtime.engine.requests import Request
from asyncrl_runtime.engine.runner import Runner

T = TypeVar("T")

HEADROOM_TOKENS = 16
"""Free budget per row at admission, so that a request is not retracted right after its prefill."""
MAX_STEP_TOKENS = 4096
"""Most new tokens admitted at once, so that running requests do not wait long; one request always may."""
THROUGHPUT_STEPS = 40
"""The number of decode steps over which the throughput is averaged, as in SGLang."""


class SchedulerLimits(NamedTuple):
    max_running_requests: int
    max_total_tokens: int
    """The budget of all running rows together."""
    context_length: int
    max_cached_tokens: int
    """The tokens of prompts that are kept for reuse, in addition to the budget."""
    stream_interval: int
    """Tokens between the chunks of a stream, unless the request says otherwise."""


class Progress(NamedTuple):
    """The tokens that a request has sampled so far."""

    request: Request
    """The request, which the scheduler's thread goes on changing until its last update is out."""
    output_ids: NDArray[np.int64]
    output_logprobs: NDArray[np.float32]
    is_last: bool


class Scheduler:
    """Runs commands in the order of their arrival and, between them, the model.

    `post` and `call` may be called from any thread; every other method belongs to the thread in `run`. That
    thread consumes commands and produces updates; it sleeps while there is nothing to run, and a command
    wakes it.
    """

    def __init__(
        self,
        model: CausalModel,
        limits: SchedulerLimits,
        rng: np.random.Generator,
        deliver: Callable[[list[Progress]], None],
    ) -> None:
        """
        Args:
            rng: source of the noise for requests without a seed.
            deliver: called with a step's updates at its end, on this thread; must not block.
        """
        self.model = model
        self.limits = limits
        self.version = "default"
        """The label of the weights that sample now."""
        self.is_paused = False
        self.forward_sleep_seconds = 0.0
        """Time added to every forward, to try out a slow engine."""
        self.cache = model.new_cache()
        self.prefixes = PrefixCache(limits.max_cached_tokens)
        self.batch = RunningRows(
            self.cache, limits.max_running_requests, limits.context_length, model.eos_ids
        )
        self.waiting: deque[Request] = deque()
        self.runner = Runner(model, self.cache, self.prefixes, self.batch)
        self._rng = rng
        self._deliver = deliver
        self._updates: list[Progress] = []
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._is_stopped = False
        self.num_steps = 0
        self.num_sampled_tokens = 0
        self.num_finished = 0
        self.num_prompt_tokens = 0
        """Prompt tokens of finished requests; the next one counts their output tokens."""
        self.num_output_tokens = 0
        self.num_aborted = 0
        self.num_retracted = 0
        self.throughput = 0.0
        """Tokens per second over the last full window of decode steps."""
        self._window = (0, 0, 0.0)

    def post(self, command: Callable[[], None]) -> None:
        """Queue `command` to run between two steps. An exception in it ends the engine."""
        self._inbox.put(command)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Queue `function` to run between two steps; the future gets its result or its BadRequest."""
        future: Future[T] = Future()

        def command() -> None:
            try:
                future.set_result(function())
            except BadRequest as error:
                future.set_exception(error)

        self.post(command)
        return future

    def stop(self) -> None:
        self._is_stopped = True

    @torch.inference_mode()
    def run(self) -> None:
        """Work until `stop` runs as a command. If this raises, the engine is unusable."""
        while not self._is_stopped:
            self._run_commands()
            if not self.is_idle:
                self.step()
            self.publish()

    @property
    def is_idle(self) -> bool:
        return self.is_paused or not (self.waiting or self.batch.requests)

    def step(self) -> None:
        """Sample one more token for every row, and admit as many new requests as fit."""
        self._make_room()
        admitted = self._choose()
        now = time.time()
        logits = self.runner.step(admitted)
        for request in admitted:
            request.started = request.started or now
        if self.forward_sleep_seconds:
            time.sleep(self.forward_sleep_seconds)
        self.batch.sample(logits, self._rng)
        now = time.time()
        for request in admitted:
            request.prefilled = request.prefilled or now
        self.num_steps += 1
        self.num_sampled_tokens += len(self.batch)
        self._end_rows()
        self._measure()

    def publish(self) -> None:
        """Hand over the pending updates."""
        if self._updates:
            self._deliver(self._updates)
            self._updates = []

    def submit(self, requests: list[Request]) -> None:
        self.waiting.extend(requests)

    def abort(self, matches: Callable[[str], bool]) -> None:
        """End the requests whose id matches, with the tokens that they have."""
        queued, self.waiting = self.waiting, deque()
        for request in queued:
            if matches(request.rid):
                self._finish(request, _abort_reason("Abort in waiting queue"))
            else:
                self.waiting.append(request)
        for index in reversed(range(len(self.batch))):
            if matches(self.batch.requests[index].rid):
                self._finish(self.batch.remove(index), _abort_reason("Aborted"))

    def pause(self, *, retract: bool) -> None:
        """Stop sampling; running requests keep their rows, or go back to the queue without them."""
        self.is_paused = True
        if retract:
            order = sorted(range(len(self.batch)), key=lambda i: self.batch.requests[i].started)
            oldest_first = [self.batch.requests[i] for i in order]
            while len(self.batch):
                self.batch.remove(len(self.batch) - 1)
            for request in reversed(oldest_first):
                self._requeue(request)

    def resume(self) -> None:
        self.is_paused = False

    def flush_cache(self) -> bool:
        """Forget all prompts, unless something runs or waits to run; return whether that was done."""
        if len(self.batch) or (self.waiting and not self.is_paused):
            return False
        self.prefixes.clear()
        return True

    def set_version(self, version: str) -> None:
        """Label what is sampled from now on; what live requests have so far belongs to the previous label."""
        for index, request in enumerate(self.batch.requests):
            request.close_span(self.version, len(self.batch.output(index)[0]))
        for request in self.waiting:
            request.close_span(self.version, len(request.output_ids))
        self.version = version

    @property
    def num_used_tokens(self) -> int:
        return self.batch.num_tokens

    def _run_commands(self) -> None:
        if self.is_idle:
            self._inbox.get()()
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            command()

    def _choose(self) -> list[Request]:
        """Take requests off the queue for the free rows, as far as the token budget allows."""
        free_rows = self.batch.max_rows - len(self.batch)
        if not (free_rows and self.waiting):
            return []
        chosen: list[Request] = []
        budget = self.limits.max_total_tokens - self.batch.num_tokens - HEADROOM_TOKENS * len(self.batch)
        step_budget = MAX_STEP_TOKENS
        while self.waiting and len(chosen) < free_rows:
            request = self.waiting[0]
            wanted = len(request.prompt) + len(request.output_ids) + HEADROOM_TOKENS
            is_alone = not chosen and not len(self.batch)
            if (wanted > budget and not is_alone) or (wanted > step_budget and chosen):
                break
            budget -= wanted
            step_budget -= wanted
            chosen.append(self.waiting.popleft())
        return chosen

    def _make_room(self) -> None:
        """Retract the youngest requests until every row has room for its next token."""
        while self.batch.num_tokens + len(self.batch) > self.limits.max_total_tokens and len(self.batch) > 1:
            youngest = max(range(len(self.batch)), key=lambda i: (self.batch.requests[i].started, i))
            self._requeue(self.batch.remove(youngest))

    def _requeue(self, request: Request) -> None:
        """Put a request that has left the batch at the head of the queue; it prefills its tokens again."""
        request.num_retractions += 1
        self.num_retracted += 1
        self.waiting.appendleft(request)

    def _end_rows(self) -> None:
        """Take out the rows that have ended, and look at those that must be watched token by token."""
        for index in reversed(self.batch.ended()):
            reason = self._reason(index)
            self._finish(self.batch.remove(index), reason)
        if self.batch.num_watched:
            self._watch()

    def _reason(self, index: int) -> dict[str, Any]:
        """Return why a row has ended. As in SGLang, reaching the length counts before a stop token."""
        request = self.batch.requests[index]
        output_ids, logprobs = self.batch.output(index)
        if len(logprobs) and not np.isfinite(logprobs[-1]):
            return _abort_reason("The logits are not finite: the weights have diverged.", 500)
        if len(output_ids) >= request.max_new_tokens:
            return {"type": "length", "length": len(output_ids)}
        return {"type": "stop", "matched": int(output_ids[-1])}

    def _watch(self) -> None:
        """Do what cannot be done for all rows at once: look for stop strings, publish streams."""
        for index in reversed(range(len(self.batch))):
            request = self.batch.requests[index]
            params = request.params
            if not request.is_watched:
                continue
            output_ids, logprobs = self.batch.output(index)
            matched = params.stop and self._find_stop(request, output_ids)
            if matched:
                self._finish(self.batch.remove(index), {"type": "stop", "matched": matched})
            elif request.stream:
                interval = params.stream_interval or self.limits.stream_interval
                if len(output_ids) % interval == 0 or len(output_ids) == 1:
                    self._updates.append(Progress(request, output_ids, logprobs, is_last=False))

    def _find_stop(self, request: Request, output_ids: NDArray[np.int64]) -> str | None:
        """Return the stop string that the last token completed, if any."""
        strings = request.params.stop_strings
        # A token is at least one byte and a character at most four, so this tail holds the longest string.
        tail = output_ids[-4 * max(map(len, strings)) - 1 :].tolist()
        text = self.model.decode_text(tail, skip_special_tokens=False, spaces=True)
        return next((s for s in strings if s in text), None)

    def _finish(self, request: Request, reason: dict[str, Any]) -> None:
        """Close a request that has left the batch or the queue."""
        request.finish_reason = reason
        request.finished = time.time()
        request.weight_version = self.version
        request.close_span(self.version, len(request.output_ids))
        self.num_finished += 1
        self.num_prompt_tokens += len(request.prompt)
        self.num_output_tokens += len(request.output_ids)
        self.num_aborted += reason["type"] == "abort"
        self._updates.append(Progress(request, request.output_ids, request.output_logprobs, is_last=True))

    def _measure(self) -> None:
        start_step, start_tokens, start_time = self._window
        if self.num_steps - start_step >= THROUGHPUT_STEPS:
            now = time.perf_counter()
            self.throughput = (self.num_sampled_tokens - start_tokens) / (now - start_time)
            self._window = (self.num_steps, self.num_sampled_tokens, now)


def _abort_reason(message: str, status_code: int | None = None) -> dict[str, Any]:
    err_type = "InternalServerError" if status_code else None
    return {"type": "abort", "message": message, "status_code": status_code, "err_type": err_type}
