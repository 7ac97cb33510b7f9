"""`asyncrl` as a user starts it: the console script, as a process, on a manifest in a folder."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

from asyncrl_api.job import AsyncRLJob, to_manifest
from asyncrl_api.report import Report
from asyncrl_operator.local.local_run import find_program
from asyncrl_operator.local.run_folder import RunFolder
from support.paths import USER_CODE

POLL_SECONDS = 0.02
KINDS = {
    "nats": {"nats-server"},
    "engine": {"engine"},
    "worker": {"worker"},
    "trainer": {"trainer", "rank"},
}
"""The first words of command lines by which the processes of a run are told apart."""


def asyncrl(
    *arguments: object, cwd: Path | None = None, seconds: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; whatever its input, it must not show a traceback."""
    command = [find_program("asyncrl"), *map(str, arguments)]
    ended = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=seconds, check=False)
    assert "Traceback" not in ended.stdout + ended.stderr, ended.stderr
    return ended


def write_job(folder: Path, job: AsyncRLJob) -> Path:
    """Write a manifest, and the user code that it names beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(USER_CODE / "harness_data.py", folder)
    manifest = folder / "job.yaml"
    manifest.write_text(json.dumps(to_manifest(job)))
    return manifest


class CliRun:
    """`asyncrl run`, going on beside the test; killed at the end of a `with` block if it still does."""

    def __init__(
        self,
        manifest: Path,
        out: Path,
        *arguments: str,
        program: Sequence[str] | None = None,
        log: Path | None = None,
    ) -> None:
        self.folder = RunFolder(out)
        self._log = log or out.with_name(f"{out.name}.output")
        command = [*(program or [find_program("asyncrl")]), "run", str(manifest), "--out", str(out)]
        environment = {**os.environ, "ASYNCRL_CACHE": str(manifest.parent / "cache")}
        with self._log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, *arguments], stdout=output, stderr=subprocess.STDOUT, env=environment
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def output(self) -> str:
        return self._log.read_text()

    @property
    def report(self) -> Report | None:
        return Report.load(self.folder.report)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in self.folder.metrics.read_text().splitlines()]

    def children(self) -> list[psutil.Process]:
        """Everything that the run has started, and what that has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_for_child(self, kind: str, replica: int = 0) -> psutil.Process:
        """Return a process of a kind of KINDS, the `replica`-th of them that was started."""
        found: list[psutil.Process] = []

        def is_there() -> bool:
            found[:] = sorted(
                self._children_of(kind), key=lambda process: (process.create_time(), process.pid)
            )
            return len(found) > replica

        self.wait_until(f"{kind} {replica} runs", is_there)
        return found[replica]

    def _children_of(self, kind: str) -> Iterator[psutil.Process]:
        for process in self.children():
            with contextlib.suppress(psutil.Error):
                if KINDS[kind] & {Path(word).name for word in process.cmdline()[:4]}:
                    yield process

    def wait_for_step(self, step: int) -> None:
        def is_there() -> bool:
            return self.report is not None and self.report.step >= step

        self.wait_until(f"step {step}", is_there)

    def wait_until(self, what: str, condition: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the run ended before: {what}\n{self.output}"
            assert time.monotonic() < deadline, f"{what}: not in {seconds} s\n{self.output}"
            time.sleep(POLL_SECONDS)

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def wait(self, seconds: float = 120) -> int:
        """Return the exit code of a run that ends; it may show a process's traceback, but none of its own."""
        code = self.process.wait(seconds)
        assert "\nTraceback" not in self.output, self.output
        return code


class Terminal:
    """A command on a pseudo-terminal of 80 columns, its controlling one."""

    COLUMNS = 80

    def __init__(self, *arguments: object) -> None:
        self._ours, theirs = os.openpty()
        termios.tcsetwinsize(theirs, (24, self.COLUMNS))
        environment = {**os.environ, "TERM": "xterm-256color", "PYTHONUTF8": "1"}
        self.process = subprocess.Popen(
            [find_program("asyncrl"), *map(str, arguments)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509  # a single call
        )
        os.close(theirs)
        self.text = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def press_ctrl_c(self) -> None:
        os.write(self._ours, b"\x03")

    def read_until(self, words: str | None, seconds: float = 120) -> None:
        """Read until `words` have been shown; None: until the command has ended."""
        deadline = time.monotonic() + seconds
        os.set_blocking(self._ours, False)
        while words is None or words not in self.text:
            assert time.monotonic() < deadline, self.text
            try:
                self.text += os.read(self._ours, 2**16).decode(errors="replace")
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # the other side is closed
                assert words is None, self.text
                return

    def rows(self) -> list[str]:
        """Return everything that was ever drawn, row by row, without colors and movements."""
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.text)
        return re.split(r"[\r\n]+", plain)


def have_ended(processes: Sequence[psutil.Process], seconds: float = 10) -> bool:
    return psutil.wait_procs(processes, timeout=seconds)[1] == []
