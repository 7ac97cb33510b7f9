"""How many tickets are open: as few as keep the trainer busy, and never more than the bound."""

import heapq
import math
import random
from typing import Literal, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl_runtime.trainer.books.freshness import Freshness

B = 32
STEPS = 200


class Run(NamedTuple):
    """The second half of a simulated run."""

    busy: float
    """The share of the time in which the trainer trained."""
    age: float
    """The mean number of versions between the issue of a group and the step that trained it."""


def simulate(
    target: int | Literal["Auto"], eta: int, latency: float, throughput: float, seed: int = 0
) -> Run:
    """Train STEPS steps of one time unit each.

    Args:
        latency: the time that a group takes on idle engines, in steps.
        throughput: the batches that the engines finish in the time of a step.
    """
    rng, freshness = random.Random(seed), Freshness()
    in_flight: list[tuple[float, int]] = []  # when it is done, the version at its issue
    queue: list[int] = []
    now, num_open, waited, ages = 0.0, 0, 0.0, []
    for version in range(STEPS):
        while num_open < freshness.open_tickets(target, B, eta):
            mean = max(latency, (len(in_flight) + 1) / (throughput * B))
            heapq.heappush(in_flight, (now + mean * rng.lognormvariate(-0.125, 0.5), version))
            num_open += 1
        now += 1.0
        while in_flight and in_flight[0][0] <= now:
            queue.append(heapq.heappop(in_flight)[1])
        freshness.batch_wanted(len(queue), B, eta)
        while len(queue) < B:
            done, issued = heapq.heappop(in_flight)
            if version >= STEPS // 2:
                waited += max(0.0, done - now)
            now = max(now, done)
            queue.append(issued)
        if version >= STEPS // 2:
            ages += [version + 1 - issued for issued in queue[:B]]
        del queue[:B]
        num_open -= B
    half = STEPS - STEPS // 2
    return Run(half / (half + waited), sum(ages) / len(ages))


@pytest.mark.parametrize("latency", [0.3, 0.8, 1.5])
@pytest.mark.parametrize("throughput", [1.2, 2.0])
def test_auto_keeps_samples_fresh_where_the_trainer_is_the_bottleneck(
    latency: float, throughput: float
) -> None:
    brim, auto = simulate(8, 8, latency, throughput), simulate("Auto", 8, latency, throughput)
    assert brim.busy > 0.999 and brim.age > 7.5
    assert auto.busy > 0.99
    assert auto.age < 3.5


@pytest.mark.parametrize("eta", [1, 2, 4])
@pytest.mark.parametrize(("latency", "throughput"), [(0.5, 0.7), (3.0, 2.0)])
def test_auto_goes_to_the_bound_where_generation_is_the_bottleneck(
    eta: int, latency: float, throughput: float
) -> None:
    brim, auto = simulate(eta, eta, latency, throughput), simulate("Auto", eta, latency, throughput)
    assert auto.busy == pytest.approx(brim.busy, rel=0.01)


def test_auto_comes_back_when_groups_begin_to_take_longer() -> None:
    freshness = Freshness()
    for _ in range(100):
        freshness.batch_wanted(5 * B, B, 4)
    assert freshness.open_tickets("Auto", B, 4) == B
    for _ in range(20):
        freshness.batch_wanted(0, B, 4)
    assert freshness.open_tickets("Auto", B, 4) == 5 * B


def test_a_number_is_what_is_open() -> None:
    freshness = Freshness()
    freshness.batch_wanted(0, B, 4)
    assert [freshness.open_tickets(target, B, 4) for target in (0, 2, 4, 9)] == [B, 3 * B, 5 * B, 5 * B]


@given(
    st.lists(st.tuples(st.integers(0, 50 * B), st.integers(0, 8)), max_size=30),
    st.integers(0, 8),
    st.sampled_from(["Auto", 0, 3]),
)
def test_there_is_always_a_batch_open_and_never_more_than_the_bound(
    found: list[tuple[int, int]], eta: int, target: int | Literal["Auto"]
) -> None:
    """Whatever was found, and however maxVersions was changed meanwhile."""
    freshness = Freshness()
    for num_arrived, max_versions in found:
        freshness.batch_wanted(num_arrived, B, max_versions)
    assert B <= freshness.open_tickets(target, B, eta) <= (eta + 1) * B
    assert math.isfinite(freshness.open_tickets("Auto", B, eta))
