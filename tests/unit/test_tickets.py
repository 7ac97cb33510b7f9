"""Which tickets may be issued, and that discards have an end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl_runtime.trainer.books.tickets import Discard, DiscardCount, EndlessDiscards, TicketBook


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


def test_endless_discards_end_with_the_count_by_reason() -> None:
    count = DiscardCount()
    count.step_ended(num_issued=5)
    for _ in range(100):
        count.add(Discard(5, "stale"), batch_size=2)  # issued before the last step: not counted
    for number in range(19):
        count.add(Discard(6 + number, "uniform" if number % 3 else "failed"), batch_size=2)
    with pytest.raises(EndlessDiscards, match=r"20 prompt groups .*uniform: 12, failed: 8.*10 x batchSize"):
        count.add(Discard(30, "failed"), batch_size=2)


def test_a_step_ends_the_count() -> None:
    count = DiscardCount()
    for number in range(19):
        count.add(Discard(1 + number, "uniform"), batch_size=2)
    count.step_ended(num_issued=19)
    for number in range(19):
        count.add(Discard(20 + number, "uniform"), batch_size=2)
