"""Mutates bytes: as bytes, and as what they are, JSON or msgpack, to get behind the form."""

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

DEEP = 3000
"""Lists in lists, more than any parser follows."""
ODD: Sequence[Callable[[random.Random], Any]] = (
    lambda rng: None,
    lambda rng: rng.choice([True, False]),
    lambda rng: rng.choice([0, -1, 1, 2**31, -(2**31), 2**32, 2**63 - 1, -(2**63), 10**9, 4097]),
    lambda rng: rng.choice([0.5, -0.0, 1e308, -1e30, float("inf"), float("nan"), 5e-324]),
    lambda rng: rng.choice(
        ["", "x", ".", "*", "a b", "1", "9" * 30, "soon", "\u2028", "\x00", "x" * 5000, "²"]
    ),
    lambda rng: rng.choice([b"", b"\x00", b"\xff" * 3, b"\x01" * 4, b"\x00" * 4096]),
    lambda rng: [],
    lambda rng: {},
    lambda rng: [1] * rng.choice([1, 2, 300]),
    lambda rng: {"x": [None, {"y": 1}]},
)


def mutated(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """Return one of the seeds, changed in one to three places."""
    data = rng.choice(seeds)
    for _ in range(rng.choice((1, 1, 2, 3))):
        match rng.randrange(5):
            case 0:
                data = _as_bytes(data, rng)
            case 1:
                data = _spliced(data, rng, rng.choice(seeds))
            case _:
                data = _as_value(data, rng)
    return data


def _as_value(data: bytes, rng: random.Random) -> bytes:
    """Change one value of JSON or msgpack, behind whatever comes before its last NUL."""
    head, separator, body = data.rpartition(b"\n\n")
    for decode, encode in _FORMS:
        try:
            value = decode(body)
        except (ValueError, RecursionError, UnicodeDecodeError):
            continue
        if not isinstance(value, dict | list):
            break
        _change(value, rng)
        try:
            return head + separator + encode(value)
        except (ValueError, TypeError, OverflowError, RecursionError):
            break
    return _as_bytes(data, rng)


def _to_json(value: Any) -> bytes:
    return json.dumps(value, default=lambda odd: odd.hex()).encode()


_FORMS: Sequence[tuple[Callable[[bytes], Any], Callable[[Any], bytes]]] = (
    (json.loads, _to_json),
    (msgspec.msgpack.decode, msgspec.msgpack.encode),
)


def _change(value: Any, rng: random.Random) -> None:
    """Replace, remove, double or deepen a value somewhere below."""
    holder = value
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return
        key = rng.choice(keys)
        below = holder[key]
        if not isinstance(below, dict | list) or not below or rng.random() < 0.3:
            break
        holder = below
    match rng.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, list):
            holder.insert(key, below)
        case 2 if isinstance(below, int) and not isinstance(below, bool):
            holder[key] = below + rng.choice([-1, 1, 10**6, -(10**6)])
        case 3 if isinstance(below, bytes | str) and below:
            holder[key] = below[: rng.randrange(len(below))]
        case _:
            holder[key] = rng.choice(ODD)(rng)


def _as_bytes(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    match rng.randrange(6):
        case 0:
            return data[:place]
        case 1:
            return data[:place] + rng.randbytes(rng.choice((1, 2, 8))) + data[place:]
        case 2:
            return data[:place] + data[place + rng.choice((1, 4, 16)) :]
        case 3 if data and place < len(data):
            return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
        case 4:
            return data[:place] + rng.choice((b"\x91", b"[", b'{"a":')) * DEEP + data[place:]
        case _:
            return data[:place] + data[place:] * 2


def _spliced(data: bytes, rng: random.Random, other: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]
