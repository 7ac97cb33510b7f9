"""A job's real processes under a test's control: started one by one, killed, started again.

Commands, files and ports are those of the local runner; the test alone decides what is started when.
"""

import asyncio
import json
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from asyncrl_api.job import AsyncRLJob
from asyncrl_api.ledger import History, read_ledger
from asyncrl_api.marks import merge
from asyncrl_api.names import NatsAddress
from asyncrl_api.parsing import parse_job
from asyncrl_api.report import Report
from asyncrl_api.run_config import RunConfig
from asyncrl_operator.layout import Process, plan
from asyncrl_operator.local import run_folder
from asyncrl_operator.local.local_run import LocalPlaces, environment, find_program, free_ports
from asyncrl_operator.local.run_folder import RunFolder
from asyncrl_runtime.contract.messages import Group, GroupPart, Tombstone, decode
from asyncrl_runtime.transport.broker import Broker
from asyncrl_runtime.transport.reader import OrderedReader
from support.engines.tiny_models import tiny_model
from support.jobs.forked_processes import ForkedProcess
from support.jobs.kill_after import arm
from support.jobs.nats_server import NatsServer, free_port
from support.paths import USER_CODE

AnyProcess = ForkedProcess | subprocess.Popen[bytes]


def build_job(model_folder: Path | None = None, **overrides: Any) -> AsyncRLJob:
    """A job so small that a step takes a tenth of a second; `overrides` are merged into its spec."""
    spec: dict[str, Any] = {
        "model": {
            "source": f"file://{model_folder or tiny_model()}",
            "dtype": "Float32",
            "contextLength": 64,
        },
        "dataset": {"source": "harness_data:rows"},
        "reward": {"type": "Function", "function": "harness_data:reward"},
        "sampling": {"groupSize": 2, "maxNewTokens": 8},
        "training": {
            "batchSize": 2,
            "maxSteps": 6,
            "minibatches": 2,
            "tokensPerMicroBatch": 512,
            "learningRate": 1e-3,
        },
        "staleness": {"maxVersions": 2},
        "gpuBudget": {"total": 2, "allocation": "None"},
        "rollout": {"engine": {"type": "CPU"}},
        "trainer": {"deepspeed": {"zeroStage": 0}},
        "checkpoint": {"location": {"claimName": "c"}, "everySteps": 2},
        "messaging": {"embedded": {"storage": {"size": "1Gi"}}},
    }
    return parse_job(
        {
            "apiVersion": "asyncrl.dev/v1alpha1",
            "kind": "AsyncRLJob",
            "metadata": {"name": "harness"},
            "spec": merge(spec, overrides),
        }
    )


class JobHarness:
    """The processes of one job on one NATS server."""

    def __init__(self, folder: Path, nats: NatsServer, job: AsyncRLJob) -> None:
        self.nats = nats
        self.job = job
        self.folder = RunFolder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config: RunConfig = run_folder.write(
            self.folder, job, nats_url=nats.url, cache=folder / "cache", import_path=USER_CODE
        )
        self._places = LocalPlaces(str(self.folder.config), None, free_ports(job.spec))
        self._plan: dict[str, Process] = {p.name: p for p in plan(job, self._places).processes}
        self._running: dict[str, AnyProcess] = {}
        self.attempt = 0

    def __enter__(self) -> "JobHarness":
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._running):
            self.kill(name)

    def start_rollout(self, replica: int = 0, spoil_engine: Callable[[], None] | None = None) -> None:
        """Start an engine and its worker.

        Args:
            spoil_engine: puts a fault into the engine's process.
        """
        engine = f"rollout-{replica}-engine"
        self._fork(engine, self._plan[engine].command[1:], spoil_engine)
        if (receiver := f"rollout-{replica}-receiver") in self._plan:
            self.start(receiver)
        self.start(f"rollout-{replica}-worker")

    def start(self, name: str) -> ForkedProcess:
        return self._fork(name, self._plan[name].command[1:])

    def engine_port(self, replica: int) -> int:
        return self._places.engine_address(replica)[1]

    def start_trainer(self, *, kill_after: str | None = None, ranks: int = 1) -> AnyProcess:
        """Start the next attempt; a single rank without its launcher.

        Args:
            kill_after: `module:Class.method#n`: SIGKILL right after the n-th call of it returned.
        """
        self.attempt += 1
        arguments = ["--config", str(self.folder.config), "--attempt", str(self.attempt)]
        if ranks == 1:
            prepare = None if kill_after is None else partial(arm, kill_after)
            return self._fork("trainer", ["rank", *arguments], prepare)
        command = [find_program("asyncrl-runtime"), "trainer", *arguments, "--ranks", str(ranks)]
        with self.folder.log("trainer").open("ab") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=USER_CODE, env=environment()
            )
        self._running["trainer"] = process
        return process

    def _fork(
        self, name: str, arguments: Sequence[str], prepare: Callable[[], None] | None = None
    ) -> ForkedProcess:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **address}
        process = ForkedProcess(
            arguments,
            cwd=USER_CODE,
            env=environment() | alone,
            log=self.folder.log(name),
            prepare=prepare,
        )
        self._running[name] = process
        return process

    def signal(self, name: str, number: int) -> None:
        self._running[name].send_signal(number)

    def kill(self, name: str) -> None:
        """Kill it, and wait for its end."""
        process = self._running.pop(name)
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()

    def wait(self, name: str, seconds: float = 90) -> int:
        """Wait for a process to end by itself."""
        try:
            code = self._running[name].wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{name} still runs after {seconds} s\n{self.log_tail(name)}") from error
        del self._running[name]
        return code

    def wait_until(self, condition: Callable[[], bool], seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{condition}\n{self.log_tail('trainer')}"
            for name, process in self._running.items():
                assert process.poll() is None, f"{name} ended\n{self.log_tail(name)}"
            time.sleep(0.05)

    def log_tail(self, name: str, lines: int = 30) -> str:
        return "\n".join(self.folder.log(name).read_text(errors="replace").splitlines()[-lines:])

    def log_text(self, name: str) -> str:
        return self.folder.log(name).read_text(errors="replace")

    @property
    def report(self) -> Report | None:
        return Report.load(self.folder.report)

    @property
    def step(self) -> int:
        report = self.report
        return report.step if report is not None else 0

    @property
    def history(self) -> History:
        return read_ledger(self.folder.ledger)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.folder.metrics.read_text().splitlines()]


class Recorder:
    """Keeps every prompt group that a job's workers publish, before the trainer purges it."""

    def __init__(self, harness: JobHarness) -> None:
        self.groups: dict[int, Group] = {}
        self._harness = harness
        self._task: asyncio.Task[None] | None = None
        self._broker: Broker | None = None

    async def __aenter__(self) -> "Recorder":
        config = self._harness.config
        self._broker = await Broker.connect(NatsAddress(url=config.nats.url), config.names, "recorder")
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None and self._broker is not None
        self._task.cancel()
        await self._broker.close()

    async def _read(self) -> None:
        assert self._broker is not None
        names = self._harness.config.names
        async for message in OrderedReader(self._broker, names.trajectory_stream, 1):
            result = decode(message.data, Group, GroupPart, Tombstone)
            if isinstance(result, Group):
                self.groups.setdefault(result.ticket, result)


async def until(condition: Callable[[], bool], seconds: float = 90) -> None:
    """Wait beside other tasks of the loop."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, condition
        await asyncio.sleep(0.05)
