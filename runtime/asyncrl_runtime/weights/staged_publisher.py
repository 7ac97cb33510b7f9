"""Brings the policy to engines through a receiver beside each, so that an engine pauses for its load alone.

The receivers fetch a version over plain TCP, each at its own pace, while the engines sample. Whoever has the
version before gets what has changed, everybody else the whole.
"""

import logging
from collections.abc import Mapping

from asyncrl_api.names import JobNames
from asyncrl_runtime.contract.broker import Requests
from asyncrl_runtime.contract.messages import ControlReply, LoadStaged, PolicyVersion, StageWeights
from asyncrl_runtime.contract.refused import Refusals
from asyncrl_runtime.weights.bucket import PublishedWeights
from asyncrl_runtime.weights.engines import (
    BASE_SECONDS,
    Engines,
    Member,
    Published,
    UpdateSeconds,
)
from asyncrl_runtime.weights.fleet import Fleet
from asyncrl_runtime.weights.publisher import ChecksumMismatch
from asyncrl_runtime.weights.stage_image import StageImage
from asyncrl_runtime.weights.stage_server import StageServer

log = logging.getLogger(__name__)

SLOWEST_SENDING_BYTES_PER_SECOND = 500e6
"""What this process sends at least, to all receivers together."""


class StagedPublisher(Engines):
    """Brings engines to a version, all at the same time: no engine waits for another.

    Args:
        weights: what is published.
        config: the text of the model's config.json.
        attempt: the trainer's attempt.
        host: the address at which receivers reach this process.
        secret: the attempt's, which nobody else knows.
        timeout_seconds: the deadline of a phase; 0 scales it by the model's bytes.
        verify: whether to compare the checksums of all engines that were brought to the same version.
        refusals: counts what arrives and is not taken.
    """

    def __init__(
        self,
        broker: Requests,
        names: JobNames,
        fleet: Fleet,
        weights: PublishedWeights,
        config: str,
        *,
        attempt: int,
        host: str,
        secret: bytes,
        model_bytes: int,
        timeout_seconds: float = 0,
        verify: bool = False,
        refusals: Refusals | None = None,
    ) -> None:
        super().__init__(
            broker,
            names,
            fleet,
            attempt=attempt,
            num_bytes=model_bytes,
            timeout_seconds=timeout_seconds,
            refusals=refusals,
        )
        self.weights = weights
        self._model_bytes = model_bytes
        self._has_own_timeout = timeout_seconds > 0
        self._verify = verify
        self._secret = secret
        self._image = StageImage(weights.layout, config, secret)
        self._server = StageServer(host, secret, self._refusals)
        self._published: PolicyVersion | None = None
        self._checksums: dict[str, str] = {}  # those of that version, by worker

    async def publish(self, version: PolicyVersion, interrupt: str) -> Published:
        """See `Publisher`.

        Raises:
            ChecksumMismatch: with `verify`, engines at this version hold different weights.
            WeightsRefused: see `Publisher`.
        """
        members = self.behind(version)
        if not members:
            return Published()
        seconds = UpdateSeconds()
        began = self._fleet.now()
        self._server.withdraw()
        stage = await self._image.advance(version, self.weights)
        seconds.gather = self._fleet.now() - began

        began = self._fleet.now()
        self._server.offer(stage)
        ready = self._well(await self._stage(members, version), version, "stage")
        seconds.transfer = self._fleet.now() - began
        loaded = await self._load(ready, version, interrupt, seconds)

        failed = set(members) - set(loaded)
        self._remember_failures(failed)
        self._compare(version, {member[0]: reply.checksum for member, reply in loaded.items()})
        self._check_refusals()
        engines = tuple(worker for worker, _ in loaded)
        told = seconds if loaded else None
        return Published(engines, tuple(worker for worker, _ in failed), 1, dict(self._checksums), told)

    async def leave(self) -> None:
        """Stop serving receivers; never waits for anybody."""
        self._server.close()

    async def _stage(
        self, members: list[Member], version: PolicyVersion
    ) -> Mapping[Member, ControlReply | None]:
        """Have the receivers of `members` fetch the version; they share what this process can send."""
        timeout = self._timeout
        if not self._has_own_timeout:
            sending = len(members) * self._model_bytes / SLOWEST_SENDING_BYTES_PER_SECOND
            timeout = max(timeout, BASE_SECONDS + sending)
        self._server.send_seconds = timeout
        request = StageWeights(
            version=version,
            host=self._server.host,
            port=self._server.port,
            secret=self._secret,
            timeout_seconds=timeout,
        )
        return await self._ask(members, request, timeout + 10)

    async def _load(
        self,
        members: dict[Member, ControlReply],
        version: PolicyVersion,
        interrupt: str,
        seconds: UpdateSeconds,
    ) -> dict[Member, ControlReply]:
        """Have engines load what their receivers have; return the answers of those that did."""
        ready, began = list(members), self._fleet.now()
        if interrupt == "Drain":
            ready = await self._drained(ready, version)
            began = self._fleet.now()
        request = LoadStaged(
            version=version, interrupt=interrupt, timeout_seconds=self._timeout, checksum=self._verify
        )
        replies = await self._ask(ready, request, self._timeout + 10 + 60 * self._verify)
        loaded = self._well(replies, version, "load")
        for member, reply in loaded.items():
            self._got(member, version)
            seconds.pause = max(seconds.pause, reply.paused_seconds)
        seconds.load = self._fleet.now() - began
        return loaded

    def _well(
        self, replies: Mapping[Member, ControlReply | None], version: PolicyVersion, phase: str
    ) -> dict[Member, ControlReply]:
        """Return the answers that say yes; the others are logged."""
        well = {}
        for member, reply in replies.items():
            if reply is not None and reply.ok:
                well[member] = reply
            else:
                said = reply.message if reply else "no answer"
                log.warning("%s %s: %s: %s", phase, version, member[0], said)
                self._at.pop(member, None)
        return well

    def _compare(self, version: PolicyVersion, checksums: dict[str, str]) -> None:
        """Raise ChecksumMismatch if engines at the version hold different weights."""
        earlier = self._checksums if version == self._published else {}
        self._published, self._checksums = version, earlier | checksums
        if self._verify and len(set(self._checksums.values())) > 1:
            raise ChecksumMismatch(f"version {version}: {self._checksums}")
