"""The receiver's end of a transfer."""

import logging
import secrets
import socket
import time
from collections.abc import Callable

from asyncrl_runtime.contract.messages import PolicyVersion
from asyncrl_runtime.contract.staging import (
    CHUNK_BYTES,
    NONCE_BYTES,
    FetchedStage,
    FetchStage,
    FramedSocket,
    ReceiverBase,
    ReceiverHello,
    SenderProof,
    StagedChunk,
    StagedPolicy,
    StagingFailed,
    is_proof,
    prove,
)
from asyncrl_runtime.receiver.staged_file import StagedFile

log = logging.getLogger(__name__)

MAX_BYTES = 2**50
"""More than any policy has."""


class Transfer:
    """Brings a file to one version; can be broken off from another thread."""

    def __init__(
        self, asked: FetchStage, file: StagedFile, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._asked = asked
        self._file = file
        self._clock = clock
        self._deadline = clock() + asked.timeout_seconds
        self._socket: socket.socket | None = None
        self._is_given_up = False

    def give_up(self) -> None:
        """Have `run` raise StagingFailed soon."""
        self._is_given_up = True
        if (connected := self._socket) is not None:
            try:
                connected.shutdown(socket.SHUT_RDWR)
            except OSError as error:
                log.debug("while giving up: %s", error)

    def run(self) -> FetchedStage:
        """Fetch what the file lacks; if the delta does not make what it should, once more as a whole.

        Raises:
            StagingFailed: the version has not come whole; the file is of no version then.
        """
        base = self._file.version_by(self._asked.secret)
        if base == self._asked.version:
            return FetchedStage(folder=str(self._file.folder), num_bytes=0, is_whole=False)
        try:
            return self._fetch(base)
        except StagingFailed as error:
            if base is None or self._file.version == base or self._is_given_up:
                raise  # the trainer is not there, or is not the trainer
            log.warning("%s from %s: %s; fetching the whole", self._asked.version, base, error)
        return self._fetch(None)

    def _fetch(self, base: PolicyVersion | None) -> FetchedStage:
        num_bytes = 0
        with self._connect() as trainer:
            self._greet(trainer, base)
            policy, _ = trainer.receive(StagedPolicy)
            if policy.version != self._asked.version or not 0 < policy.num_bytes <= MAX_BYTES:
                raise StagingFailed(f"{policy.version} of {policy.num_bytes} bytes is offered instead")
            self._file.begin(policy)
            while not self._file.is_whole:
                chunk, payload = trainer.receive(StagedChunk, CHUNK_BYTES)
                self._file.take(chunk, payload, self._asked.secret)
                num_bytes += len(payload)
        self._file.finish(self._asked.secret)
        return FetchedStage(folder=str(self._file.folder), num_bytes=num_bytes, is_whole=policy.base is None)

    def _connect(self) -> FramedSocket:
        address = (self._asked.host, self._asked.port)
        try:
            self._socket = socket.create_connection(address, max(0.001, self._deadline - self._clock()))
        except OSError as error:
            raise StagingFailed(f"{address[0]}:{address[1]}: {error}") from error
        if self._is_given_up:
            self._socket.close()
            raise StagingFailed("given up")
        return FramedSocket(self._socket, self._deadline, self._clock)

    def _greet(self, trainer: FramedSocket, base: PolicyVersion | None) -> None:
        nonce = secrets.token_bytes(NONCE_BYTES)
        trainer.send(ReceiverHello(nonce=nonce, version=self._asked.version))
        proved, _ = trainer.receive(SenderProof)
        if not is_proof(proved.proof, self._asked.secret, "trainer", nonce, proved.nonce):
            raise StagingFailed(
                f"{self._asked.host}:{self._asked.port} does not know the attempt's secret, and is refused"
            )
        proof = prove(self._asked.secret, "receiver", proved.nonce, nonce)
        trainer.send(ReceiverBase(proof=proof, base=base))
