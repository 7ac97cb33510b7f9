"""The shapes of SGLang's answers to `/generate`."""

from collections.abc import Sequence
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asyncrl_runtime.engine.model import CausalModel
from asyncrl_runtime.engine.requests import Request
from asyncrl_runtime.engine.scheduler import Progress


def build_response(update: Progress, model: CausalModel, version: str, start: int = 0) -> dict[str, Any]:
    """Return the answer, or the chunk of a stream, for one request.

    Chunks are those of SGLang's `--incremental-streaming-output`: each holds only what is new, so that a long
    answer costs as much as its tokens. Counts and version spans are those of the whole answer. A character
    whose bytes come in two chunks is readable in neither text.

    Args:
        version: the server's label now, which a chunk before the last one carries.
        start: the number of tokens in earlier chunks.
    """
    request = update.request
    output_ids = update.output_ids[start:].tolist()
    meta: dict[str, Any] = {
        "id": request.rid,
        "finish_reason": request.finish_reason if update.is_last else None,
        "prompt_tokens": len(request.prompt),
        "weight_version": version,
        "num_retractions": request.num_retractions,
        "reasoning_tokens": 0,
        "completion_tokens": len(update.output_ids),
        "cached_tokens": request.cached_tokens,
        "cached_tokens_details": None,
        "dp_rank": None,
    }
    if request.return_logprob:
        meta["input_token_logprobs"] = _input_logprobs(request)
        meta["output_token_logprobs"] = _triples(update.output_logprobs[start:], output_ids)
        meta["output_token_logprobs_length"] = len(output_ids)
    if update.is_last:
        meta["weight_version"] = request.weight_version
        meta["weight_versions"] = [
            {"version": version, "start": start, "end": end} for version, start, end in request.spans
        ]
        meta.update(_times(request))
    response = {
        "text": _text(request, output_ids, meta["finish_reason"] or {}, model),
        "output_ids": output_ids,
        "meta_info": meta,
    }
    if request.return_prompt_ids:
        response["prompt_token_ids"] = request.prompt.tolist()
    return response


def _triples(logprobs: NDArray[np.float32], ids: Sequence[int]) -> list[tuple[float, int, None]]:
    return list(zip(logprobs.tolist(), ids, repeat(None)))


def _input_logprobs(request: Request) -> list[tuple[float | None, int, None]]:
    """Return log-probs of the prompt from `logprob_start`; the first is null: it needs the token before."""
    if request.input_logprobs is None:
        return []
    ids = request.prompt[request.logprob_start :].tolist()
    return [(None, ids[0], None), *_triples(request.input_logprobs, ids[1:])]


def _text(request: Request, output_ids: list[int], reason: dict[str, Any], model: CausalModel) -> str:
    """Return the decoded output, without the stop token or string that ended it."""
    params = request.params
    matched = None if params.no_stop_trim else reason.get("matched")
    if isinstance(matched, int):
        output_ids = output_ids[:-1]
    text = model.decode_text(
        output_ids,
        skip_special_tokens=params.skip_special_tokens,
        spaces=params.spaces_between_special_tokens,
    )
    return text[: text.find(matched)] if isinstance(matched, str) and matched in text else text


def _times(request: Request) -> dict[str, float]:
    """Return durations in seconds, and points in time in seconds since 1970."""
    decoding = request.finished - request.prefilled
    num_decoded = len(request.output_ids) - 1
    started = request.started or request.finished
    return {
        "e2e_latency": request.finished - request.received,
        "queue_time": started - request.received,
        "first_token_latency": (request.prefilled or request.finished) - request.received,
        "decode_throughput": num_decoded / decoding if num_decoded > 0 and decoding > 0 else 0.0,
        "request_received_ts": request.received,
        "forward_entry_time": started,
        "prefill_finished_time": request.prefilled,
        "request_finished_ts": request.finished,
    }
