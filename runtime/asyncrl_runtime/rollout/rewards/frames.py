"""The messages between the worker and a reward process: msgpack frames over a socket pair.

The worker sends `Setup`, then lists of `ScoreRequest`. The process answers `Ready` or `Refused`, then
`Scored` or `Failed` for each request of a list, in its order. A frame is the length in 4 bytes, then the
message.
"""

import asyncio
from typing import Any, BinaryIO, TypeVar

import msgspec

from asyncrl_runtime.contract.numbers import is_usable

M = TypeVar("M")

MAX_FRAME_BYTES = 64 * 2**20
"""More than any answer of ours has: the feedback of a reward is text for the policy."""


class ScoreRequest(msgspec.Struct, frozen=True, array_like=True):
    """A response that must be scored: the arguments of `asyncrl_api.protocols.Reward`."""

    prompt: str
    response: str
    row: dict[str, Any]


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """The reward that a process holds: fields of `spec.reward`, and where to import the user's code from."""

    type: str
    function: str
    answer_field: str
    timeout_seconds: float
    import_paths: list[str]


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The reward is loaded and warm."""

    note: str = ""
    """A note for the log: the protections that are in force."""
    is_worker_exposed: bool = False
    """Whether untrusted programs run as the worker's own user, so that the worker must hide its memory."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The reward cannot be loaded."""

    message: str


class Scored(msgspec.Struct, frozen=True, array_like=True, tag="scored"):
    reward: float
    feedback: str

    def __post_init__(self) -> None:
        if not is_usable(self.reward):
            raise ValueError(f"the reward is {self.reward}; it must be a finite number within float32")


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """The reward raised, or did not return a finite number within float32."""

    message: str


_encoder = msgspec.msgpack.Encoder()


def pack(message: object) -> bytes:
    """Return the frame of `message`."""
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "little") + body


async def receive(reader: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[M]) -> M:
    """Return the next message.

    Raises:
        EOFError: the other side is gone.
        msgspec.DecodeError: something else wrote to the socket.
    """
    length = int.from_bytes(await reader.readexactly(4), "little")
    if length > MAX_FRAME_BYTES:
        raise msgspec.DecodeError(f"a frame of {length} bytes; at most {MAX_FRAME_BYTES}")
    try:
        return decoder.decode(await reader.readexactly(length))
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from error


def read(stream: BinaryIO, decoder: msgspec.msgpack.Decoder[M]) -> M | None:
    """Wait for the next message and return it; None if the worker is gone."""
    length = int.from_bytes(stream.read(4), "little")
    body = stream.read(length)
    return decoder.decode(body) if body else None
