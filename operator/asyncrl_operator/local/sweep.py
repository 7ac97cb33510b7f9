"""The cells of a sweep: one job for each choice of cluster and staleness that is to be compared. Pure."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_api.parsing import apply_overrides, parse_job
from asyncrl_api.simulation import SimulatedJob, SimulationPlan
from asyncrl_operator.layout import plan_split

SWEEPS = ("gpus", "split", "maxVersions")
"""What may be swept. A split is written as `ROLLOUT+TRAINER`, in GPUs, for example 6+2."""
MAX_CELLS = 200


def simulation_plan(
    document: Mapping[str, Any], overrides: Sequence[str], sweeps: Sequence[str]
) -> SimulationPlan:
    """Return the jobs of all combinations of what is swept.

    Args:
        document: the manifest.
        overrides: `spec.path=value` each.
        sweeps: `NAME=VALUE,VALUE` each; see SWEEPS.

    Raises:
        SpecError: a combination is no valid job, or its budget is too small.
        ExitError: a sweep is not understood, or there are too many combinations.
    """
    choices = [_choices(sweep) for sweep in sweeps]
    cells = list(itertools.product(*choices))
    if len(cells) > MAX_CELLS:
        raise ExitError(ExitCode.USAGE, f"--sweep: {len(cells)} combinations; must be at most {MAX_CELLS}")
    return SimulationPlan(jobs=tuple(_job(document, overrides, cell) for cell in cells))


def _choices(sweep: str) -> list[tuple[str, list[str]]]:
    """Return name and overrides of each value of a sweep."""
    name, _, values = sweep.partition("=")
    found = [value.strip() for value in values.split(",") if value.strip()]
    if name not in SWEEPS or not found:
        raise ExitError(
            ExitCode.USAGE, f"--sweep {sweep}: must be NAME=VALUE,VALUE with NAME one of {', '.join(SWEEPS)}"
        )
    return [(f"{name} {value}", _overrides(name, value)) for value in found]


def _overrides(name: str, value: str) -> list[str]:
    numbers = value.split("+")
    if not all(number.isascii() and number.isdigit() for number in numbers) or len(numbers) != 1 + (
        name == "split"
    ):
        form = "ROLLOUT+TRAINER, such as 6+2" if name == "split" else "a whole number"
        raise ExitError(ExitCode.USAGE, f"--sweep {name}={value}: must be {form}")
    if name == "maxVersions":
        return [f"spec.staleness.maxVersions={value}"]
    if name == "gpus":
        return [f"spec.gpuBudget.total={value}"]
    rollout, trainer = map(int, numbers)
    split = {"rollout": rollout, "trainer": trainer}
    overrides = [f"spec.gpuBudget.split.{role}={gpus}" for role, gpus in split.items()]
    return [f"spec.gpuBudget.total={rollout + trainer}", "spec.gpuBudget.mode=Manual", *overrides]


def _job(
    document: Mapping[str, Any], overrides: Sequence[str], cell: Sequence[tuple[str, list[str]]]
) -> SimulatedJob:
    more = [override for _, found in cell for override in found]
    job = parse_job(apply_overrides(document, [*overrides, *more]))
    split = plan_split(job.spec)
    return SimulatedJob(
        name=", ".join(name for name, _ in cell),
        spec=job.spec,
        num_engines=split.num_replicas,
        gpus_per_engine=split.gpus_per_replica,
        trainer_gpus=split.trainer,
    )
