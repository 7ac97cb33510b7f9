"""How a staged policy travels from the trainer to a receiver: in checked chunks, each whole or as a delta.

The receiver connects, and both sides prove that they know the attempt's secret before anything else is
said. A policy is one safetensors file. Each chunk of it carries a digest, keyed with the secret, of what
the file must hold there afterwards: it tells a damaged chunk, a delta that met another base, and a chunk
from somebody else alike.
"""

import hashlib
import hmac
import json
import socket
import struct
from collections.abc import Callable, Iterable
from typing import Any, Self, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from asyncrl_runtime.contract.messages import BucketLayout, Message, PolicyVersion, decode, encode

CHUNK_BYTES = 8 * 2**20
MAX_HEADER_BYTES = 4 * 2**20
"""A message is smaller; the largest holds the model's config.json."""
NONCE_BYTES = 32
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Bytes = NDArray[np.uint8]
M = TypeVar("M", bound=Message)


class StagingFailed(Exception):
    """The policy has not come whole: the other side is not who it should be, went away, or sent nonsense."""


class ReceiverHello(Message, frozen=True, kw_only=True, tag="stagehello.v1"):
    """A receiver's first word."""

    nonce: bytes
    version: PolicyVersion
    """The version that it was told to fetch."""


class SenderProof(Message, frozen=True, kw_only=True, tag="stageproof.v1"):
    """The trainer's proof that it knows the secret."""

    nonce: bytes
    proof: bytes


class ReceiverBase(Message, frozen=True, kw_only=True, tag="stagebase.v1"):
    """The receiver's proof, and the version that it has whole; None: none."""

    proof: bytes
    base: PolicyVersion | None


class StagedPolicy(Message, frozen=True, kw_only=True, tag="stagedpolicy.v1"):
    """What follows: chunks that cover the file from its first byte to its last."""

    version: PolicyVersion
    num_bytes: int
    config: str
    """The text of the model's config.json."""
    base: PolicyVersion | None = None
    """The version that the deltas among the chunks are for; None: all are whole."""


class StagedChunk(Message, frozen=True, kw_only=True, tag="stagedchunk.v1"):
    """A part of the file. Its payload holds the bytes themselves, or what has changed since the base.

    A delta is the gaps between the places of the words that have changed, then the words.
    """

    offset: int
    num_bytes: int
    digest: bytes
    """See `digest_of`."""
    num_changed: int = -1
    """The number of changed words of a delta; -1: the payload is the part as a whole."""
    gap_bytes: int = 4
    word_bytes: int = 4


def prove(secret: bytes, who: str, nonce: bytes, other_nonce: bytes) -> bytes:
    """Return the proof of `who`, who was given `nonce` and gave `other_nonce`, that it knows the secret."""
    return hmac.digest(secret, b"|".join([who.encode(), nonce, other_nonce]), "sha256")


def is_proof(proof: bytes, secret: bytes, who: str, nonce: bytes, other_nonce: bytes) -> bool:
    return hmac.compare_digest(proof, prove(secret, who, nonce, other_nonce))


def digest_of(secret: bytes, version: PolicyVersion, offset: int, content: Bytes) -> bytes:
    """Return the keyed digest of what a version's file holds from `offset` on."""
    made = hmac.new(secret, f"{version}|{offset}|{len(content)}|".encode(), hashlib.sha256)
    made.update(content.data)
    return made.digest()


def safetensors_head(layout: Iterable[BucketLayout]) -> bytes:
    """Return what precedes the weights in a safetensors file that holds them in the order of the buckets."""
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for bucket in layout:
        for name, dtype, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
            start, end = end, end + ITEM_BYTES[dtype] * int(np.prod(shape, dtype=np.int64))
            head[name] = {
                "dtype": SAFETENSORS_DTYPES[dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def encode_delta(before: Bytes, after: Bytes, word_bytes: int) -> tuple[bytes, int, int] | None:
    """Return a delta's payload, its number of changed words, the bytes of a gap; None if it saves nothing.

    Args:
        before, after: [bytes] a whole number of words.
    """
    words = np.dtype(f"<u{word_bytes}")
    new = after.view(words)
    places = np.flatnonzero(before.view(words) != new)
    gaps = np.diff(places, prepend=0)
    gap_bytes = 2 if not len(gaps) or gaps.max() < 2**16 else 4
    if len(places) * (gap_bytes + word_bytes) >= after.nbytes:
        return None
    payload = gaps.astype(f"<u{gap_bytes}").tobytes() + new[places].tobytes()
    return payload, len(places), gap_bytes


def apply_chunk(chunk: StagedChunk, payload: Bytes, part: Bytes) -> None:
    """Make `part`, which holds the chunk's part of the base, that of the new version.

    Raises:
        ValueError: the payload is not what the chunk says.
    """
    if chunk.num_changed < 0:
        if len(payload) != len(part):
            raise ValueError(f"chunk at {chunk.offset}: {len(payload)} bytes for {len(part)}")
        part[:] = payload
        return
    if chunk.gap_bytes not in (2, 4) or chunk.word_bytes not in (1, 2, 4) or len(part) % chunk.word_bytes:
        raise ValueError(f"chunk at {chunk.offset}: gaps of {chunk.gap_bytes}, words of {chunk.word_bytes}")
    middle = chunk.num_changed * chunk.gap_bytes
    if len(payload) != middle + chunk.num_changed * chunk.word_bytes:
        raise ValueError(f"chunk at {chunk.offset}: {len(payload)} bytes for {chunk.num_changed} changes")
    words = part.view(f"<u{chunk.word_bytes}")
    places = np.cumsum(payload[:middle].view(f"<u{chunk.gap_bytes}"), dtype=np.int64)
    if len(places) and places[-1] >= len(words):
        raise ValueError(f"chunk at {chunk.offset}: a change beyond its end")
    words[places] = np.frombuffer(payload[middle:].tobytes(), dtype=words.dtype)


class FramedSocket:
    """A connection on which messages pass, each with a payload; belongs to one thread.

    Args:
        deadline: by `clock`, when everything must have come.

    Every method raises StagingFailed if the other side goes away, is too slow, or sends nonsense.
    """

    def __init__(self, connected: socket.socket, deadline: float, clock: Callable[[], float]) -> None:
        self._socket = connected
        self._clock = clock
        self.deadline = deadline

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, message: Message, payload: bytes | memoryview = b"") -> None:
        head = encode(message)
        try:
            self._socket.settimeout(self._left())
            self._socket.sendall(struct.pack(">II", len(head), len(payload)) + head)
            if len(payload):
                self._socket.sendall(payload)
        except OSError as error:
            raise StagingFailed(f"{type(error).__name__}: {error}") from error

    def receive(self, kind: type[M], max_payload: int = 0) -> tuple[M, Bytes]:
        head_bytes, payload_bytes = struct.unpack(">II", self._exactly(8).tobytes())
        if head_bytes > MAX_HEADER_BYTES or payload_bytes > max_payload:
            raise StagingFailed(f"a message of {head_bytes} + {payload_bytes} bytes is none of ours")
        head = self._exactly(head_bytes).tobytes()
        try:
            return decode(head, kind), self._exactly(payload_bytes)
        except ValueError as error:
            raise StagingFailed(str(error)) from error

    def _exactly(self, num_bytes: int) -> Bytes:
        content = np.empty(num_bytes, dtype=np.uint8)
        view, got = content.data, 0
        try:
            while got < num_bytes:
                self._socket.settimeout(self._left())
                count = self._socket.recv_into(view[got:])
                if not count:
                    raise StagingFailed("the other side has closed the connection")
                got += count
        except OSError as error:
            raise StagingFailed(f"{type(error).__name__}: {error}") from error
        return content

    def _left(self) -> float:
        if (left := self.deadline - self._clock()) <= 0:
            raise StagingFailed("the deadline has passed")
        return left


class FetchStage(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker asks its receiver for, as JSON."""

    host: str
    port: int
    secret: bytes
    version: PolicyVersion
    timeout_seconds: float


class FetchedStage(msgspec.Struct, frozen=True, kw_only=True):
    """What the receiver answers: the policy is whole, in this folder."""

    folder: str
    num_bytes: int
    """What came over the network."""
    is_whole: bool
    """Whether it came as a whole, not as a delta."""
