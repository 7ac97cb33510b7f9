"""The command `asyncrl`: run, plan, simulate, calibrate, validate, audit, eval."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from asyncrl_api.doubts import doubts_about
from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_api.host_memory import HostMemory, host_memory
from asyncrl_api.job import AsyncRLJob
from asyncrl_api.parsing import SpecError, apply_overrides, load_documents, parse_job, validate
from asyncrl_api.report import Report
from asyncrl_api.trajectory_room import TrajectoryRoom, trajectory_room
from asyncrl_operator.layout import Plan
from asyncrl_operator.layout import plan as plan_job
from asyncrl_operator.local import run_folder
from asyncrl_operator.local.local_run import (
    LocalPlaces,
    LocalRun,
    check_runnable,
    find_program,
    free_ports,
    write_nats_config,
)
from asyncrl_operator.local.progress import Display, render_end
from asyncrl_operator.local.run_folder import RunFolder
from asyncrl_operator.local.sweep import simulation_plan

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Run and inspect asynchronous RL jobs.",
)

Manifest = Annotated[Path, typer.Argument(help="An AsyncRLJob manifest (YAML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a field of the manifest: spec.path=value; may be repeated."),
]
STOPPED = 130
"""The exit code after Ctrl-C, as a shell expects it."""


@app.command()
def run(
    file: Manifest,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/<name>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    overrides: Overrides = None,
    verify_weights: Annotated[
        bool, typer.Option(help="After each update, prove by checksums that all engines hold equal weights.")
    ] = False,
) -> None:
    """Run a job on this machine: NATS, engines, workers and the trainer."""

    def command() -> int:
        job = _load(file, overrides)
        check_runnable(job)
        folder = RunFolder(out or Path("runs") / job.metadata.name)
        if resume:
            run_folder.check_may_resume(folder, job)
        else:
            run_folder.check_is_new(folder)
        folder.path.mkdir(parents=True, exist_ok=True)
        with run_folder.lock(folder):
            settings = [word for override in overrides or [] for word in ("--set", override)]
            words = ["asyncrl", "run", str(file), "--out", str(folder.path), "--resume", *settings]
            again = shlex.join(words)
            return _run_job(job, folder, file.absolute().parent, again, verify_weights)

    _exit(command)


def _run_job(job: AsyncRLJob, folder: RunFolder, directory: Path, again: str, verify_weights: bool) -> int:
    """Run a job to its end and print where its results are.

    Args:
        again: the command that continues the run.
    """
    ports = free_ports(job.spec)
    shared = job.spec.messaging.shared.url if job.spec.messaging.mode == "Shared" else ""
    nats_url = shared or f"nats://127.0.0.1:{ports['nats']}"
    run_folder.write(folder, job, nats_url=nats_url, cache=_model_cache(), import_path=directory)
    nats_config = None if shared else str(write_nats_config(folder, job.spec, ports["nats"]).absolute())
    places = LocalPlaces(str(folder.config.absolute()), nats_config, ports)
    local = LocalRun(job, folder, places, directory, Display(Console()), verify_weights=verify_weights)
    is_finished = local.run()
    report = Report.load(folder.report)
    if report is not None:
        print(render_end(report, folder=str(folder.path), metrics=str(folder.metrics)))
    if is_finished:
        if job.spec.messaging.embedded.storage.type == "Ephemeral":
            shutil.rmtree(folder.nats, ignore_errors=True)
        return ExitCode.DONE
    print(f"{_where_it_stopped(report)}; go on with: {again}")
    return STOPPED


def _where_it_stopped(report: Report | None) -> str:
    if report is not None and report.state == "Stopped":
        return f"stopped at step {report.step}"
    if report is None or report.last_checkpoint is None:
        return "ended before the first checkpoint"
    return f"ended without writing a checkpoint; the last one is of step {report.last_checkpoint.step}"


@app.command()
def plan(file: Manifest, overrides: Overrides = None) -> None:
    """Print the groups, processes, GPUs and commands of a job without starting anything."""

    def command() -> int:
        job = _load(file, overrides)
        config = str(Path("runs") / job.metadata.name / "config.json")
        is_shared = job.spec.messaging.mode == "Shared"
        nats_config = None if is_shared else str(Path("runs") / job.metadata.name / "nats" / "nats.conf")
        job_plan = plan_job(job, LocalPlaces(config, nats_config, {}))
        print(render_plan(job_plan))
        print(render_memory(host_memory(job.spec, max(1, job_plan.split.trainer))))
        if not is_shared and (text := render_room(trajectory_room(job.spec))):
            print(text)
        return ExitCode.DONE

    _exit(command)


@app.command()
def simulate(
    file: Manifest,
    device_model: Annotated[
        str, typer.Option(help="Name of a device model that comes with asyncrl, or a YAML file.")
    ],
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="Compare values of gpus, split (ROLLOUT+TRAINER) or maxVersions: NAME=VALUE,VALUE; may be "
            "repeated."
        ),
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="What a GPU costs in an hour; adds what a step costs.", min=0)
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps that are measured.", min=1, max=10_000)] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each job.")] = False,
    overrides: Overrides = None,
) -> None:
    """Say how fast a job would run on a cluster: the real runtime in virtual time, on emulated GPUs."""

    def command() -> int:
        plan = simulation_plan(_load_document(file), overrides or [], sweep or [])
        arguments = ["simulate", "--device-model", device_model, "--steps", str(steps)]
        arguments += ["--price", str(price)] if price is not None else []
        arguments += ["--json"] if as_json else []
        with tempfile.TemporaryDirectory(prefix="asyncrl-") as folder:
            path = Path(folder) / "plan.json"
            path.write_text(plan.model_dump_json(by_alias=True, exclude_none=True))
            return _run_program("asyncrl-runtime", *arguments, "--plan", str(path))

    _exit(command)


@app.command()
def calibrate(
    folder: Annotated[
        Path | None, typer.Argument(help="The folder of a run of ten steps or more on the devices.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="The URL of an engine on the devices that nobody uses meanwhile.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Device model from which what cannot be derived is taken.")
    ] = None,
) -> None:
    """Print a device model of your devices, for `asyncrl simulate`: from a run, from an engine, or both."""
    arguments = ["--run", str(folder)] if folder is not None else []
    arguments += ["--engine", engine] if engine is not None else []
    arguments += ["--base", base] if base is not None else []
    _hand_over("asyncrl-runtime", "calibrate", *arguments)


@app.command(name="validate")
def validate_files(
    files: Annotated[list[Path], typer.Argument(help="AsyncRLJob manifests (YAML).")],
) -> None:
    """List every error in every file, with field, value and rule; exit with 1 if there are any.

    What is allowed but hardly meant is a warning.
    """
    found = {file: _errors_of(file) for file in files}
    for file, errors in found.items():
        print("\n".join(errors or [f"{file}: valid", *_warnings_of(file)]))
    raise typer.Exit(1 if any(found.values()) else 0)


@app.command()
def audit(
    folder: Annotated[Path, typer.Argument(help="A run folder, or the job's folder on its claim.")],
) -> None:
    """Prove from the ledger that every ticket was trained in exactly one step or counted as discarded."""
    _hand_over("asyncrl-runtime", "audit", str(folder))


@app.command(name="eval")
def evaluate(
    folder: Annotated[Path, typer.Argument(help="The folder of a run.")],
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint; by default the newest.")] = None,
) -> None:
    """Score a checkpoint on the held-out prompts of the job."""
    config = RunFolder(folder).config
    if not config.exists():
        _fail(ExitError(ExitCode.USAGE, f"{folder} holds no run; name the folder of a run"))
    arguments = ["eval", "--config", str(config)]
    _hand_over("asyncrl-runtime", *arguments, *(["--step", str(step)] if step is not None else []))


def render_plan(job_plan: Plan) -> str:
    """Return a plan as text."""
    split = job_plan.split
    lines = [
        f"GPUs: trainer {split.trainer}, rollout {split.rollout} ({split.num_replicas} x "
        f"{split.gpus_per_replica}), idle {split.idle} ({split.reason})"
    ]
    for group in job_plan.groups:
        lines.append(f"{group.role}: {group.num_replicas} replica(s), {group.gpus} GPU(s)")
        for process in group.processes:
            lines.append(f"  {process.name}: {process.gpus} GPU(s)")
            lines.append(f"    {' '.join(process.command)}")
    return "\n".join(lines)


def render_memory(memory: HostMemory | None) -> str:
    """Return what host memory the trainer needs beside its processes, for copies."""
    needed = "as many bytes as what is trained, divided among its ranks (model.parameterCount tells how many)"
    if memory is not None:
        needed = (
            f"{memory.share_bytes / 2**20:,.0f} MiB on each rank, and up to "
            f"{memory.bucket_bytes / 2**20:,.0f} MiB more on rank 0 for buckets"
        )
    return f"trainer memory: the copy from which engines get weights takes {needed}"


def render_room(room: TrajectoryRoom) -> str:
    """Return what happens if the broker's storage is not as large as was meant; empty if it is."""
    if room.num_steps >= room.wanted_steps:
        return ""
    return (
        f"trajectories: up to {room.step_bytes / 2**20:,.0f} MiB a step, so that {room.num_steps} steps fill "
        f"the {room.num_bytes / 2**20:,.0f} MiB for them; a checkpoint is then made earlier than "
        "checkpoint.everySteps says, to purge behind it\n"
        f"  with messaging.embedded.storage.size {room.wanted_size} there is room for {room.wanted_steps} "
        "steps, even if all samples are as long as model.contextLength"
    )


def _warnings_of(file: Path) -> list[str]:
    """Return what is unlikely to be meant in a file whose jobs are valid."""
    doubts = [doubts_about(parse_job(document).spec.algorithm) for document in load_documents(file)]
    return [f"{file}: warning: {doubt}" for doubt in doubts if doubt]


def _errors_of(file: Path) -> list[str]:
    """Return everything that is wrong with a file; each line names the file, and the document of several."""
    try:
        documents = load_documents(file)
    except SpecError as error:
        return [str(each) for each in error.errors]
    except OSError as error:
        return [f"{file}: {error.strerror}"]
    several = len(documents) > 1
    return [
        f"{file}{f', document {number}' if several else ''}: {error}"
        for number, document in enumerate(documents, start=1)
        for error in validate(document)
    ]


def _load(file: Path, overrides: list[str] | None) -> AsyncRLJob:
    document: Any = apply_overrides(_load_document(file), overrides or [])
    return parse_job(document)


def _load_document(file: Path) -> Any:
    try:
        documents = load_documents(file)
    except OSError as error:
        raise ExitError(ExitCode.USAGE, f"{file}: {error.strerror}") from error
    if len(documents) != 1:
        raise ExitError(ExitCode.USAGE, f"{file}: holds {len(documents)} documents; one job is run at a time")
    return documents[0]


def _model_cache() -> Path:
    configured = os.environ.get("ASYNCRL_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "asyncrl"


def _hand_over(program: str, *arguments: str) -> NoReturn:
    """Run another of our programs instead of this one."""
    _exit(lambda: _run_program(program, *arguments))


def _run_program(program: str, *arguments: str) -> int:
    """Run another of our programs to its end; return its exit code."""
    return subprocess.run([find_program(program), *arguments], check=False).returncode


def _exit(command: Callable[[], int]) -> NoReturn:
    try:
        code = command()
    except SpecError as error:
        _fail(ExitError(ExitCode.REFUSED, str(error)))
    except ExitError as error:
        _fail(error)
    except BrokenPipeError:  # whoever read the output has left
        raise
    except OSError as error:
        _fail(ExitError(ExitCode.TRY_AGAIN, f"{error.filename or 'this machine'}: {error.strerror}"))
    raise typer.Exit(int(code))


def _fail(error: ExitError) -> NoReturn:
    print(f"asyncrl: {error}", file=sys.stderr)
    raise typer.Exit(int(error.code))
