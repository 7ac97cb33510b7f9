"""How many samples an engine is given, and how they are counted."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl_runtime.rollout.concurrency import ConcurrencyLimit, Slots
from asyncrl_runtime.rollout.engine_api import EngineLoad

NORMAL = 0.7
"""A KV use at which nothing changes."""


def load(kv_usage: float = NORMAL, queued: int = 0, retracted: int = 0) -> EngineLoad:
    return EngineLoad(kv_usage=kv_usage, num_queued=queued, num_retracted=retracted, num_generated_tokens=0)


def adaptive(group_size: int = 8, limit: int = 64) -> ConcurrencyLimit:
    """Return a limit that has observed its engine once."""
    made = ConcurrencyLimit(group_size)
    made.limit = limit
    made.observe(load(), 0)
    return made


@pytest.mark.parametrize(
    ("seen", "num_running", "limit"),
    [
        (load(0.1), 60, 80),  # room in the cache, and the limit binds: a quarter more
        (load(0.1), 56, 64),  # another group would fit: more is not asked for
        (load(0.59), 57, 80),
        (load(0.6), 64, 64),
        (load(0.8), 64, 64),
        (load(0.81), 64, 57),  # nearly full: a tenth less
        (load(0.1, queued=8), 64, 80),
        (load(0.1, queued=9), 64, 57),  # more than a group waits for a place
        (load(0.1, retracted=1), 64, 51),  # requests were thrown out: a fifth less
        (load(0.99, queued=99, retracted=5), 64, 51),
    ],
)
def test_the_limit_follows_the_engine(seen: EngineLoad, num_running: int, limit: int) -> None:
    concurrency = adaptive()
    concurrency.observe(seen, num_running)
    assert concurrency.limit == limit


def test_only_new_retractions_count() -> None:
    concurrency = adaptive()
    for retracted, limit in ((3, 51), (3, 51), (4, 40)):
        concurrency.observe(load(retracted=retracted), 64)
        assert concurrency.limit == limit


def test_an_engine_that_restarted_is_judged_by_what_it_does_next() -> None:
    concurrency = adaptive()
    concurrency.observe(load(retracted=5), 64)
    concurrency.observe(load(0.95, retracted=2), 64)  # its counters began again
    assert concurrency.limit == 51
    concurrency.observe(load(retracted=3), 64)
    assert concurrency.limit == 40


def test_what_an_engine_did_before_this_worker_came_is_not_held_against_it() -> None:
    concurrency = ConcurrencyLimit(8)
    concurrency.observe(load(0.95, queued=99, retracted=70), 64)
    assert concurrency.limit == ConcurrencyLimit.START


@pytest.mark.parametrize("group_size", [1, 2, 3, 8])
def test_the_limit_never_sticks(group_size: int) -> None:
    """For 1 and 2, a quarter more would be rounded to nothing."""
    concurrency = adaptive(group_size)
    for _ in range(60):
        concurrency.observe(load(0.9), concurrency.limit)
    assert concurrency.limit == group_size
    for _ in range(60):
        concurrency.observe(load(0.1), concurrency.limit)
    assert concurrency.limit == ConcurrencyLimit.HIGHEST


@given(
    st.integers(1, 4096),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9999), st.integers(0, 5), st.integers(0, 5000))),
)
@settings(max_examples=40)
def test_the_limit_stays_between_one_group_and_the_highest(
    group_size: int, observations: list[tuple[float, int, int, int]]
) -> None:
    concurrency = ConcurrencyLimit(group_size)
    for kv_usage, queued, retracted, num_running in observations:
        concurrency.observe(load(kv_usage, queued, retracted), num_running)
        assert group_size <= concurrency.limit <= max(group_size, ConcurrencyLimit.HIGHEST)
        assert concurrency.has_room(0)  # an idle engine always gets a group


def test_a_ceiling_is_the_limit_whatever_the_engine_does() -> None:
    concurrency = ConcurrencyLimit(8, ceiling=16)
    for seen in (load(), load(0.1), load(0.99, queued=99, retracted=9)):
        concurrency.observe(seen, 16)
        assert concurrency.limit == 16


def test_a_ceiling_may_come_change_and_go_while_the_job_runs() -> None:
    concurrency = adaptive()
    for ceiling, limit in ((100, 100), (24, 24), (3, 8), (0, 10)):
        concurrency.ceiling = ceiling
        concurrency.observe(load(0.1), 100)
        assert concurrency.limit == limit


def test_a_group_starts_where_all_of_its_samples_have_room() -> None:
    concurrency = ConcurrencyLimit(8, ceiling=20)
    assert concurrency.has_room(12) and not concurrency.has_room(13)


def test_slots_are_freed_one_by_one_and_once() -> None:
    slots = Slots()
    first, second = slots.take(3), slots.take(2)
    assert slots.num_taken == 5
    first.free_one()
    assert slots.num_taken == 4
    first.close()
    assert slots.num_taken == 2
    first.close()
    first.free_one()
    assert slots.num_taken == 2
    second.close()
    assert slots.num_taken == 0


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9))), st.data())
@settings(max_examples=40)
def test_all_slots_are_free_when_all_tickets_are_closed(
    tickets: list[tuple[int, int]], data: st.DataObject
) -> None:
    slots = Slots()
    taken = [(slots.take(count), count, freed) for count, freed in tickets]
    for each, _, freed in taken:
        for _ in range(freed):
            each.free_one()
    assert slots.num_taken == sum(max(0, count - freed) for _, count, freed in taken)
    for each, *_ in data.draw(st.permutations(taken)):
        each.close()
    assert slots.num_taken == 0
