"""The command `asyncrl-runtime`: one subcommand for each kind of process of a job."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_api.run_config import RunConfig

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

ConfigPath = Annotated[Path, typer.Option("--config", help="The job's run configuration (JSON).")]
Host = Annotated[str, typer.Option(help="Address to listen on, or at which the process is reached.")]


@app.command()
def engine(
    config: ConfigPath,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the HTTP API.")] = 30000,
    max_running_requests: Annotated[
        int,
        typer.Option(help="Maximum number of sequences sampled at a time; 0: spec.rollout.maxConcurrency."),
    ] = 0,
    max_total_tokens: Annotated[
        int, typer.Option(help="Maximum number of tokens of all sequences in the cache.")
    ] = 65536,
) -> None:
    """Serve the job's model with the CPU engine, over SGLang's native HTTP API."""

    def run(run_config: RunConfig) -> None:
        from asyncrl_runtime.engine.command import run_engine

        run_engine(
            run_config,
            host,
            port,
            max_running_requests=max_running_requests,
            max_total_tokens=max_total_tokens,
        )

    _run(config, run)


@app.command(name="emulated-engine")
def emulated_engine(
    config: ConfigPath,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the HTTP API.")] = 30000,
    count: Annotated[
        int, typer.Option(help="Number of engines; the others are at /e/1 and so on.", min=1, max=10_000)
    ] = 1,
) -> None:
    """Serve engines that take the time that the job's device model says, and sample random tokens."""

    def run(run_config: RunConfig) -> None:
        from asyncrl_runtime.emulation.http import run_emulated_engines

        run_emulated_engines(run_config, host, port, count)

    _run(config, run)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def sglang(
    context: typer.Context,
    config: ConfigPath,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the HTTP API.")] = 30000,
    gpus: Annotated[int, typer.Option(help="Number of GPUs over which each tensor is split.")] = 1,
) -> None:
    """Serve the job's model with SGLang; further options are passed to SGLang."""

    def run(run_config: RunConfig) -> None:
        from asyncrl_runtime.sglang.command import run_sglang

        run_sglang(run_config, host, port, gpus=gpus, arguments=context.args)

    _run(config, run)


@app.command()
def worker(
    config: ConfigPath,
    name: Annotated[str, typer.Option(help="Name of this worker; a worker that replaces it has the same.")],
    count: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of workers in this process, each with an engine. Number i, from 0, is called "
            "NAME-i, and the ports of its engine and its health checks are i higher.",
        ),
    ] = 1,
    engine_url: Annotated[
        str, typer.Option(help="URL of the worker's engine, or of the first.")
    ] = "http://127.0.0.1:30000",
    host: Host = "127.0.0.1",
    health_port: Annotated[
        int, typer.Option(help="Port for health checks of the worker and its engine.")
    ] = 30001,
) -> None:
    """Run a rollout worker, which takes tickets and returns trajectories; or several."""

    def run(run_config: RunConfig) -> None:
        from asyncrl_runtime.rollout.assemble import run_workers, worker_places

        places = worker_places(name, engine_url, health_port, count)
        asyncio.run(run_workers(run_config, places, host))

    _run(config, run)


@app.command()
def trainer(
    config: ConfigPath,
    attempt: Annotated[int, typer.Option(help="Number of this start of the trainer, from 1.")],
    ranks: Annotated[int, typer.Option(help="Number of data-parallel ranks in this pod.")] = 1,
    node: Annotated[int, typer.Option(help="Index of this pod among the trainer's pods.")] = 0,
    nodes: Annotated[int, typer.Option(help="Number of trainer pods.")] = 1,
    host: Host = "127.0.0.1",
    verify_weights: Annotated[bool, typer.Option(help="Compare checksums of the engines' weights.")] = False,
) -> None:
    """Run the trainer: rank 0 is the controller, and every rank updates the policy."""
    _heed_sigterm()
    from asyncrl_runtime.trainer.launch import launch

    arguments = ["--config", str(config), "--attempt", str(attempt), "--host", host]
    arguments += ["--verify-weights"] if verify_weights else []
    _end(launch(ranks, arguments, node=node, num_nodes=nodes))


@app.command(hidden=True)
def rank(
    config: ConfigPath,
    attempt: Annotated[int, typer.Option()],
    host: Host = "127.0.0.1",
    verify_weights: Annotated[bool, typer.Option()] = False,
) -> None:
    """Run one rank of the trainer; `trainer` starts it."""

    def run(run_config: RunConfig) -> None:
        from asyncrl_runtime.trainer.starting import Start

        start = Start(run_config, attempt)
        with start.reporting() if os.environ["RANK"] == "0" else contextlib.nullcontext():
            from asyncrl_runtime.trainer.assemble import Options, run_rank  # takes as long as torch does

            run_rank(run_config, Options(attempt, host, verify_weights), start)

    _run(config, run)


@app.command(name="eval")
def evaluate(
    config: ConfigPath,
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint; by default the newest.")] = None,
) -> None:
    """Score a checkpoint on the held-out prompts of the job."""

    def run(run_config: RunConfig) -> None:
        from asyncrl_runtime.evaluate import evaluate_checkpoint

        print(evaluate_checkpoint(run_config, step))

    _run(config, run)


@app.command(hidden=True)
def simulate(
    plan: Annotated[Path, typer.Option(help="What `asyncrl simulate` has written: the jobs.")],
    device_model: Annotated[str, typer.Option(help="Name of a device model, or its file.")],
    steps: Annotated[int, typer.Option(help="Steps that are measured.")] = 8,
    price: Annotated[float | None, typer.Option(help="What a GPU costs in an hour.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each job.")] = False,
) -> None:
    """Simulate jobs; `asyncrl simulate` starts it."""
    from asyncrl_runtime.simulation.command import run_plan

    logging.basicConfig(level=logging.ERROR, format="%(name)s: %(message)s")
    try:
        run_plan(plan, device_model, steps, price, as_json=as_json)
    except ExitError as error:
        _fail(error)
    _end(ExitCode.DONE)


@app.command(hidden=True)
def calibrate(
    run: Annotated[Path | None, typer.Option(help="The folder of a run.")] = None,
    engine: Annotated[str | None, typer.Option(help="The URL of an engine that nobody uses.")] = None,
    base: Annotated[str | None, typer.Option(help="Device model for what cannot be derived.")] = None,
) -> None:
    """Print a device model; `asyncrl calibrate` starts it."""
    from datetime import UTC, datetime

    from asyncrl_runtime.calibration.command import calibrate as measure

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(measure(run, engine, base, lambda: datetime.now(UTC)), end="")
    except ExitError as error:
        _fail(error)
    _end(ExitCode.DONE)


@app.command()
def audit(
    folder: Annotated[Path, typer.Argument(help="The job's folder, which holds ledger.jsonl.")],
) -> None:
    """Prove from the ledger that every ticket was trained once or discarded; exit with 1 if not."""
    from asyncrl_api.ledger import LedgerError, read_ledger
    from asyncrl_runtime.history.audit import audit as audit_history
    from asyncrl_runtime.history.audit import render

    path = folder / "ledger.jsonl"
    if not path.exists():
        _fail(ExitError(ExitCode.USAGE, f"{path}: no ledger there; name the folder of a run"))
    try:
        result = audit_history(read_ledger(path))
    except LedgerError as error:
        _fail(ExitError(ExitCode.UNUSABLE, str(error)))
    print(render(result))
    raise typer.Exit(0 if result.is_clean else 1)


def _run(config_path: Path, process: Callable[[RunConfig], None]) -> NoReturn:
    """Run a process to its end and exit with one of the codes in asyncrl_api.exits."""
    _heed_sigterm()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        config = RunConfig.load(config_path)
        sys.path[:0] = [str(path) for path in config.import_paths]
        process(config)
    except ExitError as error:
        _fail(error)
    except Exception as error:
        logging.exception("this should not have happened")
        _fail(ExitError(ExitCode.TRY_AGAIN, f"{type(error).__name__}: {error}"))
    _end(ExitCode.DONE)


def _heed_sigterm() -> None:
    """End on SIGTERM from the very start, as every process does except the first one of a container.

    That one ignores signals for which it has no handler, so that its pod would wait until its grace period
    is over. Once a process is up, it replaces this handler with its own.
    """
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))


def _fail(error: ExitError) -> NoReturn:
    print(f"asyncrl-runtime: {error}", file=sys.stderr)
    _end(error.code)


def _end(code: int) -> NoReturn:
    """Exit at once, because an abandoned collective or user code may have left a thread that never ends."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if code < 0:  # a signal ended a rank: end by the same one, so that it counts as a disruption
        with contextlib.suppress(OSError):  # SIGKILL has no handler that could be reset
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
        os._exit(128 - code)  # the first process of a container is not ended by its own signal
    os._exit(code)


if __name__ == "__main__":
    app()
