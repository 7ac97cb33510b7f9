"""An engine, some of whose answers hold log-probs that are no numbers."""

import itertools
from collections.abc import Callable
from typing import Any

PERIOD = 5
"""One in so many answers, or pieces of a streamed one, is spoiled."""
WORDS = (b"null", b"NaN")
"""What stands in their place: what engines in Python and in others make of a NaN."""
MARK = -0.123456789


def spoil_answers() -> None:
    """Spoil the first log-prob of every fifth answer of the engine that this process becomes."""
    from asyncrl_runtime.engine import generate_endpoint

    generate_endpoint._encode = _spoiling(generate_endpoint._encode)


def _spoiling(encode: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    count, words = itertools.count(1), itertools.cycle(WORDS)

    def spoil(body: Any) -> bytes:
        for answer in body if isinstance(body, list) else [body]:
            logprobs = answer.get("meta_info", {}).get("output_token_logprobs")
            if logprobs and next(count) % PERIOD == 0:
                logprobs[0] = (MARK, *logprobs[0][1:])
        return encode(body).replace(str(MARK).encode(), next(words))

    return spoil
