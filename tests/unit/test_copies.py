"""What is published is what was copied, whatever the next step does to the original meanwhile."""

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from asyncrl_runtime.weights.adapter_publisher import Adapter
from asyncrl_runtime.weights.bucket import describe
from asyncrl_runtime.weights.copies import AdapterCopy, ShareCopy, make_copy_group, share_of

SHAPES = {"a": (3,), "b": (5, 2), "c": (1,), "d": ()}
BUCKETS = (("a", "b"), ("c", "d"))


@given(num_elements=st.integers(0, 100), num_ranks=st.integers(1, 9))
def test_the_shares_of_all_ranks_are_the_whole(num_elements: int, num_ranks: int) -> None:
    whole = list(range(num_elements))
    shares = [whole[share_of(num_elements, rank, num_ranks)] for rank in range(num_ranks)]
    assert [*chain.from_iterable(shares)] == whole
    assert max(map(len, shares)) == len(shares[0]) == -(-num_elements // num_ranks)


def copy_of(weights: dict[str, Tensor]) -> ShareCopy:
    """A copy of one rank, which reads what `weights` holds at the time."""

    def shares(names: Sequence[str]) -> Iterator[Tensor]:
        for name in names:
            yield weights[name].reshape(-1)

    layout = [describe((name, weights[name].dtype, SHAPES[name]) for name in names) for names in BUCKETS]
    return ShareCopy(layout, shares, make_copy_group())


def test_weights_are_those_of_the_copy_in_every_bucket(process_group: None) -> None:
    weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    copy = copy_of(weights)
    for _ in range(2):
        copy.take()
        before = {name: each.clone().reshape(-1) for name, each in weights.items()}
        for each in weights.values():
            each.add_(1)
        for names in BUCKETS:
            sent = copy.gather(names).view(torch.float32)
            assert torch.equal(sent, torch.cat([before[name] for name in names]))
    assert copy.num_bytes == 4 * (3 + 10 + 1 + 1)


def test_adapters_are_those_of_the_copy() -> None:
    trained = Adapter("{}", b"0")
    copy = AdapterCopy(lambda: trained, is_rank_0=True)
    copy.take()
    trained = Adapter("{}", b"1")
    assert copy.load().weights == b"0"
    copy.take()
    assert copy.load().weights == b"1"
