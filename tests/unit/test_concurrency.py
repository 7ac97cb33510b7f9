"""How many samples an engine is given, and how they are counted."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl_runtime.rollout.concurrency import PATIENCE, ConcurrencyLimit, Slots
from asyncrl_runtime.rollout.engine_api import EngineLoad
from support.engines.kv_engine import Fixed, KvEngine, Limit

GROUP = 8
CAPACITY = 100_000


def load(queued: int = 0, kv_usage: float = 0.5, capacity: int = CAPACITY) -> EngineLoad:
    """What an engine says whose cache holds `capacity` tokens."""
    return EngineLoad(
        kv_usage=kv_usage,
        num_queued=queued,
        num_retracted=0,
        num_generated_tokens=0,
        num_used_tokens=round(kv_usage * capacity),
    )


def adaptive(group_size: int = GROUP, *, num_finished: int = 64, tokens: int = 400) -> ConcurrencyLimit:
    """Return a limit of 64 that has seen as many samples finish."""
    made = ConcurrencyLimit(group_size)
    finish(made, num_finished, tokens)
    return made


def finish(limit: ConcurrencyLimit, count: int, tokens: int = 400) -> None:
    for _ in range(count):
        limit.finished(0, tokens)


# -- it grows


def test_it_grows_once_as_many_samples_have_finished_as_run() -> None:
    """That takes the mean time of a sample, and by then the cache shows what the growth before it needs."""
    concurrency = adaptive(num_finished=63)
    concurrency.observe(load(), 64)
    assert concurrency.limit == 64
    finish(concurrency, 1)
    for _ in range(5):
        concurrency.observe(load(), 128)
        assert concurrency.limit == 128
    finish(concurrency, 128)
    concurrency.observe(load(), 128)
    assert concurrency.limit == 256


@pytest.mark.parametrize(("num_running", "limit"), [(56, 64), (57, 128)])
def test_it_grows_only_where_it_binds(num_running: int, limit: int) -> None:
    concurrency = adaptive()
    concurrency.observe(load(), num_running)
    assert concurrency.limit == limit


@pytest.mark.parametrize(("queued", "limit"), [(8, 128), (9, 64)])
def test_it_does_not_grow_while_more_than_a_group_waits(queued: int, limit: int) -> None:
    concurrency = adaptive()
    concurrency.observe(load(queued), 64)
    assert concurrency.limit == limit


@pytest.mark.parametrize(
    ("lengths", "limit"),
    [
        ([(0, 2000)] * 64, 100),  # each takes 1,000 tokens on average
        ([(4000, 1000)] * 64, 100),  # and as many with its eighth of a prompt
        ([(0, 500), (0, 3500)] * 32, 64),  # 1,562 on average, since long ones are there for longer
        ([(0, 1)] * 64, 128),
    ],
)
@pytest.mark.parametrize("kv_usage", [0.01, 0.5, 0.99])
def test_it_grows_up_to_what_will_fill_the_cache(
    lengths: list[tuple[int, int]], limit: int, kv_usage: float
) -> None:
    """However little of the cache is in use as yet."""
    concurrency = ConcurrencyLimit(GROUP)
    for prompt_tokens, response_tokens in lengths:
        concurrency.finished(prompt_tokens, response_tokens)
    concurrency.observe(load(kv_usage=kv_usage), 64)
    assert concurrency.limit == limit


def test_an_engine_that_does_not_say_how_large_its_cache_is_is_given_more_until_requests_wait() -> None:
    concurrency = ConcurrencyLimit(GROUP)
    for limit in (128, 256, 512, 1024, 1024):
        finish(concurrency, concurrency.limit, tokens=10_000)
        concurrency.observe(load(kv_usage=0.0), concurrency.limit)
        assert concurrency.limit == limit


# -- it is cut


def test_it_is_cut_to_what_runs_and_a_group_that_waits() -> None:
    concurrency = adaptive(num_finished=0)
    for _ in range(PATIENCE):
        assert concurrency.limit == 64
        concurrency.observe(load(queued=24), 64)
    assert concurrency.limit == 48
    for _ in range(5 * PATIENCE):  # samples end, and others take their places
        concurrency.observe(load(queued=8), 48)
        assert concurrency.limit == 48, "what runs, runs well"


def test_requests_that_wait_for_a_moment_cut_nothing() -> None:
    """After an update of the weights all of them wait until their cache is computed anew."""
    concurrency = adaptive(num_finished=0)
    for _ in range(5):
        for queued in (64,) * (PATIENCE - 1) + (8,):
            concurrency.observe(load(queued), 64)
    assert concurrency.limit == 64


def test_one_group_is_always_let_in() -> None:
    concurrency = adaptive(num_finished=0)
    for _ in range(PATIENCE):
        concurrency.observe(load(queued=99), 64)
    assert concurrency.limit == GROUP


# -- what comes of it: an engine whose samples take minutes, in virtual time

HOUR = 3600
PROFILES: dict[str, tuple[dict[str, Any], int, tuple[int, ...], float]] = {
    "9k": ({"median": 6000, "sigma": 0.8, "capacity": 2_000_000}, HOUR, (224, 256, 288, 320, 384), 0.97),
    "1k": ({"median": 500, "sigma": 1.0, "capacity": 400_000}, HOUR // 4, (256, 320, 512), 0.97),
    "four groups": ({"median": 6000, "sigma": 0.8, "capacity": 400_000}, HOUR, (48, 64, 96, 128), 0.94),
}


@pytest.mark.parametrize(("profile", "seconds", "fixed", "share"), PROFILES.values(), ids=PROFILES)
def test_it_comes_as_near_to_the_best_fixed_limit(
    profile: dict[str, Any], seconds: int, fixed: tuple[int, ...], share: float
) -> None:
    """After its start. Lengths are log-normal, and the limit begins far from the best one."""

    def throughput(limit: Limit) -> float:
        engine = KvEngine(**profile, group_size=16)
        engine.run(limit, seconds)
        return engine.run(limit, seconds)

    best = max(throughput(Fixed(limit, 16)) for limit in fixed)
    assert throughput(ConcurrencyLimit(16)) >= share * best


def test_it_neither_overshoots_nor_collapses() -> None:
    """The best fixed limit is 288. It was 1024 within a minute, and then 16 for five."""
    profile, *_ = PROFILES["9k"]
    engine = KvEngine(**profile, group_size=16)
    engine.run(ConcurrencyLimit(16), HOUR)
    assert max(engine.limits) < 2 * 288 and min(engine.limits) >= ConcurrencyLimit.START


@given(
    st.integers(1, 4096),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9999), st.integers(0, 2000), st.integers(0, 5000))),
)
@settings(max_examples=40)
def test_the_limit_stays_between_one_group_and_the_highest(
    group_size: int, observations: list[tuple[float, int, int, int]]
) -> None:
    concurrency = ConcurrencyLimit(group_size)
    for kv_usage, queued, num_finished, num_running in observations:
        finish(concurrency, num_finished)
        concurrency.observe(load(queued, kv_usage), num_running)
        assert group_size <= concurrency.limit <= max(group_size, ConcurrencyLimit.HIGHEST)
        assert concurrency.has_room(0)  # an idle engine always gets a group


def test_a_ceiling_is_the_limit_whatever_the_engine_does() -> None:
    concurrency = ConcurrencyLimit(8, ceiling=16)
    finish(concurrency, 100)
    for queued in (0,) * PATIENCE + (99,) * 2 * PATIENCE:
        concurrency.observe(load(queued), 16)
        assert concurrency.limit == 16


def test_a_ceiling_may_come_change_and_go_while_the_job_runs() -> None:
    concurrency = adaptive()
    for ceiling, limit in ((100, 100), (24, 24), (3, 8), (0, 16)):
        concurrency.ceiling = ceiling
        concurrency.observe(load(), 100)
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
