"""An event loop whose time passes only while everybody waits: hours of a job in seconds."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Jumps(selectors.SelectSelector):
    """Never waits: when there is nothing to read, time jumps to the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.num_turns = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.num_turns += 1
        if ready := super().select(0):
            return ready
        if timeout is None:
            raise RuntimeError("every task waits and no timer runs: nothing would ever happen again")
        self.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop for tasks of this process only; `time()` begins at 0."""

    def __init__(self) -> None:
        self._jumps = _Jumps()
        super().__init__(self._jumps)

    def time(self) -> float:
        return self._jumps.now

    @property
    def num_turns(self) -> int:
        """How often the loop has looked for something to do."""
        return self._jumps.num_turns


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end; `asyncio.sleep` and timeouts take no time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
