"""The two ends of a transfer of staged weights, as a peer with any bytes finds them."""

import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np

from asyncrl_runtime.contract.messages import Message, PolicyVersion, encode
from asyncrl_runtime.contract.staging import (
    FramedSocket,
    ReceiverBase,
    ReceiverHello,
    SenderProof,
    StagedChunk,
    StagedPolicy,
    StagingFailed,
    digest_of,
)
from asyncrl_runtime.receiver.staged_file import StagedFile
from support.fuzz.target import Target

V = PolicyVersion(1, 0)
SECRET = b"s"
CONTENT = np.arange(16, dtype=np.uint8)
DIGEST = digest_of(SECRET, V, 0, CONTENT)


def staging_targets(folder: Path) -> list[Target]:
    greetings: dict[type[Message], Message] = {
        ReceiverHello: ReceiverHello(nonce=b"n" * 32, version=V),
        SenderProof: SenderProof(nonce=b"n" * 32, proof=b"p" * 32),
        ReceiverBase: ReceiverBase(proof=b"p" * 32, base=None),
        StagedPolicy: StagedPolicy(version=V, num_bytes=16, config="{}"),
    }
    framed = [
        Target(f"staging-{kind.__name__.lower()}", [_frame(message)], _receive(kind), (StagingFailed,))
        for kind, message in greetings.items()
    ]
    whole = _frame(StagedChunk(offset=0, num_bytes=16, digest=DIGEST), CONTENT.tobytes())
    delta = StagedChunk(offset=0, num_bytes=16, digest=DIGEST, num_changed=1, gap_bytes=2, word_bytes=2)
    chunks = [whole, _frame(delta, b"\x00\x00\x00\x01")]
    return [*framed, Target("staging-chunk", chunks, _chunks(folder), (StagingFailed,))]


def _frame(message: Message, payload: bytes = b"") -> bytes:
    head = encode(message)
    return len(head).to_bytes(4, "big") + len(payload).to_bytes(4, "big") + head + payload


def _opened(case: bytes) -> FramedSocket:
    """Return the end of a connection at whose other end somebody has sent a case, and is gone."""
    here, there = socket.socketpair()
    with there:
        there.sendall(case[: 2**16])
    return FramedSocket(here, 9.0, lambda: 0.0)


def _receive(kind: type[Message]) -> Callable[[bytes], None]:
    def run(case: bytes) -> None:
        with _opened(case) as frames:
            frames.receive(kind)

    return run


def _chunks(folder: Path) -> Callable[[bytes], None]:
    """Take a chunk as a receiver does: what is in the file afterwards is right, or it is of no version."""
    file = StagedFile(folder / "staging")

    def run(case: bytes) -> None:
        file.begin(StagedPolicy(version=V, num_bytes=16, config="{}"))
        with _opened(case) as frames:
            chunk, payload = frames.receive(StagedChunk, 1024)
        file.take(chunk, payload, SECRET)
        if file.is_whole:
            file.finish(SECRET)
            assert np.array_equal(file._content, CONTENT)

    return run
