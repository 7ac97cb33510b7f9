"""The second executor: it runs a job's plan as processes on this machine.

It starts the same commands that pods run, restarts what dies according to the failure policy, probes engines
and workers as the kubelet would, and shows the state of the job. It has one thread and one loop.
"""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import httpx

from asyncrl_api.base import parse_quantity
from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_api.job import AsyncRLJob, Spec
from asyncrl_api.parsing import FieldError, SpecError
from asyncrl_api.processes import die_with_parent
from asyncrl_api.report import Report, read_report
from asyncrl_api.run_config import SGLANG_PYTHON
from asyncrl_operator.decide.clocks import Clocks, Parts, advance, deadlines, is_up
from asyncrl_operator.decide.hang import HUNG_CODE, Signs, hung
from asyncrl_operator.decide.restart_policy import (
    CONTAINER_RESET_SECONDS,
    MESSAGING_MAX_FAILURES,
    ContainerBackoff,
    GiveUp,
    Restart,
    TrainerBudget,
)
from asyncrl_operator.layout import NATS_HEALTH_PORT, Plan, Process, plan, plan_split, trainer_command
from asyncrl_operator.local.progress import Display
from asyncrl_operator.local.run_folder import RunFolder
from asyncrl_operator.render.messaging import render_nats_config

LOOPBACK = "127.0.0.1"
TICK_SECONDS = 0.1
GRACE_SECONDS = 10.0
"""The time that workers and engines have to end; the trainer has `trainer.terminationGracePeriodSeconds`."""
DISK_SECONDS, DISK_RETRY_SECONDS = 600.0, 5.0
"""How long a folder is waited for that does not take a process's log, and how often it is tried."""
REPORT_DELAY_SECONDS = 15.0
"""How late a report may be although the trainer is well: a busy machine writes it every 5 s."""
LOG_LINES = 15
"""The number of last lines of a failed process's log that are shown to the user."""
LOG_BYTES = 2**16
"""The part of a log, at its end, in which these lines are looked for."""


@dataclass(frozen=True)
class LocalPlaces:
    """Implements layout.Places: everything is on loopback, on ports that were free."""

    config: str
    nats_config: str | None
    ports: Mapping[str, int]

    def trainer_host(self) -> str:
        return LOOPBACK

    def nats_health_address(self) -> tuple[str, int]:
        return LOOPBACK, self.ports.get("nats-health", NATS_HEALTH_PORT)

    def engine_address(self, replica: int) -> tuple[str, int]:
        return LOOPBACK, self.ports.get(f"engine-{replica}", 30000 + 2 * replica)

    def health_address(self, replica: int) -> tuple[str, int]:
        return LOOPBACK, self.ports.get(f"health-{replica}", 30001 + 2 * replica)


def free_ports(spec: Spec) -> dict[str, int]:
    """Return a port for each server of the job; all of them are free at this moment."""
    names = ["nats", "nats-health"]
    for replica in range(plan_split(spec).num_replicas):
        names += [f"engine-{replica}", f"health-{replica}"]
    sockets = {name: socket.socket() for name in names}
    try:
        for each in sockets.values():
            each.bind((LOOPBACK, 0))
        return {name: each.getsockname()[1] for name, each in sockets.items()}
    finally:
        for each in sockets.values():
            each.close()


def local_refusals(spec: Spec, *, has_sglang: bool) -> list[FieldError]:
    """Return the fields of a manifest that cannot be honored on this machine, each with a remedy."""
    refusals = []
    if spec.rollout.engine.type == "SGLang" and not has_sglang:
        rule = f"{SGLANG_PYTHON} names no interpreter with SGLang: --set spec.rollout.engine.type=CPU"
        refusals.append(FieldError("spec.rollout.engine.type", rule, "SGLang"))
    if spec.gpu_budget.allocation != "None":
        rule = "this machine's processes are not GPUs: --set spec.gpuBudget.allocation=None"
        refusals.append(FieldError("spec.gpuBudget.allocation", rule, spec.gpu_budget.allocation))
    if spec.suspend:
        refusals.append(FieldError("spec.suspend", "a suspended job has no processes: set it to false", True))
    return refusals


@dataclass
class RunningProcess:
    """A process of the plan, both while it runs and while it waits to be started again."""

    process: Process
    popen: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    restart_at: float | None = None
    backoff: ContainerBackoff = field(default_factory=ContainerBackoff)
    num_starts: int = 0
    probed_at: float = 0.0
    failed_probes: int = 0
    answered: bool = False
    """Whether a probe has succeeded since the last start; until then the process is still starting."""
    hangs: str = ""
    """Why it was killed, if it hung."""
    unstartable_since: float | None = None
    """The time from which on it could not be started again; None if it could."""

    def is_up(self, now: float) -> bool:
        """Whether it runs; after a failure it counts as up only after a while, because it may fail again."""
        has_failed = self.backoff.num_failures > 0 and now - self.started_at < CONTAINER_RESET_SECONDS
        return self.popen is not None and not has_failed


class ProcessFailed(ExitError):
    """The run cannot go on."""


class LocalRun:
    """Runs one plan to its end.

    Args:
        folder: the run's folder, prepared and locked by the caller.
        clock: monotonic time, in seconds.
        verify_weights: whether the trainer compares the engines' checksums.
    """

    def __init__(
        self,
        job: AsyncRLJob,
        folder: RunFolder,
        places: LocalPlaces,
        working_directory: Path,
        display: Display,
        *,
        verify_weights: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec = job.spec
        self._folder = folder
        self._places = places
        self._directory = working_directory
        self._display = display
        self._clock = clock
        self._extra = ("--verify-weights",) if verify_weights else ()
        self._plan: Plan = plan(job, places)
        self._attempt = folder.last_attempt()
        self._budget = TrainerBudget(job.spec.failure_policy.trainer)
        self._running = {process.name: RunningProcess(process) for process in self._plan.processes}
        for running in self._running.values():
            if running.process.role == "messaging":
                running.backoff.max_failures = MESSAGING_MAX_FAILURES
        self._stop_requests = 0
        self._clocks = Clocks(active_since=clock())
        self._was_up = False
        self._heard, self._heard_at = "", clock()
        self._report_fault = ""
        self._http = httpx.Client(timeout=2, trust_env=False)

    def run(self) -> bool:
        """Run until the trainer has finished or has been stopped with Ctrl-C.

        Returns:
            Whether it has finished.

        Raises:
            ProcessFailed: the job has failed; the message shows a log's last lines and names its file.
        """
        with self._signals():
            try:
                for running in self._running.values():
                    self._start(running)
                self._check_deadlines(self._clock())  # all are up now; a probe may outlast the first of them
                while not self._tick():
                    time.sleep(TICK_SECONDS)
                self._display.show(self._report(), self._attempt)  # the final report
            finally:
                self._end_all()
                self._display.close()
        trainer = self._running["trainer"].popen
        return trainer is not None and trainer.returncode == ExitCode.DONE

    # -- one round

    def _report(self) -> Report | None:
        """Return the trainer's report; what is wrong with it is said once, though it is read all the time."""
        try:
            report, fault = read_report(self._folder.report.read_bytes())
        except OSError:  # there is none yet, or its disk is away for a moment
            return None
        if fault and fault != self._report_fault:
            self._display.note(f"the trainer's report {self._folder.report}: {fault}")
        self._report_fault = fault
        return report

    def _tick(self) -> bool:
        """Look at every process once; return True when the job is over."""
        now = self._clock()
        report = self._report()
        self._display.show(report, self._attempt)
        if self._stop_requests:
            return self._stop_trainer()
        for running in self._running.values():
            if running.popen is None:
                if running.restart_at is not None and now >= running.restart_at:
                    self._start_again(running, now)
            elif (code := running.popen.poll()) is not None:
                if running.process.role == "trainer" and code == 0:
                    return True
                self._ended(running, code, report)
            elif running.process.probe is not None:
                self._probe(running, now)
        self._check_hang(report, now)
        self._check_deadlines(now)
        return False

    def _ended(self, running: RunningProcess, code: int, report: Report | None) -> None:
        name = running.process.name
        lived = self._clock() - running.started_at
        running.popen = None
        step = report.step if report is not None else 0
        how = running.hangs or f"{name} {_how(code)}"
        if running.process.role == "trainer":
            decision: Restart | GiveUp = self._budget.ended(HUNG_CODE if running.hangs else code, step)
        else:
            decision = running.backoff.ended(code, lived)
        if isinstance(decision, GiveUp):
            raise ProcessFailed(
                ExitCode(code) if code in set(ExitCode) else ExitCode.TRY_AGAIN,
                f"{how}: {decision.reason}\n{self._log_tail(name)}",
            )
        why = "" if code < 0 else f": {self._last_line(name)}"
        self._display.note(
            f"{name} {_how(code)} after {lived:.0f} s; restarted in {decision.delay_seconds:.1f} s "
            f"(log: {self._folder.log(name)}){why}"
        )
        running.restart_at = self._clock() + decision.delay_seconds

    def _probe(self, running: RunningProcess, now: float) -> None:
        """Probe a process's liveness as the kubelet would, and kill it after too many bad answers."""
        probe = running.process.probe
        assert probe is not None and running.popen is not None
        if now - running.probed_at < probe.period_seconds:
            return
        running.probed_at = now
        try:
            is_good = self._http.get(probe.url).status_code == 200
        except httpx.HTTPError as error:
            is_starting = isinstance(error, httpx.ConnectError) and not running.answered
            if is_starting or running.process.name.endswith("-engine"):
                return  # an engine's probe is answered by its worker, so it may be the worker that is down
            is_good = False
        running.answered |= is_good
        running.failed_probes = 0 if is_good else running.failed_probes + 1
        if running.failed_probes >= probe.failures:
            self._display.note(f"{running.process.name} fails its liveness probe: killed")
            running.failed_probes = 0
            running.popen.kill()

    def _check_hang(self, report: Report | None, now: float) -> None:
        """Kill a trainer that hangs; its end counts as the trainer's own failure."""
        trainer, said = self._running["trainer"], None
        if trainer.popen is None or trainer.hangs:
            return
        if report is not None and report.attempt == self._attempt:
            said = report.seconds_without_progress
            if report.time != self._heard:
                self._heard, self._heard_at = report.time, now
        limit = self._spec.failure_policy.trainer.hang_seconds
        signs = Signs(said, max(self._heard_at, trainer.started_at), REPORT_DELAY_SECONDS)
        trainer.hangs = hung(limit, signs, now)
        if trainer.hangs:
            self._display.note(f"{trainer.hangs}: killed")
            trainer.popen.kill()

    def _check_deadlines(self, now: float) -> None:
        """Fail if the job has been active, pending or short of engines for too long."""
        down = [
            running.process.name
            for running in self._running.values()
            if running.process.role == "rollout" and not running.is_up(now)
        ]
        parts = self._parts(down)
        self._clocks = advance(self._spec, self._clocks, parts, was_up=self._was_up, now=now)
        self._was_up = is_up(parts, was_up=self._was_up)
        for deadline in deadlines(self._spec, self._clocks, parts):
            if now >= deadline.at:
                tail = f"\n{self._log_tail(down[0])}" if down else ""
                raise ProcessFailed(ExitCode.TRY_AGAIN, f"{deadline.reason}: {deadline.message}{tail}")

    def _parts(self, down: Sequence[str]) -> Parts:
        """Return which parts of the job are up; a replica is if both engine and worker are, as in a pod.

        Args:
            down: the names of the replicas' processes that are not up.
        """
        nats = self._running.get("nats")
        total = self._plan.split.num_replicas
        return Parts(
            trainer_runs=self._running["trainer"].popen is not None,
            is_messaging_ready=nats is None or nats.popen is not None,
            ready_engines=total - len({name.rpartition("-")[0] for name in down}),
            engines=total,
        )

    # -- start and stop

    def _start(self, running: RunningProcess) -> None:
        process = running.process
        command = process.command
        if process.role == "trainer":
            self._attempt += 1
            command = trainer_command(
                self._places, attempt=self._attempt, ranks=process.gpus, extra=self._extra
            )
        program = find_program(command[0])
        path = self._folder.log(process.name)
        with path.open("ab") as log:
            # This process has one thread, so code between fork and exec is safe.
            running.popen = subprocess.Popen(
                [program, *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                env=environment(),
                start_new_session=True,  # Ctrl-C reaches this process alone, which stops the others in order
                preexec_fn=die_with_parent,  # noqa: PLW1509  # this process has one thread
            )
        running.started_at = self._clock()
        running.restart_at, running.answered, running.failed_probes, running.hangs = None, False, 0, ""
        running.num_starts += 1

    def _start_again(self, running: RunningProcess, now: float) -> None:
        """Start a process that has ended; a folder that does not take its log is waited for.

        Raises:
            OSError: it has not done so for DISK_SECONDS.
        """
        try:
            self._start(running)
        except OSError as error:
            since = running.unstartable_since = running.unstartable_since or now
            if now - since >= DISK_SECONDS:
                raise
            self._display.note(
                f"{running.process.name}: {error}; tried again in {DISK_RETRY_SECONDS:.0f} s, for "
                f"{DISK_SECONDS:.0f} s in all"
            )
            running.restart_at = now + DISK_RETRY_SECONDS
        else:
            running.unstartable_since = None

    def _stop_trainer(self) -> bool:
        """Let the trainer make its checkpoint; return True when it has ended."""
        trainer = self._running["trainer"]
        if trainer.popen is None or trainer.popen.poll() is not None or self._stop_requests > 1:
            return True
        if self._stop_requests == 1 and trainer.restart_at is None:
            self._display.note("stopping: the trainer makes a checkpoint (Ctrl-C again ends it at once)")
            trainer.popen.terminate()
            trainer.restart_at = self._clock() + self._spec.trainer.termination_grace_period_seconds
        return trainer.restart_at is not None and self._clock() > trainer.restart_at

    def _end_all(self) -> None:
        """End what still runs: the trainer, then workers, engines and the broker. Nothing is left behind."""
        order = ("trainer", "-worker", "-engine", "nats")
        for kind in order:
            alive = [
                r.popen
                for name, r in self._running.items()
                if name.endswith(kind) and r.popen is not None and r.popen.poll() is None
            ]
            for popen in alive:
                popen.terminate()
            deadline = self._clock() + GRACE_SECONDS
            for popen in alive:
                while popen.poll() is None and self._clock() < deadline and self._stop_requests < 2:
                    time.sleep(TICK_SECONDS)
                popen.kill()
                popen.wait()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def requested(number: int, frame: FrameType | None) -> None:
            self._stop_requests += 1

        before = {number: signal.signal(number, requested) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _log_tail(self, name: str) -> str:
        shown = "\n".join(f"  | {line}" for line in self._log_lines(name)[-LOG_LINES:])
        return f"the last lines of {self._folder.log(name)}:\n{shown}"

    def _last_line(self, name: str) -> str:
        """Return the last line of a process's log. asyncrl's own name the cause and the remedy there."""
        return next((line for line in reversed(self._log_lines(name)) if line.strip()), "its log is empty")

    def _log_lines(self, name: str) -> list[str]:
        """Return the last lines of a log; the first of them may be incomplete."""
        path = self._folder.log(name)
        if not path.exists():
            return []
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - LOG_BYTES))
            return log.read().decode(errors="replace").splitlines()


def write_nats_config(folder: RunFolder, spec: Spec, port: int) -> Path:
    """Write the configuration of the embedded server."""
    storage = spec.messaging.embedded.storage
    folder.nats.mkdir(parents=True, exist_ok=True)
    path = folder.nats / "nats.conf"
    path.write_text(
        render_nats_config(
            host=LOOPBACK,
            port=port,
            store_dir=str((folder.nats / "store").absolute()),
            max_store_bytes=parse_quantity(storage.size),
            is_persistent=storage.type == "Persistent",
        )
    )
    return path


def find_program(name: str) -> str:
    """Return the path of a console script of this environment, or of a program on the PATH.

    Raises:
        ExitError: it is not installed.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ExitError(
            ExitCode.USAGE, f"{name} is not installed here: pip install 'asyncrl[local]' brings it"
        )
    return found


def environment() -> dict[str, str]:
    """Return the environment of the processes; each gets one thread, because there are many of them."""
    return {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def check_runnable(job: AsyncRLJob) -> None:
    """Check that a job can run on this machine.

    Raises:
        SpecError: it cannot; names each field that stands in the way.
    """
    has_sglang = SGLANG_PYTHON in os.environ or importlib.util.find_spec("sglang") is not None
    if refusals := local_refusals(job.spec, has_sglang=has_sglang):
        raise SpecError(refusals)


def _how(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
