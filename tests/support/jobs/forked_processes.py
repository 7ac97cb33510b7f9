"""Processes of a job that start in a moment: each is forked from one that has imported everything.

They run the actual command, with an environment, a folder and a log of their own; they share only the
interpreter's start and its imports, which on two cores take longer than most tests.
"""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from asyncrl_api.processes import die_with_parent

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed chooses when it is imported
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        "pytest",
        "deepspeed",
        "asyncrl_runtime.engine.command",
        "asyncrl_runtime.rollout.assemble",
        "asyncrl_runtime.trainer.assemble",
        "transformers.models.llama.modeling_llama",
        "transformers.models.qwen3.modeling_qwen3",
    ]
)


class ForkedProcess:
    """`asyncrl-runtime` with arguments; speaks as much of subprocess.Popen as tests need."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        log: Path,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            prepare: called in the process before the command, to put a fault into it.
        """
        self._lock = threading.Lock()  # whoever reads an exit code takes it from the server for good
        self._arguments = tuple(arguments)
        self._process = FORKSERVER.Process(
            target=_run, args=(self._arguments, cwd, dict(env), log, prepare), daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        with self._lock:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self._arguments, timeout or 0)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        with self._lock:
            self._process.kill()


def _run(
    arguments: Sequence[str],
    cwd: Path,
    env: Mapping[str, str],
    log: Path,
    prepare: Callable[[], None] | None,
) -> None:
    die_with_parent()
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["asyncrl-runtime", *arguments]
    if prepare is not None:
        prepare()
    from asyncrl_runtime.main import app

    app()
