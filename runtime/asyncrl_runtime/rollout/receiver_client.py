"""A worker's end of the talk with its receiver, over loopback."""

from typing import Protocol

import aiohttp
import msgspec

from asyncrl_runtime.contract.refused import one_line
from asyncrl_runtime.contract.staging import FetchedStage, FetchStage

LINGER_SECONDS = 5.0
"""How much longer than the transfer's own deadline its answer is waited for."""


class ReceiverFailed(Exception):
    """The version has not come, or the receiver is not there."""


class Receiver(Protocol):
    """What brings versions beside the engine."""

    async def fetch(self, asked: FetchStage) -> FetchedStage:
        """Return once the version is there whole.

        Raises:
            ReceiverFailed: it is not.
        """
        ...


class ReceiverClient:
    """Talks to the receiver at a URL; each request has a connection of its own."""

    def __init__(self, base_url: str) -> None:
        self._url = f"{base_url}/fetch"

    async def fetch(self, asked: FetchStage) -> FetchedStage:
        timeout = aiohttp.ClientTimeout(total=asked.timeout_seconds + LINGER_SECONDS, sock_connect=5.0)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as http,
                http.post(self._url, data=msgspec.json.encode(asked), allow_redirects=False) as response,
            ):
                content = await response.read()
                if response.status != 200:
                    raise ReceiverFailed(one_line(content.decode(errors="replace")))
                return msgspec.json.decode(content, type=FetchedStage)
        except (aiohttp.ClientError, OSError, msgspec.DecodeError) as error:
            raise ReceiverFailed(f"{self._url}: {type(error).__name__}: {error}") from error
