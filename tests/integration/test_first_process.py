"""The first process of a container: signals that it has no handler for do not reach it."""

import os
import shutil
import signal
import subprocess
import sys

import psutil
import pytest

UNSHARE = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c"]
SECONDS = 30


@pytest.fixture(autouse=True)
def may_make_pid_namespaces() -> None:
    if os.getuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a PID namespace needs root and unshare")


def test_sigterm_ends_it_before_its_own_handler_is_there() -> None:
    code = "from asyncrl_runtime import main; main._heed_sigterm(); print(1, flush=True); input()"
    outer = subprocess.Popen([*UNSHARE, code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert outer.stdout is not None and outer.stdout.readline() == b"1\n"
    [first] = psutil.Process(outer.pid).children()
    first.send_signal(signal.SIGTERM)
    assert outer.wait(SECONDS) == 128 + signal.SIGTERM


def test_a_rank_that_was_killed_is_told_by_the_exit_code() -> None:
    code = "from asyncrl_runtime import main; main._end(-9)"
    assert subprocess.run([*UNSHARE, code], check=False, timeout=SECONDS).returncode == 128 + signal.SIGKILL
