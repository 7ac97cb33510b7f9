"""What surrounds a job and can go wrong without killing it: its disk, its reward's service, the wire."""

import contextlib
import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nats
import nats.errors

from asyncrl_api.run_config import RunConfig
from asyncrl_runtime.contract.messages import Tombstone, encode

FAULTY_DISK = Path(__file__).parent / "faulty_disk"


class Disk:
    """The disk of all Python processes that are started with `environment`, as far as they flush to it."""

    def __init__(self, folder: Path) -> None:
        self._state = folder / "disk"

    @property
    def environment(self) -> dict[str, str]:
        return {"PYTHONPATH": str(FAULTY_DISK), "FAULTY_DISK": str(self._state)}

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


class ScoringService(ThreadingHTTPServer):
    """A reward of type Service that counts digits, unless it is told to answer 503."""

    request_queue_size = 128
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Scoring)
        self.is_unavailable = False
        self.num_refused = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/score"

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that were killed."""


class _Scoring(BaseHTTPRequestHandler):
    server: ScoringService
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, answer = 503, "overloaded"
        if not self.server.is_unavailable:
            digits = sum(character.isdigit() for character in body["response"])
            status, answer = 200, json.dumps({"reward": digits / 4})
        self.server.num_refused += status != 200
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def scoring_service() -> Iterator[ScoringService]:
    """Serve until the body ends."""
    with ScoringService() as service:
        thread = threading.Thread(target=service.serve_forever)
        thread.start()
        try:
            yield service
        finally:
            service.shutdown()
            thread.join()


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
