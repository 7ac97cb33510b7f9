"""The command `asyncrl-runtime worker` as a process: what it takes, and several workers in one."""

import contextlib
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

from asyncrl_api.names import JobNames, NatsAddress
from asyncrl_api.run_config import RunConfig
from asyncrl_operator.local.local_run import environment, find_program
from asyncrl_runtime.contract.messages import PolicyVersion
from support.engines.forked_engines import ForkedEngine
from support.engines.rollout_scene import SPEC, Scene, open_scene, publish, versions
from support.engines.tiny_models import tiny_model
from support.jobs.job_harness import until
from support.paths import USER_CODE

MAX_MEBIBYTES = 120
"""With torch it would be 340."""
ENGINES = 3


@pytest.fixture
async def scene(nats_address: NatsAddress, names: JobNames) -> AsyncIterator[Scene]:
    async with open_scene(nats_address, names) as scene:
        yield scene


@pytest.fixture
def config(tmp_path: Path, nats_address: NatsAddress, names: JobNames) -> Path:
    """The run configuration of a job whose streams the scene has made."""
    namespace, _, name = names.job.partition("_")
    config = RunConfig(
        namespace=namespace,
        name=name,
        uid="u",
        spec=SPEC,
        nats=nats_address,
        job_folder=tmp_path,
        live_file=tmp_path / "live",
        report_file=tmp_path / "report",
        model_cache=tmp_path / "cache",
        import_paths=(USER_CODE,),
    )
    assert config.names == names
    config.save(tmp_path / "config.json")
    return tmp_path / "config.json"


@contextlib.contextmanager
def worker(config: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [find_program("asyncrl-runtime"), "worker", "--config", str(config), *options]
    with config.with_name("worker.log").open("ab") as log:
        process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def ports_in_a_row(count: int) -> int:
    """Return the first of so many free ports."""
    while True:
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                for number in range(port + 1, port + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", number))
            except (OSError, OverflowError):
                continue
            return port


def health(port: int) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def peak_mebibytes(process: psutil.Process) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


async def test_several_workers_of_one_process_have_engines_of_their_own(scene: Scene, config: Path) -> None:
    """The process takes no more than one worker may; and what befalls an engine is its own worker's alone."""
    port, health_port = ports_in_a_row(ENGINES), ports_in_a_row(ENGINES)
    engines = [ForkedEngine(tiny_model(), port=port + i) for i in range(ENGINES)]
    names = [f"w-{i}" for i in range(ENGINES)]
    address = ["--engine-url", f"http://127.0.0.1:{port}", "--health-port", str(health_port)]
    try:
        for engine in engines:
            await engine.wait_until_it_answers()
        with worker(config, "--name", "w", "--count", str(ENGINES), *address) as process:
            await until(lambda: [scene.state(name) for name in names] == ["empty"] * ENGINES)
            assert len({scene.beat(name).incarnation for name in names}) == ENGINES
            assert [health(health_port + i) for i in range(ENGINES)] == [503] * ENGINES
            published = await publish(scene.publisher(), PolicyVersion(1, 0), seed=0)
            assert published.engines == tuple(names)
            seen: set[str] = set()
            while seen != set(names):
                groups = await scene.sampled(await scene.issue(ENGINES))
                assert all(versions(group) == {PolicyVersion(1, 0)} for group in groups)
                seen |= {group.worker for group in groups}
            assert [health(health_port + i) for i in range(ENGINES)] == [200] * ENGINES

            engines[1].kill()
            await until(lambda: [scene.state(name) for name in names] == ["ready", "down", "ready"])
            assert [health(health_port + i) for i in range(ENGINES)] == [200, 503, 200]
            others = await scene.sampled(await scene.issue(4))
            assert {group.worker for group in others} <= {"w-0", "w-2"}

            own = psutil.Process(process.pid)
            taken = {p.pid: peak_mebibytes(p) for p in (own, *own.children(recursive=True))}
            assert len(taken) > 1 and max(taken.values()) < MAX_MEBIBYTES, taken
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    finally:
        for engine in engines:
            await engine.close()


def test_several_workers_need_a_port_to_count_from(config: Path) -> None:
    with worker(config, "--name", "w", "--count", "2", "--engine-url", "http://engine") as process:
        assert process.wait(60) == 64
    assert "--count 2 it must have a port" in config.with_name("worker.log").read_text()
