"""Which tickets may be issued, and that discards have an end."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl_runtime.trainer.books.tickets import (
    Discard,
    DiscardCount,
    EndlessDiscards,
    TicketBook,
    top_reward,
    widened,
)


def test_limit_is_areals_rule_where_nothing_is_discarded() -> None:
    """floor((N-1)/B) <= v + eta, for every N."""
    for batch_size in (1, 3, 8):
        for eta in (0, 1, 4):
            for version in range(5):
                book = TicketBook(num_trained=version * batch_size, low=version * batch_size)
                limit = book.limit(version=version, batch_size=batch_size, max_versions=eta, max_steps=1000)
                allowed = [n for n in range(1, 200) if (n - 1) // batch_size <= version + eta]
                assert limit == allowed[-1]


def test_no_ticket_beyond_the_last_step() -> None:
    book = TicketBook(num_trained=36, low=36)
    assert book.limit(version=9, batch_size=4, max_versions=4, max_steps=10) == 40
    assert book.limit(version=10, batch_size=4, max_versions=4, max_steps=10) == 36


def test_a_discard_is_replaced_by_one() -> None:
    book = TicketBook()
    before = book.limit(version=0, batch_size=4, max_versions=1, max_steps=10)
    book.discard([3])
    assert book.limit(version=0, batch_size=4, max_versions=1, max_steps=10) == before + 1


def test_a_stream_made_again_passes_over_what_is_closed() -> None:
    book = TicketBook()
    book.train([2, 50])
    assert (
        book.limit(version=1, batch_size=2, max_versions=1, max_steps=10) == 5
    )  # 1, 3, 4, 5 are open; by the counts alone it would be 6
    assert book.limit(version=1, batch_size=2, max_versions=1, max_steps=10) == 5
    assert book.limit(version=1, batch_size=2, max_versions=1, max_steps=10, pending={3}, num_in_step=1) == 5


def test_a_ticket_closes_once() -> None:
    book = TicketBook()
    book.train([1, 2])
    with pytest.raises(AssertionError, match="ticket 2 is closed already"):
        book.discard([2])


@given(st.permutations(list(range(1, 25))), st.integers(0, 24))
def test_record_holds_everything_and_low_is_the_first_gap(order: list[int], split: int) -> None:
    book = TicketBook()
    book.train(order[:split:2])
    book.discard(order[1:split:2])
    closed = set(order[:split])
    restored = TicketBook.restore(book.record())
    assert restored.record() == book.record()
    assert [t for t in range(1, 25) if restored.is_closed(t)] == sorted(closed)
    assert restored.low == next(n for n in range(25) if n + 1 not in closed)
    assert restored.open_tickets(24) == sorted(set(order) - closed)


def count_of(*discards: tuple[str, float | None], issued_before: int = 0) -> DiscardCount:
    """Return a count of discards, each given by its reason and the lowest reward of its samples."""
    count = DiscardCount(issued_before)
    for number, (reason, lowest) in enumerate(discards, start=issued_before + 1):
        count.add(Discard(number, reason), lowest)
    return count


UNSOLVED, SOLVED, FAILED = ("uniform", 0.0), ("uniform", 1.0), ("failed", None)


def test_endless_discards_end_with_the_count_by_reason() -> None:
    count = count_of(*[UNSOLVED] * 12, *[FAILED] * 7)
    assert count.mastered(20, 1.0) == ""
    count.add(Discard(20, "failed"), None)
    with pytest.raises(
        EndlessDiscards,
        match=r"20 prompt groups in a row .*uniform: 12, failed: 8.*maxDiscardsInARow = 20; set",
    ):
        count.mastered(20, 1.0)
    assert count.mastered(0, 1.0) == ""  # no bound


def test_discards_of_tickets_from_before_the_last_step_do_not_count() -> None:
    count = DiscardCount()
    count.step_ended(num_issued=5)
    for _ in range(100):
        count.add(Discard(5, "stale"), 1.0)
    assert count.mastered(1, None) == ""


@pytest.mark.parametrize("end", [DiscardCount.group_kept, lambda count: count.step_ended(19)])
def test_a_kept_group_and_a_step_end_the_row(end: Callable[[DiscardCount], None]) -> None:
    count = count_of(*[UNSOLVED] * 19)
    end(count)
    for number in range(20, 39):
        count.add(Discard(number, "uniform"), 0.0)
    assert count.mastered(20, 1.0) == ""


def test_a_policy_has_mastered_its_prompts_if_nine_in_ten_are_solved() -> None:
    words = count_of(*[SOLVED] * 18, UNSOLVED, FAILED).mastered(20, 1.0)
    assert "18 of the last 20 prompt groups had the top reward, 1, in every sample" in words
    with pytest.raises(EndlessDiscards, match="uniform: 19, failed: 1"):
        count_of(*[SOLVED] * 17, *[UNSOLVED] * 2, FAILED).mastered(20, 1.0)


def test_a_reward_is_the_top_one_only_if_a_lower_one_was_seen() -> None:
    never_solved = widened(None, [0.0, 0.0])
    assert top_reward("Function", None) is None and top_reward("Function", never_solved) is None
    assert top_reward("Function", widened(never_solved, [0.5])) == 0.5
    assert [top_reward(kind, never_solved) for kind in ("Math", "ReasoningGym", "Code")] == [1.0] * 3
    with pytest.raises(EndlessDiscards):
        count_of(*[UNSOLVED] * 20).mastered(20, top_reward("Function", never_solved))
