"""Runs a receiver: the command `asyncrl-runtime receiver`.

Its worker asks it over loopback to fetch a version, and tells it where from and with which secret. Only the
controller can tell the worker, by the rights of the broker.
"""

import asyncio
import logging
from pathlib import Path

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from asyncrl_api.processes import bind
from asyncrl_runtime.contract.refused import Refusals
from asyncrl_runtime.contract.staging import FetchStage, StagingFailed
from asyncrl_runtime.http_server import serve_until_stopped
from asyncrl_runtime.receiver.fetching import Transfer
from asyncrl_runtime.receiver.staged_file import StagedFile

log = logging.getLogger(__name__)


class ReceiverApp:
    """The HTTP side. One transfer at a time: a later one breaks off the one before, whose worker is gone."""

    def __init__(self, file: StagedFile) -> None:
        self._file = file
        self._refusals = Refusals()
        self._transfer: Transfer | None = None
        self._lock = asyncio.Lock()

    def build(self) -> Starlette:
        return Starlette(routes=[Route("/fetch", self.fetch, methods=["POST"])])

    async def fetch(self, request: Request) -> Response:
        """Answer once the version is here whole: 200; 400 for no such request; 502 if it has not come."""
        try:
            asked = msgspec.json.decode(await request.body(), type=FetchStage)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self._refusals.add("request to fetch", str(error))
            return PlainTextResponse(f"no request to fetch: {error}", status_code=400)
        self.give_up()
        async with self._lock:
            self._transfer = Transfer(asked, self._file)
            try:
                fetched = await asyncio.to_thread(self._transfer.run)
            except StagingFailed as error:
                log.warning("%s has not come: %s", asked.version, error)
                return PlainTextResponse(str(error), status_code=502)
            finally:
                self._transfer = None
        form = "as a whole" if fetched.is_whole else "as a delta"
        log.info("%s is here: %d bytes came, %s", asked.version, fetched.num_bytes, form)
        return Response(msgspec.json.encode(fetched), media_type="application/json")

    def give_up(self) -> None:
        """Break off the transfer that is under way."""
        if self._transfer is not None:
            self._transfer.give_up()


def run_receiver(folder: Path, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT, then delete the copy.

    Raises:
        ExitError: the port is taken.
    """
    listener = bind(host, port, "receiver", "--host and --port")
    file = StagedFile(folder)
    app = ReceiverApp(file)

    async def serve() -> None:
        await serve_until_stopped(app.build(), listener, f"receiver of {folder}")
        app.give_up()  # or its thread would keep the process

    asyncio.run(serve())
    file.drop()
