"""The requests that one `/generate` is turned into: one prompt and its response each."""

import time
import uuid
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncrl_runtime.engine.fields import (
    BadRequest,
    GenerateBody,
    SamplingParams,
    parse_body,
    parse_sampling,
)
from asyncrl_runtime.engine.lora import LoadedAdapter
from asyncrl_runtime.engine.model import CausalModel


@dataclass(eq=False, slots=True, kw_only=True)
class Request:
    """One prompt and its response as it grows. Belongs to the scheduler's thread until it has finished."""

    rid: str
    prompt: NDArray[np.int64]
    params: SamplingParams
    max_new_tokens: int
    """The number of `params.max_new_tokens` that the limits leave."""
    return_logprob: bool = False
    logprob_start: int = -1
    """The first prompt position whose log-prob is returned; -1 for none."""
    return_prompt_ids: bool = False
    salt: str = ""
    """The client's own salt; prompts are kept apart in the cache by `cache_salt`."""
    lora_path: str | None = None
    """The name of an adapter; None for the base model alone."""
    adapter: LoadedAdapter | None = None
    """The adapter of that name, set before the scheduler gets the request."""
    stream: bool = False
    received: float = field(default_factory=time.time)

    output_ids: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """The tokens that were sampled until the request last left the batch."""
    output_logprobs: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    input_logprobs: NDArray[np.float32] | None = None
    """[prompt - logprob_start - 1], the log-probs of the prompt's tokens after the first one returned."""
    spans: list[tuple[str, int, int]] = field(default_factory=list)
    """The weight version, first and last (exclusive) output token of each span that is closed."""
    finish_reason: dict[str, Any] | None = None
    weight_version: str = ""
    """The weight version of the last token; set at the end."""
    cached_tokens: int = 0
    num_retractions: int = 0
    started: float = 0.0
    """When the request first entered the batch; 0 before that."""
    prefilled: float = 0.0
    """When the request got its first token."""
    finished: float = 0.0

    @property
    def lacks_input_logprobs(self) -> bool:
        """Whether log-probs of the prompt are wanted and not there yet."""
        return self.logprob_start >= 0 and self.input_logprobs is None

    @property
    def cache_salt(self) -> str:
        """The salt of the prefix cache: requests with an equal one may share keys and values of prompts."""
        return self.salt if self.adapter is None else f"{self.adapter.uid}/{self.salt}"

    @property
    def is_watched(self) -> bool:
        """Whether the request streams or has stop strings, so that each of its tokens is looked at."""
        return self.stream or bool(self.params.stop)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """The tokens of prompt and output."""
        return np.concatenate([self.prompt, self.output_ids]) if len(self.output_ids) else self.prompt

    def close_span(self, version: str, num_output: int) -> None:
        """Attribute to `version` the output tokens up to `num_output` that no span covers yet."""
        start = self.spans[-1][2] if self.spans else 0
        if num_output > start:
            if self.spans and self.spans[-1][0] == version:
                start = self.spans.pop()[1]
            self.spans.append((version, start, num_output))


class Call(NamedTuple):
    """The requests of one call of `/generate`."""

    requests: list[Request]
    is_single: bool
    """Whether the answer is one object rather than a list."""
    stream: bool


class RequestParser:
    """Turns bodies into requests that the scheduler can take as they are."""

    def __init__(self, model: CausalModel, context_length: int, max_total_tokens: int) -> None:
        self._model = model
        self._context_length = context_length
        self._max_total_tokens = max_total_tokens

    def parse(self, data: bytes) -> Call:
        """Return the requests of a body.

        Raises:
            BadRequest: SGLang would not accept the body, or it asks for something that this engine lacks.
        """
        body = parse_body(data)
        prompts, is_single = self._prompts(body)
        params = [
            parse_sampling(p) for p in _per_prompt(body.sampling_params, len(prompts), "sampling_params")
        ]
        n = params[0].n
        if any(p.n != n for p in params):
            raise BadRequest("The parallel_sample_num should be the same for all samples in sample params.")
        count = len(prompts)
        columns = zip(
            prompts,
            params,
            _per_prompt(body.return_logprob, count, "return_logprob"),
            _per_prompt(body.logprob_start_len, count, "logprob_start_len"),
            _per_prompt(body.cache_salt, count, "cache_salt"),
            _per_prompt(body.extra_key, count, "extra_key"),
            _per_prompt(body.lora_path or None, count, "lora_path"),
            strict=True,
        )
        rids = iter(_rids(body.rid, count, n, is_single))
        requests = [
            Request(
                rid=next(rids),
                prompt=prompt,
                params=sampling,
                max_new_tokens=self._fit(len(prompt), sampling),
                return_logprob=return_logprob,
                logprob_start=_check_start(start, len(prompt)) if return_logprob else -1,
                return_prompt_ids=body.return_prompt_token_ids,
                salt=f"{len(salt)}:{salt}{extra}",
                lora_path=lora_path,
                stream=body.stream,
            )
            for prompt, sampling, return_logprob, start, salt, extra, lora_path in columns
            for _ in range(n)
        ]
        return Call(requests, is_single and n == 1, body.stream)

    def _prompts(self, body: GenerateBody) -> tuple[list[NDArray[np.int64]], bool]:
        ids: Any = body.input_ids
        if body.text is not None:
            if not body.text:
                raise BadRequest("texts cannot be empty and tokenizer must be initialized")
            ids = self._model.tokenizer(body.text).input_ids
        elif ids is None:
            raise BadRequest("Either text, input_ids or input_embeds should be provided.")
        if not ids:
            raise BadRequest("input_ids cannot be empty.")
        is_single = isinstance(ids[0], int)
        prompts = [ids] if is_single else ids
        if not all(prompts) or any(isinstance(i, list) != (not is_single) for i in ids):
            raise BadRequest("input_ids should be a list of ids, or a list of lists that are not empty.")
        return [np.array(prompt, dtype=np.int64) for prompt in prompts], is_single

    def _fit(self, num_input: int, params: SamplingParams) -> int:
        """Return how many tokens may be sampled after a prompt, within the token budget."""
        if num_input >= self._context_length:
            raise BadRequest(
                f"The input ({num_input} tokens) is longer than the model's context length "
                f"({self._context_length} tokens)."
            )
        total = num_input + (params.max_new_tokens or 0)
        if total > self._context_length:
            raise BadRequest(
                f"Requested token count exceeds the model's maximum context length of "
                f"{self._context_length} tokens. You requested a total of {total} tokens: {num_input} tokens "
                f"from the input messages and {params.max_new_tokens} tokens for the completion. Please "
                "reduce the number of tokens in the input messages or the completion to fit within the limit."
            )
        if num_input >= self._max_total_tokens:
            raise BadRequest(
                f"Input length ({num_input} tokens) exceeds the maximum allowed length "
                f"({self._max_total_tokens - 1} tokens). Use a shorter input or enable --allow-auto-truncate."
            )
        room = min(self._context_length, self._max_total_tokens) - num_input
        return min(params.num_wanted, room)


def _per_prompt(value: Any, count: int, name: str) -> list[Any]:
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise BadRequest(f"{name} has {len(value)} entries for {count} prompts")
    return value


def _rids(rid: str | list[str] | None, count: int, n: int, is_single: bool) -> list[str]:
    """Return one id per response; parallel samples get fresh ids, as in SGLang."""
    if rid is None or n > 1:
        return [uuid.uuid4().hex for _ in range(count * n)]
    if isinstance(rid, str):
        return [rid] if is_single else [f"{rid}_{i}" for i in range(count)]
    if len(rid) != count:
        raise BadRequest("The specified rids length mismatch with the batch_size for batch processing.")
    duplicates = sorted({r for r in rid if rid.count(r) > 1})
    if duplicates:
        raise BadRequest(f"Duplicate request IDs detected within the request: {duplicates}")
    return rid


def _check_start(start: int, num_input: int) -> int:
    if start < -1 or start >= num_input:
        raise BadRequest(f"logprob_start_len ({start}) is not within the {num_input} input tokens")
    return start
