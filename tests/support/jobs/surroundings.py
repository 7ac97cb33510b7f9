"""What surrounds a job and can go wrong without killing it: its disk, its reward's service, the wire."""

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import nats
import nats.errors

from asyncrl_api.run_config import RunConfig
from asyncrl_runtime.contract.messages import Tombstone, encode
from support.jobs.json_service import JsonService
from support.paths import FAULTS


class Disk:
    """The disk of all Python processes that are started with `environment`, as far as they flush to it."""

    def __init__(self, folder: Path) -> None:
        self._state = folder / "disk"

    @property
    def environment(self) -> dict[str, str]:
        return {"PYTHONPATH": str(FAULTS), "ASYNCRL_FAULT": "disk", "ASYNCRL_DISK": str(self._state)}

    def be_slow(self, seconds: float) -> None:
        """Make each flush take so much longer from now on."""
        self._put(str(seconds))

    def be_full(self) -> None:
        """Make each flush fail from now on."""
        self._put("full")

    def recover(self) -> None:
        self._state.unlink(missing_ok=True)

    def _put(self, state: str) -> None:
        scratch = self._state.with_suffix(".new")
        scratch.write_text(state)
        scratch.replace(self._state)


class ScoringService(JsonService):
    """A reward of type Service that counts digits, unless it is told to answer 503."""

    def __init__(self) -> None:
        super().__init__()
        self.is_unavailable = False
        self.num_refused = 0

    def answer(self, body: Any) -> tuple[int, str]:
        if self.is_unavailable:
            self.num_refused += 1
            return 503, "overloaded"
        digits = sum(character.isdigit() for character in body["response"])
        return 200, json.dumps({"reward": digits / 4})


def poison(config: RunConfig, rng: random.Random) -> tuple[str, bytes]:
    """Return a message that no worker would send, and its subject; a worker's password is enough to do so."""
    names, far = config.names, 10 ** rng.randrange(7, 20)
    garbage = rng.randbytes(rng.randrange(64))
    return rng.choice(
        [
            (names.trajectory("x"), garbage),
            (names.trajectory("-1"), garbage),
            (names.trajectory(far), garbage),
            (names.trajectory(far), encode(Tombstone(ticket=far, reason="workflow_error"))),
            (names.trajectory(far, sample=0), encode(Tombstone(ticket=1, reason="workflow_error"))),
            (names.heartbeat("nobody"), garbage),
            (names.evaluation("answer", "nothing"), garbage),
        ]
    )


async def publish(config: RunConfig, subject: str, data: bytes) -> bool:
    """Publish one message as a worker could; return whether the broker took it."""
    with contextlib.suppress(OSError, TimeoutError, nats.errors.Error):
        client = await nats.connect(
            config.nats.url, connect_timeout=1, allow_reconnect=False, max_reconnect_attempts=0
        )
        try:
            await client.publish(subject, data)
            await client.flush(1)
            return True
        finally:
            await client.close()
    return False
