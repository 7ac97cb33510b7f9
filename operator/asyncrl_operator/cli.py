"""`asyncrl`: run, plan, validate, audit, eval."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_api.job import AsyncRLJob
from asyncrl_api.manifests import SpecError, apply_overrides, load_documents, parse_job, validate
from asyncrl_operator import run_folder
from asyncrl_operator.local import (
    LocalPlaces,
    LocalRun,
    check_runnable,
    find_program,
    free_ports,
    write_nats_config,
)
from asyncrl_operator.planner import Plan
from asyncrl_operator.planner import plan as plan_job
from asyncrl_operator.progress import Display, render_end
from asyncrl_operator.run_folder import RunFolder

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Asynchronous RL jobs."
)

Manifest = Annotated[Path, typer.Argument(help="An AsyncRLJob manifest (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="spec.path=value, over the manifest; may be repeated.")
]
STOPPED = 130
"""Exit code after Ctrl-C, as a shell expects it."""


@app.command()
def run(
    file: Manifest,
    out: Annotated[Path | None, typer.Option(help="Run folder; by default runs/<name>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    overrides: Overrides = None,
    verify_weights: Annotated[
        bool, typer.Option(help="After each update, prove by checksums that all engines are equal.")
    ] = False,
) -> None:
    """Run a job on this machine: NATS, engines, workers, trainer."""

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
            return _run_job(job, folder, file.absolute().parent, verify_weights)

    _exit(command)


def _run_job(job: AsyncRLJob, folder: RunFolder, directory: Path, verify_weights: bool) -> int:
    ports = free_ports(job.spec)
    shared = job.spec.messaging.shared.url if job.spec.messaging.mode == "Shared" else ""
    nats_url = shared or f"nats://127.0.0.1:{ports['nats']}"
    run_folder.write(folder, job, nats_url=nats_url, cache=_model_cache(), import_path=directory)
    nats_config = None if shared else str(write_nats_config(folder, job.spec, ports["nats"]).absolute())
    places = LocalPlaces(str(folder.config.absolute()), nats_config, ports)
    console = Console()
    local = LocalRun(job, folder, places, directory, Display(console), verify_weights=verify_weights)
    report = local.run()
    assert report is not None
    console.print(
        render_end(report, folder=str(folder.path), metrics=str(folder.metrics)),
        highlight=False,
        soft_wrap=True,
    )
    if report.state == "Finished":
        if job.spec.messaging.embedded.storage.type == "Ephemeral":
            shutil.rmtree(folder.nats, ignore_errors=True)
        return ExitCode.DONE
    console.print(f"stopped at step {report.step}; go on with: asyncrl run ... --out {folder.path} --resume")
    return STOPPED


@app.command()
def plan(file: Manifest, overrides: Overrides = None) -> None:
    """Print groups, processes, GPUs and commands; start nothing."""

    def command() -> int:
        job = _load(file, overrides)
        config = str(Path("runs") / job.metadata.name / "config.json")
        is_shared = job.spec.messaging.mode == "Shared"
        nats_config = None if is_shared else str(Path("runs") / job.metadata.name / "nats" / "nats.conf")
        print(render_plan(plan_job(job, LocalPlaces(config, nats_config, {}))))
        return ExitCode.DONE

    _exit(command)


@app.command(name="validate")
def validate_files(
    files: Annotated[list[Path], typer.Argument(help="AsyncRLJob manifests (YAML).")],
) -> None:
    """List every error of every file, each with field, value and rule; exit 1 if there are any."""
    num_errors = 0
    for file in files:
        try:
            errors = [error for document in load_documents(file) for error in validate(document)]
        except SpecError as error:
            errors = list(error.errors)
        except OSError as error:
            print(f"{file}: {error.strerror}", file=sys.stderr)
            num_errors += 1
            continue
        for each in errors:
            print(f"{file}: {each}")
        num_errors += len(errors)
        if not errors:
            print(f"{file}: valid")
    raise typer.Exit(1 if num_errors else 0)


@app.command()
def audit(
    folder: Annotated[Path, typer.Argument(help="A run folder, or the job's folder on its claim.")],
) -> None:
    """Prove from the ledger that each ticket was trained in exactly one step or counted as discarded."""
    _hand_over("asyncrl-runtime", "audit", str(folder))


@app.command(name="eval")
def evaluate(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    step: Annotated[int | None, typer.Option(help="Of the checkpoint; by default the newest.")] = None,
) -> None:
    """Score a checkpoint on the held-out prompts."""
    arguments = ["eval", "--config", str(RunFolder(folder).config)]
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


def _load(file: Path, overrides: list[str] | None) -> AsyncRLJob:
    try:
        documents = load_documents(file)
    except OSError as error:
        raise ExitError(ExitCode.USAGE, f"{file}: {error.strerror}") from error
    if len(documents) != 1:
        raise ExitError(ExitCode.USAGE, f"{file}: holds {len(documents)} documents; one job is run at a time")
    document: Any = apply_overrides(documents[0], overrides or [])
    return parse_job(document)


def _model_cache() -> Path:
    configured = os.environ.get("ASYNCRL_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "asyncrl"


def _hand_over(program: str, *arguments: str) -> NoReturn:
    """Run another of our programs in this one's place."""
    try:
        command = [find_program(program), *arguments]
    except ExitError as error:
        _fail(error)
    raise typer.Exit(subprocess.run(command, check=False).returncode)


def _exit(command: Callable[[], int]) -> NoReturn:
    try:
        code = command()
    except SpecError as error:
        _fail(ExitError(ExitCode.REFUSED, str(error)))
    except ExitError as error:
        _fail(error)
    raise typer.Exit(int(code))


def _fail(error: ExitError) -> NoReturn:
    print(f"asyncrl: {error}", file=sys.stderr)
    raise typer.Exit(int(error.code))
