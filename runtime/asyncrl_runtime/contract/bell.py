"""A bell for one listener. It does not say what has changed: the listener looks at the state itself."""

import asyncio
import contextlib


class Bell:
    """Wakes its listener, or remembers that it has rung until the listener waits again.

    Each listener has a bell of its own. A bell that two share either wakes the second in vain until the first
    has heard it, or is silenced by the first before the second has heard it.
    """

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def ring(self) -> None:
        self._rung.set()

    async def wait(self, seconds: float) -> None:
        """Return at the next ring, at once if it has rung since the last wait, or after `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._rung.wait()
        self._rung.clear()  # cleared before the listener looks: what changes from now on rings again
