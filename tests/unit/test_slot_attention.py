"""Rows of very different lengths are read in few calls."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl_runtime.engine.slot_attention import CALL_TOKENS, split_by_length


@pytest.mark.parametrize(
    ("lengths", "common", "long"),
    [
        ([7], 7, []),
        ([30, 40, 35], 40, []),
        ([30, 900, 35, 20], 35, [(1, 900)]),
        ([600] * 16, 600, []),
        ([500, *[60] * 14, 480], 60, [(0, 500), (15, 480)]),
    ],
)
def test_only_those_that_are_much_longer_are_read_alone(
    lengths: list[int], common: int, long: list[tuple[int, int]]
) -> None:
    assert split_by_length(lengths) == (common, long)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=24))
def test_every_row_is_read_to_its_end_and_no_split_reads_less(lengths: list[int]) -> None:
    common, long = split_by_length(lengths)
    assert all(length <= common or (row, length) in long for row, length in enumerate(lengths))
    cost = len(lengths) * common + sum(length + CALL_TOKENS for _, length in long)
    for other in lengths:
        others = [length for length in lengths if length > other]
        assert cost <= len(lengths) * other + sum(others) + CALL_TOKENS * len(others)
