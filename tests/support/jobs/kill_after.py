"""Makes this process kill itself after the n-th call of one function."""

import functools
import importlib
import inspect
import os
import signal
from typing import Any


def arm(target: str) -> None:
    """Replace `module:Class.method#n` by itself and a SIGKILL after its n-th return."""
    reference, _, count = target.partition("#")
    module_name, _, path = reference.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)
    calls = 0

    def returned() -> None:
        nonlocal calls
        calls += 1
        if calls == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if not inspect.isawaitable(result):
            returned()
            return result

        async def wait() -> Any:
            value = await result
            returned()
            return value

        return wait()

    setattr(owner, name, wrapper)
