"""The cells of `asyncrl simulate --sweep`."""

import pytest

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_api.parsing import SpecError
from asyncrl_operator.local.sweep import simulation_plan
from support.manifests.smallest import SMALLEST

FOUR_GPUS = ["spec.gpuBudget.total=4"]


def test_without_a_sweep_there_is_the_job_alone_with_the_split_that_it_would_begin_with() -> None:
    [job] = simulation_plan(SMALLEST, FOUR_GPUS, []).jobs
    assert (job.name, job.num_engines, job.gpus_per_engine, job.trainer_gpus) == ("", 3, 1, 1)


def test_all_combinations_are_simulated() -> None:
    jobs = simulation_plan(SMALLEST, FOUR_GPUS, ["maxVersions=0,4", "split=6+2,5+3"]).jobs
    assert [(job.name, job.num_engines, job.trainer_gpus) for job in jobs] == [
        ("maxVersions 0, split 6+2", 6, 2),
        ("maxVersions 0, split 5+3", 5, 3),
        ("maxVersions 4, split 6+2", 6, 2),
        ("maxVersions 4, split 5+3", 5, 3),
    ]
    assert [job.spec.staleness.max_versions for job in jobs] == [0, 0, 4, 4]
    assert {job.spec.gpu_budget.total for job in jobs} == {8}


def test_a_larger_budget_is_split_as_the_operator_splits_it() -> None:
    jobs = simulation_plan(SMALLEST, [], ["gpus=4,16"]).jobs
    assert [(job.num_engines, job.trainer_gpus) for job in jobs] == [(3, 1), (12, 4)]


@pytest.mark.parametrize(
    "sweep", ["split=6", "split=6+x", "gpus=2+2", "gpus=many", "gpus=", "gpus", "speed=1", "maxVersions=-1"]
)
def test_what_is_no_sweep_is_a_mistake_of_usage(sweep: str) -> None:
    with pytest.raises(ExitError, match="--sweep") as error:
        simulation_plan(SMALLEST, [], [sweep])
    assert error.value.code == ExitCode.USAGE


def test_a_sweep_has_an_end() -> None:
    many = ",".join(map(str, range(1, 50)))
    with pytest.raises(ExitError, match="2401 combinations"):
        simulation_plan(SMALLEST, [], [f"maxVersions={many}", f"gpus={many}"])


def test_a_cluster_on_which_the_job_does_not_fit_is_refused() -> None:
    with pytest.raises(SpecError, match=r"gpuBudget\.total is 1"):
        simulation_plan(SMALLEST, [], ["gpus=1"])
