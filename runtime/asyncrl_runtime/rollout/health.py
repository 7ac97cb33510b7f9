"""The worker answers for itself and for its engine on a port of its own.

kubelet, or the local runner, asks `/worker` and `/engine`; a 503 has the process in question restarted. The
engine is not asked directly: only the worker knows that it hangs in a collective, or cannot be made clean.
"""

import contextlib
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from asyncrl_api.exits import ExitCode, ExitError


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the worker, which drains first."""
        yield


def bind_health(host: str, port: int) -> socket.socket:
    """Take the port for probes; connections are refused until `serve_health` answers them.

    Raises:
        ExitError: the port is taken.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ExitError(
            ExitCode.TRY_AGAIN,
            f"worker: cannot listen on {host}:{port}: {error.strerror}. Stop what listens there, or choose "
            "another address with --host and --health-port",
        ) from error
    return listener


async def serve_health(listener: socket.socket, engine_fault: Callable[[], str | None]) -> None:
    """Answer probes until cancelled.

    Args:
        listener: as bound by `bind_health`.
        engine_fault: why the engine must be restarted; None while it need not be.
    """

    async def worker(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    async def engine(request: Request) -> PlainTextResponse:
        fault = engine_fault()
        return PlainTextResponse(fault or "ok", status_code=503 if fault else 200)

    app = Starlette(routes=[Route("/worker", worker), Route("/engine", engine)])
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")
    await _Server(config).serve(sockets=[listener])
