"""Hands a staged policy to the receivers that ask for it and know the attempt's secret."""

import contextlib
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable

from asyncrl_runtime.contract.refused import Refusals
from asyncrl_runtime.contract.staging import (
    NONCE_BYTES,
    FramedSocket,
    ReceiverBase,
    ReceiverHello,
    SenderProof,
    StagingFailed,
    is_proof,
    prove,
)
from asyncrl_runtime.weights.stage_image import Stage

log = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 10.0


class StageServer:
    """Listens on a free port of `host`, and sends to each receiver in a thread of its own.

    Args:
        host: an address of this machine that receivers can reach.
    """

    def __init__(
        self,
        host: str,
        secret: bytes,
        refusals: Refusals,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        self._listener.bind((host, 0))
        self._listener.listen(1024)
        self.host = host
        self.port: int = self._listener.getsockname()[1]
        self.send_seconds = HANDSHAKE_SECONDS
        """The deadline of one transfer."""
        self._secret = secret
        self._refusals = refusals
        self._clock = clock
        self._stage: Stage | None = None
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, name="stage-server", daemon=True).start()

    def offer(self, stage: Stage) -> None:
        """Hand out this version from now on."""
        self._stage = stage

    def withdraw(self) -> None:
        """Hand out nothing, and break off what is under way: the image is about to change."""
        self._stage = None
        with self._lock:
            for each in self._open:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop listening; never waits for anybody."""
        self.withdraw()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connected, address = self._listener.accept()
            except OSError:  # it is closed
                return
            threading.Thread(
                target=self._serve, args=(connected, str(address[0])), name="stage", daemon=True
            ).start()

    def _serve(self, connected: socket.socket, address: str) -> None:
        with self._lock:
            self._open.add(connected)
        deadline = self._clock() + HANDSHAKE_SECONDS
        with FramedSocket(connected, deadline, self._clock) as receiver:
            try:
                self._send(receiver)
            except StagingFailed as error:
                self._refusals.add("receiver of weights", f"{address}: {error}")
        with self._lock:
            self._open.discard(connected)

    def _send(self, receiver: FramedSocket) -> None:
        """Send the version that is offered, whole or as a delta.

        Raises:
            StagingFailed: the receiver does not know the secret, wants another version, or is gone.
        """
        hello, _ = receiver.receive(ReceiverHello)
        nonce = secrets.token_bytes(NONCE_BYTES)
        proof = prove(self._secret, "trainer", hello.nonce, nonce)
        receiver.send(SenderProof(nonce=nonce, proof=proof))
        asked, _ = receiver.receive(ReceiverBase)
        if not is_proof(asked.proof, self._secret, "receiver", nonce, hello.nonce):
            raise StagingFailed("it does not know the attempt's secret")
        stage = self._stage
        if stage is None or stage.policy.version != hello.version:
            raise StagingFailed(f"it wants {hello.version}, which is not offered")
        receiver.deadline = self._clock() + self.send_seconds
        policy = stage.policy_for(asked.base)
        receiver.send(policy)
        for chunk, payload in stage.chunks(policy.base):
            receiver.send(chunk, payload)
