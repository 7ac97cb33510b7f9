"""The policy as the receivers' file holds it, and what has changed in it since the version before."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np

from asyncrl_runtime.contract.messages import BucketLayout, PolicyVersion
from asyncrl_runtime.contract.staging import (
    CHUNK_BYTES,
    ITEM_BYTES,
    Bytes,
    StagedChunk,
    StagedPolicy,
    digest_of,
    encode_delta,
    safetensors_head,
)
from asyncrl_runtime.weights.bucket import PublishedWeights

MAX_DELTAS = 32
"""The deltas after which a version is sent as a whole: what went wrong unnoticed does not last."""


@dataclass(frozen=True)
class _StagePart:
    """A part of the file, in both forms."""

    whole: StagedChunk
    delta: StagedChunk | None
    """None if the part is sent as a whole in any case."""
    payload: bytes


@dataclass(frozen=True)
class Stage:
    """One version, as it is handed to receivers. Its bytes are the image's, which the next one replaces."""

    policy: StagedPolicy
    parts: tuple[_StagePart, ...]
    content: Bytes

    def policy_for(self, base: PolicyVersion | None) -> StagedPolicy:
        """Return what is sent to a receiver that has `base`."""
        return self.policy if base == self.policy.base else msgspec.structs.replace(self.policy, base=None)

    def chunks(self, base: PolicyVersion | None) -> Iterator[tuple[StagedChunk, bytes | memoryview]]:
        """Yield the chunks, with their payloads, for a receiver that has `base`; None: for anybody."""
        for part in self.parts:
            if base is not None and part.delta is not None:
                yield part.delta, part.payload
            else:
                end = part.whole.offset + part.whole.num_bytes
                yield part.whole, self.content[part.whole.offset : end].data


class StageImage:
    """Memory of the size of the policy, in which one version replaces the other.

    Args:
        config: the text of the model's config.json.
        secret: that of the attempt.
    """

    def __init__(self, layout: tuple[BucketLayout, ...], config: str, secret: bytes) -> None:
        self._secret = secret
        self._config = config
        head = np.frombuffer(safetensors_head(layout), dtype=np.uint8)
        sizes = [_bytes_of(bucket) for bucket in layout]
        self._starts = [len(head) + sum(sizes[:number]) for number in range(len(sizes))]
        self._head = head
        self._word_bytes = min(ITEM_BYTES[dtype] for bucket in layout for dtype in bucket.dtypes)
        self._content = np.zeros(len(head) + sum(sizes), dtype=np.uint8)
        self._stage: Stage | None = None
        self._num_deltas = 0

    async def advance(self, version: PolicyVersion, weights: PublishedWeights) -> Stage:
        """Return the weights as they are now, as `version`; they are read only if they are not here yet."""
        if self._stage is not None and self._stage.policy.version == version:
            return self._stage
        before, self._stage = self._stage, None  # if this is broken off, the image is of no version
        has_delta = before is not None and self._num_deltas < MAX_DELTAS
        parts = await asyncio.to_thread(self._take, version, self._head, 0, has_delta)
        for layout, start in zip(weights.layout, self._starts, strict=True):
            bucket = (await weights.gather(layout.names)).cpu().numpy()
            parts += await asyncio.to_thread(self._take, version, bucket, start, has_delta)
        self._num_deltas = self._num_deltas + 1 if has_delta else 0
        base = before.policy.version if before is not None and has_delta else None
        policy = StagedPolicy(version=version, num_bytes=len(self._content), config=self._config, base=base)
        self._stage = Stage(policy, tuple(parts), self._content)
        return self._stage

    def _take(self, version: PolicyVersion, content: Bytes, start: int, has_delta: bool) -> list[_StagePart]:
        """Put `content` into the image from `start` on; return its parts."""
        parts = []
        for at in range(0, len(content), CHUNK_BYTES):
            new = content[at : at + CHUNK_BYTES]
            old = self._content[start + at : start + at + len(new)]
            digest = digest_of(self._secret, version, start + at, new)
            whole = StagedChunk(offset=start + at, num_bytes=len(new), digest=digest)
            delta = encode_delta(old, new, self._word_bytes) if has_delta else None
            old[:] = new
            if delta is None:
                parts.append(_StagePart(whole, None, b""))
                continue
            payload, num_changed, gap_bytes = delta
            short = StagedChunk(
                offset=whole.offset,
                num_bytes=whole.num_bytes,
                digest=digest,
                num_changed=num_changed,
                gap_bytes=gap_bytes,
                word_bytes=self._word_bytes,
            )
            parts.append(_StagePart(whole, short, payload))
        return parts


def _bytes_of(bucket: BucketLayout) -> int:
    pairs = zip(bucket.dtypes, bucket.shapes, strict=True)
    return sum(ITEM_BYTES[dtype] * int(np.prod(shape, dtype=np.int64)) for dtype, shape in pairs)
