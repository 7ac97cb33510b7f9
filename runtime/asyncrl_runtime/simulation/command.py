"""The command `asyncrl-runtime simulate`: simulates the jobs of a plan, and prints their figures."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_api.simulation import SimulatedJob, SimulationPlan
from asyncrl_runtime.emulation.device import DeviceModel, DeviceModelError, load_device_model
from asyncrl_runtime.simulation.figures import Figures, figures
from asyncrl_runtime.simulation.simulated_job import Setting, simulate
from asyncrl_runtime.simulation.virtual_time import run_virtually

MEMORY_FOLDER = Path("/dev/shm")
"""Where files are in memory: a disk would make virtual time pass more slowly, and nobody reads them later."""


def run_plan(path: Path, device_model: str, steps: int, price: float | None, *, as_json: bool) -> None:
    """Simulate each job of the plan and print what it comes to.

    Args:
        steps: how many steps are measured, after enough for the queues to fill.
        price: what a GPU costs in an hour.

    Raises:
        ExitError: the device model cannot be used, or does not fit a job.
    """
    plan = SimulationPlan.model_validate_json(path.read_text())
    try:
        model = load_device_model(device_model)
    except DeviceModelError as error:
        raise ExitError(ExitCode.REFUSED, str(error)) from error
    for job in plan.jobs:
        check_fits(job, model)
    found = []
    for job in plan.jobs:
        found.append(simulate_job(job, model, steps, price))
        if as_json:
            print(json.dumps({"name": job.name, **found[-1].to_json()}), flush=True)
    if not as_json:
        print(render_one(found[0]) if len(found) == 1 else render_sweep(plan.jobs, found))


def check_fits(job: SimulatedJob, model: DeviceModel) -> None:
    """Refuse a job that the device model says nothing about.

    Raises:
        ExitError: the message names the field.
    """
    spec, size = job.spec, model.engine.gpus
    if job.gpus_per_engine != size:
        raise ExitError(
            ExitCode.REFUSED,
            f"spec.rollout.gpusPerReplica: an engine would have {job.gpus_per_engine} GPUs, but the device "
            f"model describes one of {size}; set it to {size}, or take another device model",
        )
    if spec.workflow.type == "Custom":
        raise ExitError(
            ExitCode.REFUSED,
            "spec.workflow.type: Custom cannot be simulated; try --set spec.workflow.type=SingleTurn",
        )
    if spec.training.trains_adapters:
        raise ExitError(
            ExitCode.REFUSED,
            "spec.training.lora: adapters cannot be simulated; a device model says nothing about them",
        )


def simulate_job(job: SimulatedJob, model: DeviceModel, steps: int, price: float | None = None) -> Figures:
    """Simulate one job. The queues have filled when the gate has let through what it lets through at most."""
    warmup = job.spec.staleness.max_versions + 2
    setting = Setting(job.spec, job.num_engines, job.trainer_gpus, warmup, steps)
    place = MEMORY_FOLDER if os.access(MEMORY_FOLDER, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="asyncrl-simulation-", dir=place) as folder:
        return figures(run_virtually(simulate(setting, model, Path(folder))), model, price)


def render_one(found: Figures) -> str:
    """Return the figures of one job as text."""
    histogram = ", ".join(f"{versions}: {share:.1%}" for versions, share in found.staleness.items())
    lines = [
        f"GPUs             {found.gpus}: trainer {found.trainer_gpus}, {found.num_engines} engine(s)",
        f"steps per hour   {found.steps_per_hour:.2f} ({found.step_seconds:.1f} s a step)",
        f"tokens/s         {found.tokens_per_second:,.0f} trained; {found.live_tokens_per_second:,.0f} "
        f"sampled ones in the loss, {found.masked_tokens:.1%} of the sampled ones masked as too old",
        f"bound            {found.bound:,.0f} tokens/s: training {found.training_bound:,.0f}, generation "
        f"{found.generation_bound:,.0f}; {found.share_of_bound:.1%} of it is reached",
        f"trainer          train {found.trainer_trains:.1%}, wait {found.trainer_waits:.1%}, publish "
        f"{found.trainer_publishes:.1%}, checkpoint {found.trainer_checkpoints:.1%}, other "
        f"{found.trainer_other:.1%}",
        f"engines          decode {found.engines_decode:.1%}, prefill {found.engines_prefill:.1%}, paused "
        f"{found.engines_paused:.1%}, idle {found.engines_idle:.1%}; {found.engine_batch:.0f} sequences at a "
        f"time, {found.retractions} retracted from a full cache",
        f"staleness        mean {found.staleness_mean:.2f} ({histogram})",
    ]
    if found.price_per_step is not None:
        lines.append(f"price per step   {found.price_per_step:.2f}")
    return "\n".join(lines)


def render_sweep(jobs: Sequence[SimulatedJob], found: Sequence[Figures]) -> str:
    """Return the figures of several jobs as a table."""
    has_price = found[0].price_per_step is not None
    heads = ["", "GPUs", "steps/h", "tokens/s", "of bound", "trainer trains", "waits", "engines idle"]
    heads += ["staleness", "masked", *(["price/step"] if has_price else [])]
    table = [heads]
    for job, each in zip(jobs, found, strict=True):
        row = [
            job.name,
            f"{each.num_engines * job.gpus_per_engine}+{each.trainer_gpus}",
            f"{each.steps_per_hour:.2f}",
            f"{each.tokens_per_second:,.0f}",
            f"{each.share_of_bound:.1%}",
            f"{each.trainer_trains:.1%}",
            f"{each.trainer_waits:.1%}",
            f"{each.engines_idle:.1%}",
            f"{each.staleness_mean:.2f}",
            f"{each.masked_tokens:.1%}",
        ]
        table.append([*row, *([f"{each.price_per_step:.2f}"] if each.price_per_step is not None else [])])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    )
