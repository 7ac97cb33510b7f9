"""Every parser of foreign data survives whatever comes: 1,000 cases each here, a million by `make fuzz`."""

import logging
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.fuzz.corpus import all_targets, corpus
from support.fuzz.mutations import mutated
from support.fuzz.target import Target

SEEDS = st.integers(0, 2**64 - 1)
"""What a mutation is drawn from, so that a failing one can be made again."""
FOLDER = tempfile.TemporaryDirectory(prefix="asyncrl-fuzz-")
TARGETS = {target.name: target for target in all_targets(Path(FOLDER.name))}


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    """What is refused is logged, and here nearly everything is."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_a_real_message_is_taken(target: Target) -> None:
    target.run(target.seeds[0])
    for seed in target.seeds:
        target.check(seed)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_what_was_not_survived_once_is_survived(target: Target) -> None:
    for case in corpus(target.name):
        target.check(case)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_whatever_comes_is_taken_or_refused(target: Target) -> None:
    @settings(max_examples=target.cases, suppress_health_check=list(HealthCheck), database=None)
    @given(st.one_of(st.binary(max_size=200), SEEDS, SEEDS, SEEDS))
    def survives(data: bytes | int) -> None:
        case = data if isinstance(data, bytes) else mutated(target.seeds, random.Random(data))
        target.check(case)

    survives()
