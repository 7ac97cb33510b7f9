"""A conversion may take as long as it moves."""

import subprocess
import sys

import psutil
import pytest

from asyncrl_runtime.trainer.update import saved_files
from asyncrl_runtime.trainer.update.saved_files import CONVERSION_STALLED_SECONDS, ignore, watch


@pytest.fixture(autouse=True)
def short_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_files, "LOOK_SECONDS", 0.01)


class Time:
    """A clock that moves by more than half of what is borne at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.6 * CONVERSION_STALLED_SECONDS
        return self.now


def run(program: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)


def test_it_is_waited_for_while_it_writes() -> None:
    process, amounts, told = run("import time; time.sleep(600)"), iter(range(1000)), list[int]()
    assert process.stdout is not None

    def written() -> int:
        amount = next(amounts)
        if amount == 30:
            process.terminate()
        return amount

    time = Time()
    assert watch(process, written, told.append, time) == -15
    process.stdout.close()
    assert len(told) >= 30 and time.now > 10 * CONVERSION_STALLED_SECONDS


def test_one_that_neither_reads_nor_writes_is_ended_with_its_workers() -> None:
    program = (
        "import subprocess, sys; c = subprocess.Popen(['sleep', '600']); print(c.pid, flush=True); c.wait()"
    )
    process = run(program)
    assert process.stdout is not None
    worker = psutil.Process(int(process.stdout.readline()))
    assert watch(process, lambda: 0, ignore, Time()) is None
    process.stdout.close()
    worker.wait(10)
    assert not worker.is_running() and process.returncode == -9
