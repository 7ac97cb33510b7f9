"""Runs Python programs that nobody vouches for, one at a time, and leaves nothing of them behind.

A run is a chain of processes: this one, the isolator, init, the program. This process is in namespaces
without network and with read-only files; the isolator adds namespaces for the processes and scratch files of
one run. Init is the first process in them: when it ends, the kernel ends all others there. If namespaces are
not allowed, the descendants are searched for and killed instead.
"""

import contextlib
import math
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from asyncrl_runtime.rollout.rewards import linux
from asyncrl_runtime.rollout.rewards.containment import (
    FREE_USERS,
    SCRATCH_FOLDERS,
    Containment,
    become_user,
    give_scratch_folders,
)
from asyncrl_runtime.rollout.rewards.descendants import kill_descendants, num_descendants, wait_for

MAX_MEMORY_BYTES = 1 << 30
"""The largest address space of one process."""
MAX_FILE_BYTES = 16 << 20
"""The largest size of one file, and of what a program prints."""
MAX_PROCESSES = 32
MAX_OPEN_FILES = 64

WATCH_SECONDS = 0.1


class Run(NamedTuple):
    """How a program ended."""

    failure: str
    """The reason why it failed; empty if it exited with status 0."""
    output: str


class Sandbox:
    """Turns this process into one in which programs can be run; it can do little else afterwards."""

    def __init__(self, containment: Containment) -> None:
        self.containment = containment
        self._user = FREE_USERS[os.getpid() % len(FREE_USERS)]  # not the user of other sandboxes nearby
        linux.become_subreaper()
        containment.enter(self._user)

    @classmethod
    def strongest(cls) -> Self:
        """Enter the strongest containment in which programs run on this machine.

        Raises:
            OSError: programs run in none of them.
        """
        may_switch = linux.has_capabilities(linux.CAP_KILL, linux.CAP_SETGID, linux.CAP_SETUID)
        users = (True, False) if may_switch else (False,)
        for containment in (Containment(spaces, user) for spaces in (True, False) for user in users):
            failure = why_not(containment)
            if not failure:
                return cls(containment)
            print(f"no sandbox {containment}: {failure}", file=sys.stderr)  # the worker's log
        raise OSError("programs cannot be run here, not even without a sandbox")

    def run(self, program: str, stdin: str, *, timeout_seconds: float) -> Run:
        """Run `program` to its end, which comes within `timeout_seconds`.

        Raises:
            OSError: the program could not be started.
        """
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(memory_file(text)) for text in (stdin, "", "")]
            folder = stack.enter_context(self._scratch_folder())
            report, report_end = os.pipe()
            stack.callback(os.close, report)
            launch = _Launch(
                self.containment, self._user, program, files, folder, timeout_seconds, report_end
            )
            stack.callback(kill_descendants)
            try:
                isolator = fork_into(launch.isolate, report_end)
            finally:
                os.close(report_end)

            if excess := self._watch(report, timeout_seconds):
                return Run(excess, "")
            os.waitpid(isolator, 0)
            message = os.read(report, 4096).decode()
            if not message.lstrip("-").isdigit():
                raise OSError(message or "the processes around the program were killed")
            output, errors = (
                os.pread(file, MAX_FILE_BYTES, 0).decode(errors="replace") for file in files[1:]
            )
            return Run(explain(int(message), errors), output)

    def _watch(self, report: int, timeout_seconds: float) -> str:
        """Wait for a report; return what the program has used too much of, empty if the report came."""
        deadline = time.monotonic() + timeout_seconds
        while not select.select([report], [], [], min(WATCH_SECONDS, max(deadline - time.monotonic(), 0)))[0]:
            if time.monotonic() >= deadline:
                return f"still running after {timeout_seconds:.3g} s"
            if not self.containment.own_user and num_descendants() > MAX_PROCESSES:
                return (
                    f"more than {MAX_PROCESSES} processes"  # the kernel does not limit the processes of root
                )
        return ""

    @contextlib.contextmanager
    def _scratch_folder(self) -> Iterator[str]:
        """Provide the program's working directory."""
        if self.containment.namespaces:
            yield SCRATCH_FOLDERS[0]  # it is empty in each run, and gone after it
            return
        folder = tempfile.mkdtemp(prefix="asyncrl-program-")
        try:
            if self.containment.own_user:
                os.chown(folder, self._user, self._user)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class _Launch:
    """One run; each method is the life of one process in the chain."""

    containment: Containment
    user: int
    program: str
    files: list[int]
    """The descriptors for standard input, output and error."""
    folder: str
    timeout_seconds: float
    report: int
    """The write end of a pipe: init writes the program's exit code, the others what went wrong around it."""

    def isolate(self) -> None:
        linux.set_death_signal(signal.SIGKILL)
        os.setsid()
        if self.containment.namespaces:
            linux.unshare(linux.CLONE_NEWPID | linux.CLONE_NEWNS)
            wait_for(fork_into(self.initialize, self.report))
        else:
            self.initialize()

    def initialize(self) -> None:
        linux.set_death_signal(signal.SIGKILL)
        if self.containment.namespaces:
            with contextlib.suppress(
                OSError
            ):  # fails in most containers; other processes stay out of reach anyway
                linux.mount("proc", "/proc", "proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
            give_scratch_folders()
        Path(self.folder, "program.py").write_text(self.program, "utf-8")
        code = wait_for(fork_into(self.execute, self.report))
        os.write(self.report, str(code).encode())

    def execute(self) -> None:
        for target, file in enumerate(self.files):
            os.dup2(file, target)
        os.chdir(self.folder)
        self._set_limits()
        if self.containment.own_user and os.geteuid() == 0:
            become_user(self.user)
        linux.forbid_new_privileges()
        environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": self.folder,
            "TMPDIR": self.folder,
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",  # numpy would start a thread per core and run into the limits
            "OPENBLAS_NUM_THREADS": "1",
        }
        os.execve(sys.executable, [sys.executable, "-I", "-B", "program.py"], environment)

    def _set_limits(self) -> None:
        limits = {
            resource.RLIMIT_CPU: math.ceil(self.timeout_seconds) + 1,  # only threads can reach this
            resource.RLIMIT_AS: MAX_MEMORY_BYTES,
            resource.RLIMIT_FSIZE: MAX_FILE_BYTES,
            resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
            resource.RLIMIT_CORE: 0,
        }
        if self.containment.is_apart:
            limits[resource.RLIMIT_NPROC] = (
                MAX_PROCESSES  # otherwise it would count the worker's processes too
            )
        for limit, value in limits.items():
            resource.setrlimit(limit, (value, value))


def why_not(containment: Containment) -> str:
    """Return what keeps programs from running in `containment`; empty if nothing does."""

    def attempt() -> None:
        run = Sandbox(containment).run("print('works')", "", timeout_seconds=30)
        if run != Run("", "works\n"):
            raise OSError(run.failure or f"unexpected output {run.output!r}")

    report, report_end = os.pipe()
    trial = fork_into(attempt, report_end)  # a process cannot get back what it gives up on entering
    os.close(report_end)
    with os.fdopen(report) as messages:
        message = messages.read()
    wait_for(trial)
    return message


def fork_into(life: Callable[[], None], report: int) -> int:
    """Start a process that runs `life` and then ends; it writes to `report` what kept it from finishing."""
    child = os.fork()
    if child:
        return child
    try:
        life()
    except BaseException as error:
        os.write(report, f"{type(error).__name__}: {error}".encode(errors="replace"))
    finally:
        os._exit(0)


@contextlib.contextmanager
def memory_file(text: str) -> Iterator[int]:
    """Provide the descriptor of a nameless file that holds `text`, positioned at its start."""
    with os.fdopen(os.memfd_create("standard"), "w+b") as file:
        file.write(text.encode())
        file.seek(0)
        yield file.fileno()


def explain(code: int, errors: str) -> str:
    """Return how a program failed: its signal, or its exit status and last line; empty if it did not fail."""
    if code <= 0:
        return f"killed by signal {-code} ({signal.strsignal(-code)})" if code else ""
    last_line = errors.rstrip().rpartition("\n")[2]
    return f"exit status {code}" + (f": {last_line:.300}" if last_line else "")
