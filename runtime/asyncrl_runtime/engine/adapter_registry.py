"""The adapters that requests may name, and the requests that use them, on the event loop's side."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from asyncrl_runtime.engine.fields import BadRequest
from asyncrl_runtime.engine.lora import LoadedAdapter, read_adapter
from asyncrl_runtime.engine.requests import Request
from asyncrl_runtime.engine.scheduler import Scheduler


class AdapterRegistry:
    """Maps names to adapters; one load or unload changes it at a time, as in SGLang. Used on one event loop.

    An adapter is lent to its requests and unloaded when all of them have given it back. The weights travel
    with the requests, so that the scheduler needs no registry.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._adapters: dict[str, LoadedAdapter] = {}
        self._paths: dict[str, str] = {}
        """The folders of all adapters that were ever loaded, by name."""
        self._num_users: Counter[LoadedAdapter] = Counter()
        self._changing = asyncio.Lock()
        self._given_back = asyncio.Event()

    @property
    def loaded(self) -> dict[str, str]:
        """The folders of the loaded adapters, by name."""
        return {name: self._paths[name] for name in self._adapters}

    async def load(self, name: str, path: str) -> None:
        """Read an adapter's folder between two steps.

        Raises:
            BadRequest: the name is taken, or the folder does not hold an adapter for this model.
        """
        async with self._changing:
            if name in self._adapters:
                raise BadRequest(f"Failed to load LoRA adapter {name} because it is already loaded")
            self._adapters[name] = await self._read(path)
            self._paths[name] = path

    async def unload(self, name: str) -> None:
        """Forget the name at once, and return when no request uses the adapter anymore.

        Raises:
            BadRequest: no adapter of this name is loaded.
        """
        async with self._changing:
            adapter = self._adapters.pop(name, None)
            if adapter is None:
                raise BadRequest(
                    f"LoRA with name {name} does not exist. Loaded LoRAs: {list(self._adapters)}"
                )
            while self._num_users[adapter]:
                self._given_back.clear()
                await self._given_back.wait()
            del self._num_users[adapter]

    async def lend(self, requests: Sequence[Request]) -> None:
        """Give each request the adapter that it names; `give_back` must follow.

        No adapter is lent before all of them are loaded: a request that held one while it waited for
        another could wait for an unload that waits for that request.

        Raises:
            BadRequest: an adapter was never loaded, or its folder no longer exists.
        """
        named = {request: request.lora_path for request in requests if request.lora_path is not None}
        while missing := set(named.values()) - self._adapters.keys():
            await self._load_again(min(missing))
        for request, name in named.items():
            request.adapter = self._adapters[name]
            self._num_users[request.adapter] += 1

    def give_back(self, requests: Sequence[Request]) -> None:
        """Undo `lend`, for the requests to which it lent an adapter."""
        for request in requests:
            if request.adapter is not None:
                self._num_users[request.adapter] -= 1
        self._given_back.set()

    async def _load_again(self, name: str) -> None:
        """Load an unloaded adapter again, as SGLang does: only a name that was never loaded is unknown."""
        if name not in self._paths:
            raise BadRequest(
                f"Got LoRA adapter that has never been loaded: {name}\n"
                f"All loaded adapters: {list(self._paths)}."
            )
        async with self._changing:
            if name not in self._adapters:
                try:
                    self._adapters[name] = await self._read(self._paths[name])
                except BadRequest as error:
                    raise BadRequest(f"Failed to implicitly load LoRA adapter {name}: {error}") from error

    async def _read(self, path: str) -> LoadedAdapter:
        model = self._scheduler.model
        reading = self._scheduler.call(lambda: read_adapter(Path(path), model.linear_layers, model.dtype))
        return await asyncio.wrap_future(reading)
