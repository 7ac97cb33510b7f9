"""The automatic split finds the sizes at which neither group waits for the other, and stays there."""

from itertools import pairwise
from typing import NamedTuple

import pytest

from asyncrl_api.job import Spec
from asyncrl_api.job_status import SplitStatus
from asyncrl_api.parsing import parse_spec
from asyncrl_api.report import Report
from asyncrl_operator.decide.rebalance import decide_split
from asyncrl_operator.layout import trainer_sizes
from support.manifests.smallest import SMALLEST

TOTAL = 32
SLOTS = 64
"""The samples that an engine runs at most."""
COOLDOWN = 100


def spec_of(rollout_percent: int, resize: str = "AtCheckpoint") -> Spec:
    auto = {"initialRolloutPercent": rollout_percent, "cooldownSeconds": COOLDOWN, "trainerResize": resize}
    budget = {"total": TOTAL, "auto": auto}
    trainer = {"deepspeed": {"zeroStage": 2}}
    return parse_spec(
        {
            **SMALLEST["spec"],
            "gpuBudget": budget,
            "trainer": trainer,
            "training": {"batchSize": 64, "maxSteps": 9},
        }
    )


class Job(NamedTuple):
    """A job whose trainer needs `training / GPUs` seconds for a step, and samples `work` samples for it.

    A step of decoding takes longer the more samples it has, but not proportionally: half the samples make an
    engine more than half as fast, so `rollout_load` flatters it.
    """

    training: float
    work: float

    def rate(self, running: float) -> float:
        return running / (1.0 + running / SLOTS)

    def step_seconds(self, trainer: int, engines: int) -> float:
        return max(self.training / trainer, self.work / (engines * self.rate(SLOTS)))

    def report(self, split: SplitStatus) -> Report:
        engines = split.rollout // split.gpus_per_replica
        seconds = self.step_seconds(split.trainer, engines)
        needed = self.work / (engines * seconds)  # samples a second of each engine
        running = needed / (1 - needed / SLOTS)
        return Report(
            attempt=1,
            step=1,
            max_steps=9,
            state="Training",
            wait_share=1 - self.training / split.trainer / seconds,
            rollout_load=min(1.0, running / SLOTS),
        )


def run(job: Job, spec: Spec, seconds: float) -> list[SplitStatus]:
    """Return the splits that a job has, one after the other."""
    now, splits = 0.0, [decide_split(spec, None, None, True, 0.0)]
    while now < seconds:
        now += 10
        split = decide_split(spec, splits[-1], job.report(splits[-1]), True, now)
        if (split.trainer, split.rollout) != (splits[-1].trainer, splits[-1].rollout):
            splits.append(split)
        splits[-1] = split
    return splits


def best(job: Job) -> float:
    sizes = (size for size in trainer_sizes(spec_of(75)) if size < TOTAL)
    return min(job.step_seconds(trainer, TOTAL - trainer) for trainer in sizes)


JOBS = {
    "balanced at 8": Job(training=80, work=7200),
    "training is heavy": Job(training=200, work=3000),
    "generation is heavy": Job(training=30, work=9000),
}


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
@pytest.mark.parametrize("rollout_percent", [75, 40, 90])
def test_the_split_comes_near_the_best_and_stays(job: Job, rollout_percent: int) -> None:
    splits = run(job, spec_of(rollout_percent), 40 * COOLDOWN)
    last = splits[-1]
    assert job.step_seconds(last.trainer, last.rollout) <= 1.03 * best(job)
    steps = [(b.trainer > a.trainer) - (b.trainer < a.trainer) for a, b in pairwise(splits)]
    assert all(a == b for a, b in pairwise(steps)), "no move is taken back"


def test_the_split_follows_lengths_that_drift() -> None:
    spec = spec_of(75)
    short = run(JOBS["balanced at 8"], spec, 40 * COOLDOWN)[-1]
    longer = Job(training=160, work=30000)
    split, now = short, 40 * COOLDOWN
    for _ in range(400):
        now += 10
        split = decide_split(spec, split, longer.report(split), True, now)
    assert longer.step_seconds(split.trainer, split.rollout) <= 1.03 * best(longer)


def test_engines_that_are_not_needed_are_given_back_and_no_more() -> None:
    job = Job(training=80, work=3000)
    split = run(job, spec_of(75, "Never"), 40 * COOLDOWN)[-1]
    assert split.idle > 0
    assert job.step_seconds(split.trainer, split.rollout) <= 1.03 * job.training / split.trainer


def test_nothing_moves_where_both_wait_for_a_batch_to_be_long_enough_ahead() -> None:
    """With a small maxVersions neither group is busy: other sizes would not help."""
    spec = spec_of(75)
    split = decide_split(spec, None, None, True, 0.0)
    report = JOBS["balanced at 8"].report(split).model_copy(update={"wait_share": 0.5, "rollout_load": 0.5})
    for now in range(0, 2000, 10):
        split = decide_split(spec, split, report, True, now)
    assert split.reason == "InitialRatio"


def test_an_older_runtime_tells_only_that_the_trainer_waits() -> None:
    spec = spec_of(75)
    split = decide_split(spec, None, None, True, 0.0)
    starved = JOBS["generation is heavy"].report(split).model_copy(update={"rollout_load": None})
    for now in range(0, 500, 10):
        split = decide_split(spec, split, starved, True, now)
    assert split.rollout > TOTAL * 3 // 4
