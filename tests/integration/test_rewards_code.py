"""The `Code` reward: programs that fail, and programs that attack, on machines that allow more or less.

Each machine is a worker process of its own, with fewer rights than the tests if need be; it runs all
programs in its sandboxes and reports the scores and what it found left over.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from asyncrl_api.protocols import Score
from asyncrl_runtime.rollout.rewards import linux
from asyncrl_runtime.rollout.rewards.backend import RewardFailure
from asyncrl_runtime.rollout.rewards.frames import ScoreRequest, Setup
from asyncrl_runtime.rollout.rewards.pool import RewardPool

PASSED = "All tests passed"
STILL_RUNNING = "still running after 0.5 s"
MARK = str(200_000 + os.getpid())
"""How long the daemons of these tests sleep, by which they are recognized."""

WORKER = """
import asyncio, json, logging, sys
import psutil
from asyncrl_runtime.rollout.rewards.frames import ScoreRequest, Setup
from asyncrl_runtime.rollout.rewards.pool import RewardPool

async def score_all(programs, timeout_seconds):
    setup = Setup(type="Code", function="", answer_field="", timeout_seconds=timeout_seconds, import_paths=[])
    async with RewardPool(setup, num_processes=2) as pool:
        requests = [ScoreRequest("", text, {"tests": tests}) for text, tests in programs.values()]
        scores = await asyncio.gather(*(pool.attempt([request]) for request in requests))
        family = [process.name() for process in psutil.Process().children(recursive=True)]
    return {name: score for name, (score,) in zip(programs, scores)}, family

async def main():
    logging.basicConfig(level=logging.INFO)
    quick, endless = json.load(sys.stdin)
    print(json.dumps([await score_all(endless, 0.5), await score_all(quick, 30)]))

asyncio.run(main())
"""


@dataclass(frozen=True)
class Program:
    """A response, its tests, and what comes of it."""

    text: str
    feedback: str = PASSED
    """How the feedback ends, or begins if it passes."""
    tests: str | list[dict[str, str]] | None = None
    """The tests of the program; by default it has to print `fine`."""
    needs: str = ""
    """The protection without which the program is not tried; empty: none is needed."""


DAEMON = f"""
import os
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        os.closerange(0, 64)
        os.execvp("sleep", ["sleep", "{MARK}"])
    os._exit(0)
os.wait()
"""

PROGRAMS = {
    "reads its input": Program(
        "print(sum(map(int, input().split())))",
        tests=[{"input": "1 2", "output": "3"}, {"input": "1 " * 500_000, "output": "500000\n"}],
    ),
    "defines a function": Program(
        "Here:\n```python\ndef double(x):\n    return 2 * x\n```", tests="assert double(2) == 4"
    ),
    "may call exit": Program("print('fine')\nexit()"),
    "starts a thread": Program("import threading as t\nt.Thread(target=print, args=['fine']).start()"),
    "has a folder to itself in each run": Program(
        "import os, tempfile\nprint(os.listdir(), tempfile.gettempdir() == os.getcwd())\nopen('left', 'w')",
        tests=[{"input": "", "output": "['program.py'] True"}] * 2,
    ),
    "is wrong once": Program(
        "print(len(input()))",
        "Test 2 of 3 failed: wrong output",
        [{"input": "a", "output": "1"}, {"input": "bb", "output": "1"}, {"input": "c", "output": "1"}],
    ),
    "fails an assertion": Program("def f(): return 1", "exit status 1: AssertionError", "assert f() == 2"),
    "raises": Program("print('fine')\n1 / 0", "exit status 1: ZeroDivisionError: division by zero"),
    "is no Python": Program("Sorry, no.", "exit status 1: SyntaxError: invalid syntax"),
    "exits before the assertions": Program("import sys\nsys.exit(0)", "wrong output", "assert False"),
    "kills itself": Program("import os\nos.abort()", "killed by signal 6 (Aborted)"),
    "loops": Program("while True: pass", STILL_RUNNING),
    "sleeps": Program("import time\ntime.sleep(60)", STILL_RUNNING),
    "wants much memory": Program("bytearray(4 << 30)", "MemoryError"),
    "writes a big file": Program(
        "open('big', 'wb').write(b'x' * (64 << 20))", "OSError: [Errno 27] File too large"
    ),
    "prints without end": Program("while True: print('x' * 10**6)", "OSError: [Errno 27] File too large"),
    "writes many files": Program(
        "for i in range(10): open(str(i), 'wb').write(b'x' * (15 << 20))",
        "No space left on device",
        needs="namespaces",
    ),
    "has read-only files": Program(
        "import os\nprint('fine' if os.statvfs('/').f_flag & os.ST_RDONLY else 'writable')",
        needs="namespaces",
    ),
    "writes elsewhere": Program(f"try: open({__file__!r} + '.new', 'w')\nexcept OSError: print('fine')"),
    "opens many files": Program("files = [open('f', 'w') for _ in range(100)]", "Too many open files: 'f'"),
    "leaves a daemon": Program(DAEMON + "print('fine')"),
    "leaves a daemon and hangs": Program(DAEMON + "while True: pass", STILL_RUNNING),
    "starts as many processes as it may": Program(
        """
import os, signal
try:
    for count in range(100):
        if os.fork() == 0: signal.pause()
except BlockingIOError:
    print("fine" if 10 < count < 40 else count)
""",
        needs="process limit",
    ),
    "starts too many processes": Program(
        """
import os, signal
for _ in range(100):
    try:
        if os.fork() == 0: signal.pause()
    except BlockingIOError: raise SystemExit("more than 32 processes")
signal.pause()
""",
        "more than 32 processes",
    ),
    "is a fork bomb": Program(
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        STILL_RUNNING,
        needs="process limit",
    ),
    "has an empty environment": Program(
        "import os\nprint(*sorted(os.environ))",
        tests=[{"input": "", "output": "HOME LANG OMP_NUM_THREADS OPENBLAS_NUM_THREADS PATH TMPDIR"}],
    ),
    "looks for secrets": Program("""
import glob
def read(path):
    try:
        with open(path) as file: return file.read()
    except OSError: return ""
print([p for p in glob.glob("/proc/*/environ") if "SECRET" in read(p)] or "fine")
"""),
    "inspects other processes": Program(
        """
import glob, os
def can_open(path):
    try: open(path, "rb").close()
    except OSError: return False
    return True
mine = [f"/proc/{name}/mem" for name in ("self", "thread-self", os.getpid())]
print([p for p in glob.glob("/proc/*/mem") if p not in mine and can_open(p)] or "fine")
""",
        needs="isolation",
    ),
    "kills all it can": Program(
        """
import os, signal
for name in os.listdir("/proc"):
    if name.isdigit() and int(name) != os.getpid():
        try: os.kill(int(name), signal.SIGKILL)
        except OSError: pass
print("fine")
""",
        needs="isolation",
    ),
    "connects to the worker's machine": Program(
        "import socket\ntry: socket.create_connection(('127.0.0.1', PORT))\nexcept OSError: print('fine')",
        needs="namespaces",
    ),
    "becomes root": Program(
        "import os\ntry: os.setuid(0)\nexcept OSError: print('fine')\nelse: print(os.getuid())",
        needs="isolation",
    ),
    "mounts": Program(
        """
import ctypes
libc = ctypes.CDLL(None)
remounted = libc.mount(b"none", b"/", None, 0x1020, None) == 0
print("fine" if not remounted and libc.umount2(b"/tmp", 2) else "mounted")
""",
        needs="isolation",
    ),
}


@dataclass(frozen=True)
class Machine:
    """The command in front of a worker that takes its rights away, and the protections that are left."""

    command: list[str]
    protections: set[str]
    log: str


WITHOUT_MOUNTING = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
AS_A_USER = ["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups"]
FORBID_NAMESPACES = "echo 0 > /proc/sys/user/max_user_namespaces"
WITHOUT_RIGHTS = "exec setpriv --bounding-set=-all --inh-caps=-all"
WITHOUT_NAMESPACES = ["unshare", "--user", "--map-root-user", "sh", "-c"]
WITHOUT_NAMESPACES += [f'{FORBID_NAMESPACES} && {WITHOUT_RIGHTS} "$@"', "sh"]
WITH_PYTHON_IN_REACH = [
    sys.executable,
    "-c",
    f"""
import os, sys
from asyncrl_runtime.rollout.rewards import containment, linux
linux.unshare(linux.CLONE_NEWNS)
linux.make_mounts_private()
containment.uncover(containment.INTERPRETER | {{{str(Path(__file__).parents[2])!r}}})
os.execvp(sys.argv[1], sys.argv[1:])
""",
]
WITHOUT_NAMESPACES_AS_ROOT = [
    sys.executable,
    "-c",
    """
import os, sys
from pathlib import Path
from asyncrl_runtime.rollout.rewards import linux
inside, entered = os.pipe()
if os.fork() == 0:
    os.read(inside, 1)
    Path(f"/proc/{os.getppid()}/uid_map").write_text("0 0 65536")
    Path(f"/proc/{os.getppid()}/gid_map").write_text("0 0 65536")
    os._exit(0)
linux.unshare(linux.CLONE_NEWUSER)
os.write(entered, b".")
os.wait()
Path("/proc/sys/user/max_user_namespaces").write_text("0")
os.execvp(sys.argv[1], sys.argv[1:])
""",
    *WITHOUT_MOUNTING,
]
APART = "programs run without network, with read-only files and processes apart, as "
NOT_APART = "with network, files and processes in reach, since namespaces are not allowed here, as "
OWN_USER, SAME_USER = "a user of their own", "the user of the worker"

MACHINES = {
    "root": Machine([], {"namespaces", "isolation", "process limit"}, APART + OWN_USER),
    "root of a container": Machine(
        [*WITH_PYTHON_IN_REACH, *WITHOUT_MOUNTING],
        {"namespaces", "isolation", "process limit"},
        APART + OWN_USER,
    ),
    "root of a container without namespaces": Machine(
        [*WITH_PYTHON_IN_REACH, *WITHOUT_NAMESPACES_AS_ROOT],
        {"isolation", "process limit"},
        NOT_APART + OWN_USER,
    ),
    "a user": Machine(
        [*WITH_PYTHON_IN_REACH, *AS_A_USER], {"namespaces", "isolation", "process limit"}, APART + SAME_USER
    ),
    "a user without namespaces": Machine(
        [*WITH_PYTHON_IN_REACH, *AS_A_USER, *WITHOUT_NAMESPACES], set(), NOT_APART + SAME_USER
    ),
}


@dataclass(frozen=True)
class Report:
    """What the worker on a machine says."""

    machine: Machine
    scores: dict[str, list[Any]]
    families: tuple[list[str], ...]
    log: str


@pytest.fixture(scope="module")
def listener() -> Iterator[socket.socket]:
    """A server on the worker's loopback interface."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


@pytest.fixture(scope="module", params=MACHINES)
def report(request: pytest.FixtureRequest, listener: socket.socket) -> Report:
    is_mighty = linux.has_capabilities(linux.CAP_SYS_ADMIN, linux.CAP_SETUID)
    if not (is_mighty and shutil.which("setpriv") and shutil.which("unshare")):
        pytest.skip("only root can be every kind of worker, with setpriv and unshare of util-linux")
    machine = MACHINES[request.param]
    quick: dict[str, Any] = {}
    endless: dict[str, Any] = {}
    for name, program in PROGRAMS.items():
        if not program.needs or program.needs in machine.protections:
            text = program.text.replace("PORT", str(listener.getsockname()[1]))
            jobs = endless if program.feedback == STILL_RUNNING else quick
            jobs[name] = text, program.tests or [{"input": "", "output": "fine"}]
    worker = subprocess.run(
        [*machine.command, sys.executable, "-c", WORKER],
        input=json.dumps([quick, endless]),
        env=dict(os.environ, SECRET_TOKEN="secret"),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    (first, second), families = zip(*json.loads(worker.stdout), strict=True)
    return Report(machine, first | second, families, worker.stderr)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that(report: Report, name: str) -> None:
    program = PROGRAMS[name]
    if program.needs and program.needs not in report.machine.protections:
        pytest.skip(f"this machine allows no {program.needs}")
    reward, feedback = report.scores[name]
    assert program.feedback in feedback
    assert reward == (program.feedback == PASSED)


def test_nothing_of_the_programs_is_left(report: Report) -> None:
    assert [len(family) for family in report.families] == [4, 4]  # two reward processes of two each
    assert not [p for p in psutil.process_iter(["cmdline"]) if MARK in (p.info["cmdline"] or [])]


def test_the_protections_in_force_are_logged(report: Report) -> None:
    assert report.machine.log in report.log


def test_no_program_has_reached_the_network(report: Report, listener: socket.socket) -> None:
    if "namespaces" in report.machine.protections:
        with pytest.raises(BlockingIOError):
            listener.accept()


async def test_tests_that_cannot_be_read_are_an_error_not_a_zero() -> None:
    setup = Setup(type="Code", function="", answer_field="", timeout_seconds=5, import_paths=[])
    rows: list[dict[str, Any]] = [{}, {"tests": []}, {"tests": [{"input": ""}]}, {"tests": "assert True"}]
    async with RewardPool(setup, num_processes=1) as pool:
        *failures, score = await pool.attempt([ScoreRequest("", "x = 1", row) for row in rows])
    assert all(isinstance(f, RewardFailure) and f.reason == "reward_error" for f in failures)
    assert [f[1].partition(" (")[0] for f in failures] == [
        "KeyError: 'tests'",
        "ValueError: the row's tests are empty",
        "KeyError: 'output'",
    ]
    assert score == Score(1.0, "All tests passed (1).")
