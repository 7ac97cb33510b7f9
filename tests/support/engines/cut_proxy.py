"""A TCP proxy on loopback whose connections can be cut in the middle of a transfer."""

import asyncio
import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Self


class CutProxy:
    """Cuts all connections once a number of bytes have come from the server; the bytes at hand are lost."""

    def __init__(self, host: str, port: int, cut_after_bytes: Sequence[int]) -> None:
        self._target = (host, port)
        self._cuts = sorted(cut_after_bytes)
        self._received = 0
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"nats://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Reset every connection; whatever is buffered on the way is lost."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(*self._target)
        self._writers += [writer, upstream_writer]
        await asyncio.gather(self._pump(reader, upstream_writer, 0), self._pump(upstream_reader, writer, 1))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counts: int) -> None:
        with contextlib.suppress(ConnectionError, OSError, asyncio.CancelledError):
            while data := await reader.read(65536):
                self._received += len(data) * counts
                if self._cuts and self._received >= self._cuts[0]:
                    self._cuts.pop(0)
                    self.cut()
                    return
                writer.write(data)
                await writer.drain()
        with contextlib.suppress(RuntimeError):
            writer.close()
