"""The running rows: their state is kept in arrays, so that a step makes few calls at any batch size."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from asyncrl_runtime.engine.cache import KvCache
from asyncrl_runtime.engine.requests import Request
from asyncrl_runtime.engine.sampling import SamplingPlan, plan_sampling, sample

ROW = np.dtype(
    [
        (
            "length",
            np.int64,
        ),  # tokens of prompt and output; the keys of the last one are not in the cache yet
        ("prompt", np.int64),  # tokens of the prompt
        ("end", np.int64),  # length at which the response is cut off
        ("first_stop", np.int64),  # length from which it may stop by itself
        ("temperature", np.float32),
        ("top_p", np.float64),
        ("top_k", np.int64),
        ("seeded", np.bool_),
        ("seed", np.uint64),
    ],
    align=True,
)
NO_TOKEN = -1


class Newest(NamedTuple):
    """The last token of each of n rows."""

    token_ids: NDArray[np.int64]
    """[n] the tokens."""
    positions: NDArray[np.int64]
    """[n] the place of each token in its row."""


class RunningRows:
    """Rows 0..n-1, in no particular order; row i has slot i of the cache."""

    def __init__(self, cache: KvCache, max_rows: int, context_length: int, eos_ids: frozenset[int]) -> None:
        self.requests: list[Request] = []
        self.rows = np.zeros(max_rows, dtype=ROW)
        self.tokens = np.zeros((max_rows, context_length), dtype=np.int64)
        """The prompt and output tokens of each row."""
        self.logprobs = np.zeros((max_rows, context_length), dtype=np.float32)
        """The log-prob of each output token, at the same place as the token in `tokens`."""
        self.num_watched = 0
        """The number of rows that stream or have stop strings, which are looked at one by one."""
        self._cache = cache
        self._eos_ids = sorted(eos_ids)
        self._stops = np.full((max_rows, 1), NO_TOKEN, dtype=np.int64)
        self._plan: SamplingPlan | None = None

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def max_rows(self) -> int:
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all rows together."""
        return int(self.rows["length"][: len(self)].sum())

    def add(self, request: Request) -> int:
        """Give the request the next row, with its prompt and the tokens that it has already sampled."""
        index = len(self.requests)
        params, tokens = request.params, request.tokens
        num_prompt = len(request.prompt)
        row = self.rows[index]
        row["length"], row["prompt"] = len(tokens), num_prompt
        row["end"] = num_prompt + request.max_new_tokens
        row["first_stop"] = num_prompt + params.min_new_tokens
        row["temperature"] = 0.0 if params.is_greedy else params.temperature
        row["top_p"], row["top_k"] = params.top_p, max(params.top_k, 0)
        row["seeded"] = params.sampling_seed is not None
        row["seed"] = (params.sampling_seed or 0) % 2**64
        self.tokens[index, : len(tokens)] = tokens
        self.logprobs[index, num_prompt : len(tokens)] = request.output_logprobs
        self._set_stops(index, [] if params.ignore_eos else [*self._eos_ids, *params.stop_token_ids])
        self.requests.append(request)
        self.num_watched += request.is_watched
        self._plan = None
        return index

    def remove(self, index: int) -> Request:
        """Take a row out and save its output in the request; the last row moves into the gap."""
        request = self.requests[index]
        request.output_ids, request.output_logprobs = self.output(index)
        last = len(self.requests) - 1
        if index != last:
            length = int(self.rows["length"][last])
            self.rows[index] = self.rows[last]
            self.tokens[index, :length] = self.tokens[last, :length]
            self.logprobs[index, :length] = self.logprobs[last, :length]
            self._stops[index] = self._stops[last]
            self._cache.move(last, index, length)
            self.requests[index] = self.requests[last]
        self.requests.pop()
        self.num_watched -= request.is_watched
        self._plan = None
        return request

    def output(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return copies of a row's output tokens and their log-probs.

        A request for no tokens gets none, although one was sampled after its prompt.
        """
        row = self.rows[index]
        span = slice(int(row["prompt"]), int(min(row["length"], row["end"])))
        return self.tokens[index, span].copy(), self.logprobs[index, span].copy()

    def newest(self) -> Newest:
        last = self.rows["length"][: len(self)] - 1
        return Newest(self.tokens[np.arange(len(self)), last], last)

    def sample(self, logits: Tensor, rng: np.random.Generator) -> None:
        """Append a sampled token to every row; `logits` are [rows, vocabulary] float32."""
        rows = self.rows[: len(self)]
        lengths = rows["length"]
        early = np.flatnonzero(lengths < rows["first_stop"])
        if len(early):
            logits = self._without_stops(logits, early)
        if self._plan is None:
            self._plan = plan_sampling(
                rows["temperature"], rows["top_k"], rows["top_p"], rows["seeded"], rows["seed"]
            )
        tokens, logprobs = sample(logits, self._plan, lengths, rng)
        every = np.arange(len(self))
        self.tokens[every, lengths] = tokens
        self.logprobs[every, lengths] = logprobs
        lengths += 1

    def ended(self) -> list[int]:
        """Return the indices of the rows that end with their last token.

        They are long enough, or that token is a stop token, or its log-prob is not a number.
        """
        rows = self.rows[: len(self)]
        every, last = np.arange(len(self)), rows["length"] - 1
        stopped = (self._stops[: len(self)] == self.tokens[every, last, None]).any(axis=1)
        broken = np.isnan(self.logprobs[every, last])
        indices: list[int] = np.flatnonzero(stopped | broken | (rows["length"] >= rows["end"])).tolist()
        return indices

    def _without_stops(self, logits: Tensor, early: NDArray[np.int64]) -> Tensor:
        """Exclude stop tokens from the rows that have not reached their minimum length."""
        logits = logits.clone()
        for index in early:
            stop_ids = self.requests[index].params.stop_token_ids
            logits[index, [*self._eos_ids, *stop_ids]] = float("-inf")
        return logits

    def _set_stops(self, index: int, stops: list[int]) -> None:
        if len(stops) > self._stops.shape[1]:
            wider = np.full((len(self._stops), len(stops)), NO_TOKEN, dtype=np.int64)
            wider[:, : self._stops.shape[1]] = self._stops
            self._stops = wider
        self._stops[index] = NO_TOKEN
        self._stops[index, : len(stops)] = stops
