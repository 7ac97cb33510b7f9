"""The port on which the worker answers health checks for itself and for its engine.

kubelet, or the local runner, asks `/worker` and `/engine`; after 503s the process concerned is restarted. The
engine is not asked directly: only the worker knows that it hangs in a collective, or cannot be made clean.
`/ready` tells whether the two can take a ticket.
"""

import contextlib
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the worker, which drains first."""
        yield


async def serve_health(
    listener: socket.socket, engine_fault: Callable[[], str | None], is_fit: Callable[[], bool]
) -> None:
    """Answer probes until cancelled.

    Args:
        listener: the socket that `processes.bind` returned.
        engine_fault: returns why the engine must be restarted; None while it need not be.
        is_fit: returns whether the engine has weights that are new enough to sample with.
    """

    async def worker(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    async def engine(request: Request) -> PlainTextResponse:
        fault = engine_fault()
        return PlainTextResponse(fault or "ok", status_code=503 if fault else 200)

    async def ready(request: Request) -> PlainTextResponse:
        return (
            PlainTextResponse("ok") if is_fit() else PlainTextResponse("no fit weights yet", status_code=503)
        )

    app = Starlette(routes=[Route("/worker", worker), Route("/engine", engine), Route("/ready", ready)])
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")
    await _Server(config).serve(sockets=[listener])
