"""Serves HTTP until a signal, for the engines that are processes of ours."""

import logging
import signal
import socket
from typing import Any

import uvicorn

log = logging.getLogger(__name__)

DRAIN_SECONDS = 5
"""Time that running requests are given at SIGTERM."""


async def serve_until_stopped(app: Any, listener: socket.socket, what: str) -> None:
    """Serve an ASGI application until SIGTERM or SIGINT; the process then goes on after this call.

    Args:
        listener: bound already, so that its address is known.
        what: what is served, for the log.
    """
    # After its shutdown uvicorn raises the signal that stopped it again; it has been acted on already.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    settings = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    host, port = listener.getsockname()[:2]
    listener.listen()  # before anyone reads the address
    log.info("%s at http://%s:%d", what, host, port)
    await uvicorn.Server(settings).serve(sockets=[listener])
