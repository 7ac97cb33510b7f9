"""The queue of jobs, with the time passed in."""

from hypothesis import given
from hypothesis import strategies as st

from asyncrl_operator.workqueue import MAX_RETRY_SECONDS, Key, WorkQueue

A, B = Key("ns", "a"), Key("ns", "b")


def test_a_key_added_twice_has_one_turn_at_the_earlier_time() -> None:
    queue = WorkQueue()
    queue.add(A, 5.0)
    queue.add(A, 2.0)
    queue.add(A, 9.0)
    assert (len(queue), queue.next_at()) == (1, 2.0)
    assert queue.take(1.9) is None
    assert queue.take(2.0) == A
    queue.done(A, None)
    assert queue.take(100.0) is None and queue.next_at() is None


def test_a_key_is_in_one_pass_at_a_time_and_news_during_it_are_not_lost() -> None:
    queue = WorkQueue()
    queue.add(A, 0.0)
    assert queue.take(0.0) == A
    queue.add(A, 1.0)
    queue.add(B, 2.0)
    assert queue.take(1.5) is None, "it is in its pass"
    assert queue.next_at() == 2.0, "nobody need wake up for a key that is in its pass"
    assert queue.take(2.0) == B
    queue.done(A, wake_at=50.0)
    assert queue.take(2.0) == A, "the news come before the wake-up"


def test_keys_come_in_the_order_in_which_they_are_due() -> None:
    queue = WorkQueue()
    for key, at in ((B, 3.0), (A, 1.0)):
        queue.add(key, at)
    assert [queue.take(3.0), queue.take(3.0)] == [A, B]


def test_failures_wait_ever_longer_up_to_a_limit_and_success_forgets_them() -> None:
    queue, now, delays = WorkQueue(), 0.0, []
    for _ in range(9):
        queue.add(A, now)
        assert queue.take(now) == A
        at = queue.failed(A, now)
        delays.append(at - now)
        now = at
    assert delays[:3] == [0.5, 1.0, 2.0] and delays[-1] == MAX_RETRY_SECONDS
    assert queue.num_failures(A) == 9
    assert queue.take(now) == A
    queue.done(A, None)
    assert queue.num_failures(A) == 0
    queue.add(A, now)
    assert queue.take(now) == A and queue.failed(A, now) - now == 0.5


def test_a_failed_key_waits_out_its_delay_whatever_is_added() -> None:
    queue = WorkQueue()
    queue.add(A, 0.0)
    queue.take(0.0)
    queue.add(A, 0.0)
    at = queue.failed(A, 0.0, least_seconds=7.0)
    assert at == 7.0, "what the API server asked for"
    queue.add(A, 1.0)
    assert queue.take(6.9) is None
    assert queue.take(7.0) == A


def test_jitter_spreads_the_retries() -> None:
    queue = WorkQueue(jitter=lambda: 1.2)
    queue.add(A, 0.0)
    queue.take(0.0)
    assert queue.failed(A, 10.0) == 10.6


steps = st.lists(
    st.tuples(st.sampled_from(["add", "take", "done", "fail"]), st.sampled_from([A, B]), st.floats(0, 60)),
    max_size=40,
)


@given(steps)
def test_no_news_is_lost_and_no_key_is_in_two_passes(steps: list[tuple[str, Key, float]]) -> None:
    """Whatever has happened, a key with news since its pass began gets another pass."""
    queue, now, active, owed = WorkQueue(), 0.0, set[Key](), set[Key]()
    for what, key, number in steps:
        now += number / 10
        if what == "add":
            queue.add(key, now + number)
            owed.add(key)
        elif what == "take" and (taken := queue.take(now)) is not None:
            assert taken not in active
            active.add(taken)
            owed.discard(taken)
        elif what == "done" and key in active:
            active.discard(key)
            queue.done(key, None)
        elif what == "fail" and key in active:
            active.discard(key)
            queue.failed(key, now)
            owed.add(key)
    for key in active:
        queue.done(key, None)
    later = now + 1000
    passes = []
    while (found := queue.take(later)) is not None:
        passes.append(found)
    assert set(passes) == owed and len(passes) == len(owed)
