"""Runs `asyncrl-runtime` and kills itself after the n-th call of one function: kill_after.py M:C.f#n ..."""

import functools
import importlib
import inspect
import os
import signal
import socket
import sys
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


def main() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    target = sys.argv.pop(1)
    arm(target)
    from asyncrl_runtime.main import app

    app()


if __name__ == "__main__":
    main()
