"""Which adapters requests may name, and who uses them, on the event loop's side."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from asyncrl_runtime.engine.fields import BadRequest
from asyncrl_runtime.engine.lora import LoadedAdapter, read_adapter
from asyncrl_runtime.engine.requests import Request
from asyncrl_runtime.engine.scheduler import Scheduler


class AdapterRegistry:
    """Names to adapters, changed by one load or unload at a time, as in SGLang. Belongs to one event loop.

    An adapter is lent to its requests and unloaded when all of them have given it back. The weights go
    along with the requests, so that the scheduler needs no registry.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._adapters: dict[str, LoadedAdapter] = {}
        self._paths: dict[str, str] = {}
        """Of all that were ever loaded."""
        self._num_users: Counter[LoadedAdapter] = Counter()
        self._changing = asyncio.Lock()
        self._given_back = asyncio.Event()

    @property
    def loaded(self) -> dict[str, str]:
        """Names and folders."""
        return {name: self._paths[name] for name in self._adapters}

    async def load(self, name: str, path: str) -> None:
        """Read the folder between two steps.

        Raises:
            BadRequest: the name is taken, or the folder does not hold an adapter for this model.
        """
        async with self._changing:
            if name in self._adapters:
                raise BadRequest(f"Failed to load LoRA adapter {name} because it is already loaded")
            self._adapters[name] = await self._read(path)
            self._paths[name] = path

    async def unload(self, name: str) -> None:
        """Forget the name at once, and return when no request uses the adapter any more.

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
        """Give each request the adapter that it names; `give_back` is to follow.

        None is lent before all are there: a request that held one while it waits for another could wait
        for an unload that waits for it.

        Raises:
            BadRequest: an adapter was never loaded, or its folder is not there any more.
        """
        named = {request: request.lora_path for request in requests if request.lora_path is not None}
        while missing := set(named.values()) - self._adapters.keys():
            await self._load_again(min(missing))
        for request, name in named.items():
            request.adapter = self._adapters[name]
            self._num_users[request.adapter] += 1

    def give_back(self, requests: Sequence[Request]) -> None:
        """End what `lend` began, where it got so far."""
        for request in requests:
            if request.adapter is not None:
                self._num_users[request.adapter] -= 1
        self._given_back.set()

    async def _load_again(self, name: str) -> None:
        """As SGLang does when a request names what was unloaded: only a name never loaded is unknown."""
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
