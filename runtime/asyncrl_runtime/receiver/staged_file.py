"""One whole copy of the policy, in a folder from which an engine loads it."""

import os
from pathlib import Path

import numpy as np

from asyncrl_runtime.contract.messages import PolicyVersion
from asyncrl_runtime.contract.staging import (
    Bytes,
    StagedChunk,
    StagedPolicy,
    StagingFailed,
    apply_chunk,
    digest_of,
)

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class StagedFile:
    """The file, into which deltas are applied in place; what an earlier process left is dropped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.version: PolicyVersion | None = None
        """The version that is there whole; None while another one comes, or if one has not come whole."""
        self._secret = b""
        self._content: Bytes = np.empty(0, dtype=np.uint8)
        self._policy: StagedPolicy | None = None
        self._end = 0
        folder.mkdir(parents=True, exist_ok=True)
        self.drop()

    def drop(self) -> None:
        """Delete the files."""
        self.version = None
        self._content = np.empty(0, dtype=np.uint8)
        for name in (WEIGHTS, CONFIG):
            (self.folder / name).unlink(missing_ok=True)

    def begin(self, policy: StagedPolicy) -> None:
        """Get ready for the chunks of a version.

        Raises:
            StagingFailed: the folder has no room for it.
        """
        self.version, self._policy, self._end = None, policy, 0
        try:
            if len(self._content) != policy.num_bytes:
                self.drop()
                self._content = _allocate(self.folder / WEIGHTS, policy.num_bytes)
            (self.folder / CONFIG).write_text(policy.config)
        except OSError as error:
            self.drop()
            raise StagingFailed(
                f"{self.folder}: {error.strerror} for {policy.num_bytes} bytes of weights: raise "
                "spec.weightSync.stagingMegabytes, which is the size of the volume"
            ) from error

    def take(self, chunk: StagedChunk, payload: Bytes, secret: bytes) -> None:
        """Apply the next chunk.

        Raises:
            StagingFailed: it is not the next one, or does not make what it should.
        """
        assert self._policy is not None
        end = chunk.offset + chunk.num_bytes
        if chunk.offset != self._end or chunk.num_bytes <= 0 or end > len(self._content):
            raise StagingFailed(f"a chunk [{chunk.offset}, {end}) after {self._end} of {len(self._content)}")
        part = self._content[chunk.offset : end]
        try:
            apply_chunk(chunk, payload, part)
        except ValueError as error:
            raise StagingFailed(str(error)) from error
        if digest_of(secret, self._policy.version, chunk.offset, part) != chunk.digest:
            raise StagingFailed(f"the chunk at {chunk.offset} is damaged, or was made for another base")
        self._end = end

    @property
    def is_whole(self) -> bool:
        return self._end == len(self._content)

    def version_by(self, secret: bytes) -> PolicyVersion | None:
        """Return the version that is there whole, if it came with this secret."""
        return self.version if secret == self._secret else None

    def finish(self, secret: bytes) -> None:
        """Note that all chunks have come, checked with `secret`."""
        assert self._policy is not None and self.is_whole
        self.version, self._secret = self._policy.version, secret


def _allocate(path: Path, num_bytes: int) -> Bytes:
    """Return a file as memory. Its room is taken first: a write without room would end the process."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    return np.memmap(path, dtype=np.uint8, mode="r+", shape=(num_bytes,))
