"""Runs one forward at a time: every running row gets the logits of its next token, and new prompts join in.

Prompts are part of the decode steps' forwards, packed without padding. Small batches are bound by reading
the weights, so a prompt costs little more than its own arithmetic.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncrl_runtime.engine.batch import RunningRows
from asyncrl_runtime.engine.cache import KvCache, PrefixCache
from asyncrl_runtime.engine.lora import LoadedAdapter, split
from asyncrl_runtime.engine.model import CausalModel
from asyncrl_runtime.engine.requests import Request
from asyncrl_runtime.engine.slot_attention import Segment, Window

SCORED_POSITIONS = 256
"""The prompt positions whose log-probs are computed at a time, so that their logits fit in memory."""


class _Prompt(NamedTuple):
    """A sequence that must be brought into the cache, and the requests that begin with it."""

    tokens: NDArray[np.int64]
    start: int
    """The number of tokens whose keys and values are known, never the last one, whose logits are needed."""
    kv: Tensor | None
    """The known keys and values, [layers, 2, at least `start` tokens, heads, head size]."""
    requests: list[Request]

    @property
    def adapter(self) -> LoadedAdapter | None:
        """The adapter, which is the same for all of its requests."""
        return self.requests[0].adapter


class Runner:
    """Runs the model for the batch; equal prompts are computed once and their keys and values copied."""

    def __init__(self, model: CausalModel, cache: KvCache, prefixes: PrefixCache, batch: RunningRows) -> None:
        self._model = model
        self._cache = cache
        self._prefixes = prefixes
        self._batch = batch
        self.num_computed_tokens = 0
        """The prompt tokens that were computed since the start."""
        self.num_cached_tokens = 0

    def step(self, admitted: Sequence[Request]) -> Tensor:
        """Add `admitted` to the batch and return the next-token logits of all rows, in their order.

        Returns:
            [rows, vocabulary] float32.

        Raises:
            IndexError: a token id is outside the vocabulary.
        """
        decoding = self._batch.newest()
        adapters = self._adapters()
        num_decoding = len(decoding.positions)
        longest = int(decoding.positions.max(initial=-1)) + 1
        if not admitted:
            self._cache.reserve(num_decoding, longest, num_decoding, longest)
            window = Window(self._cache, torch.from_numpy(decoding.positions), ())
            shares = split(adapters)
            hidden = self._model.hidden(torch.from_numpy(decoding.token_ids), window, shares)
            return self._model.logits(hidden, shares)
        prompts = self._group(admitted)
        num_tokens = max(longest, *(len(p.tokens) for p in prompts))
        self._cache.reserve(num_decoding + len(admitted), num_tokens, num_decoding, longest)
        segments = [self._place(prompt) for prompt in prompts]
        token_ids = np.concatenate([decoding.token_ids, *(p.tokens[p.start :] for p in prompts)])
        window = Window(self._cache, torch.from_numpy(decoding.positions), segments)
        for prompt in prompts:
            adapters += [prompt.adapter] * (len(prompt.tokens) - prompt.start)
        hidden = self._model.hidden(torch.from_numpy(token_ids), window, split(adapters))
        self._score(prompts, hidden[num_decoding:])
        last = hidden[self._finish(prompts, segments, num_decoding)]
        return self._model.logits(last, split(self._adapters()))

    def _adapters(self) -> list[LoadedAdapter | None]:
        """Return the adapter of each row."""
        return [request.adapter for request in self._batch.requests]

    def _group(self, requests: Sequence[Request]) -> list[_Prompt]:
        """Merge equal prompts with equal salts and adapters, and look up what is known of each."""
        prompts: dict[tuple[str, bytes] | Request, _Prompt] = {}
        for request in requests:
            tokens = request.tokens
            if request.lacks_input_logprobs:  # they need the hidden states of the whole prompt
                prompts[request] = _Prompt(tokens, 0, None, [request])
                continue
            key = (request.cache_salt, tokens.tobytes())
            if key in prompts:
                prompts[key].requests.append(request)
                continue
            kv = self._prefixes.find(*key)
            start = 0 if kv is None else min(kv.shape[2], len(tokens) - 1)
            prompts[key] = _Prompt(tokens, start, kv, [request])
        return list(prompts.values())

    def _place(self, prompt: _Prompt) -> Segment:
        """Give the prompt the next row, with what is known of it."""
        row = self._batch.add(prompt.requests[0])
        if prompt.kv is not None:
            self._cache.import_row(row, prompt.kv, prompt.start)
        return Segment(row, prompt.start, len(prompt.tokens))

    def _score(self, prompts: Sequence[_Prompt], hidden: Tensor) -> None:
        """Set `input_logprobs` where wanted: from the raw logits, for the tokens after `logprob_start`."""
        end = 0
        for prompt in prompts:
            start, end = end, end + len(prompt.tokens) - prompt.start
            request = prompt.requests[0]
            if not request.lacks_input_logprobs:
                continue
            scores = np.empty(len(request.prompt) - request.logprob_start - 1, dtype=np.float32)
            for i in range(0, len(scores), SCORED_POSITIONS):
                first = request.logprob_start + i
                targets = torch.from_numpy(request.prompt[first + 1 : first + 1 + SCORED_POSITIONS])
                states = hidden[start + first : start + first + len(targets)]
                logprobs = self._model.logits(states, split([request.adapter])).log_softmax(dim=-1)
                scores[i : i + len(targets)] = logprobs.gather(1, targets[:, None])[:, 0].numpy()
            request.input_logprobs = scores

    def _finish(self, prompts: Sequence[_Prompt], segments: Sequence[Segment], num_decoding: int) -> Tensor:
        """Remember and copy what was computed; return the token, by index, that each row's logits follow."""
        wanted = list(range(num_decoding))
        copies: list[int] = []
        end = num_decoding
        for prompt, segment in zip(prompts, segments, strict=True):
            end += segment.end - segment.start
            wanted.append(end - 1)
            self._account(prompt)
            self._remember(prompt, segment)
            for request in prompt.requests[1:]:
                self._cache.move(segment.row, self._batch.add(request), segment.end)
                copies.append(end - 1)
        return torch.tensor(wanted + copies)

    def _account(self, prompt: _Prompt) -> None:
        num_tokens = len(prompt.tokens)
        for index, request in enumerate(prompt.requests):
            num_cached = num_tokens - 1 if index else prompt.start  # the last token always counts as computed
            self.num_cached_tokens += num_cached
            self.num_computed_tokens += num_tokens - num_cached
            if request.started == 0.0:  # not if it comes back from a retraction
                request.cached_tokens = num_cached

    def _remember(self, prompt: _Prompt, segment: Segment) -> None:
        request = prompt.requests[0]
        is_known = prompt.kv is not None and prompt.kv.shape[2] == segment.end
        if not is_known and len(request.output_ids) == 0 and segment.end <= self._prefixes.max_tokens:
            kv = self._cache.export_row(segment.row, segment.end)
            self._prefixes.put(request.cache_salt, prompt.tokens.tobytes(), kv)
