"""An HTTP server on loopback that stands in for a service which scores answers."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar


class JsonService(ThreadingHTTPServer):
    """Answers each request, whose body is JSON, with what `answer` returns for it."""

    request_queue_size = 128
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)

    def answer(self, body: Any) -> tuple[int, str] | None:
        """Return status and text; None to hang up. Called in a thread of the request's own."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/score"

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that gave up, or were killed."""


class _Handler(BaseHTTPRequestHandler):
    server: JsonService
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        answer = self.server.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if answer is None:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        status, text = answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


Service = TypeVar("Service", bound=JsonService)


@contextlib.contextmanager
def serving(service: Service) -> Iterator[Service]:
    """Serve until the body ends."""
    with service:
        thread = threading.Thread(target=service.serve_forever, args=[0.01])
        thread.start()
        try:
            yield service
        finally:
            service.shutdown()
            thread.join()
