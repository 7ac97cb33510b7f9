"""What becomes of recorded steps that failed by their own fault."""

from dataclasses import replace

import pytest

from asyncrl_api.ledger import History, RecordedStep, StepFailure
from asyncrl_runtime.trainer.books.failed_steps import bounded_tokens, step_to_give_up


def history_of(*failures: StepFailure) -> History:
    """Three recorded steps of two tickets."""
    steps = [RecordedStep(1, v, (2 * v + 1, 2 * v + 2), {}, {}, {}) for v in range(3)]
    return History(steps=steps, failures=list(failures), in_a_row=list(failures))


def failure(version: int, *tickets: int, at: int | None = None) -> StepFailure:
    return StepFailure(version, f"cause {len(tickets)}", tickets, at)


def test_a_step_that_failed_once_is_tried_once_more() -> None:
    assert step_to_give_up(history_of()) is None
    assert step_to_give_up(history_of(failure(1, 3), failure(2, 5))) is None


@pytest.mark.parametrize(
    ("first", "second", "discards"),
    [
        (failure(1, 3), failure(1, 4), {"step_failed": (4,)}),
        (failure(1, 3), failure(1), {"step_failed": (3, 4)}),
        (failure(1, 3), failure(1, 99), {"step_failed": (3, 4)}),  # of no step: so it is not known
        (failure(1, at=512), failure(1, 3, at=256), {"out_of_memory": (3,)}),
        (failure(1, 3), failure(1, at=512), {"out_of_memory": (3, 4)}),
    ],
)
def test_a_step_that_failed_twice_is_given_up_with_what_is_known_to_be_guilty(
    first: StepFailure, second: StepFailure, discards: dict[str, tuple[int, ...]]
) -> None:
    given_up = step_to_give_up(history_of(failure(2), first, second))
    assert given_up is not None
    assert (given_up.version, given_up.discards, given_up.cause) == (1, discards, second.cause)


def test_what_the_given_up_steps_discarded_stays_discarded() -> None:
    """Workers have acknowledged those tickets, so nobody would sample them again."""
    failed = [failure(1, 3), failure(1, 3)]
    steps = history_of().steps
    discards: list[dict[str, tuple[int, ...]]] = [
        {"stale": (9,)},
        {"stale": (10,), "step_failed": (11,)},
        {"stale": (12, 13)},
    ]
    steps = [replace(step, discards=each) for step, each in zip(steps, discards, strict=True)]
    given_up = step_to_give_up(History(steps=steps, failures=failed, in_a_row=failed))
    assert given_up is not None
    assert given_up.discards == {"step_failed": (3, 11), "stale": (10, 12, 13)}


@pytest.mark.parametrize(
    ("manifest", "failures", "longest", "bound"),
    [
        (1024, [], 100, 1024),
        (1024, [failure(1)], 100, 1024),  # it was not memory
        (1024, [failure(1, at=1024)], 100, 512),
        (1024, [failure(1, at=1024), failure(1, at=512)], 100, 256),
        (1024, [failure(1, at=1024)], 700, 700),  # a sample is not divided
        (1024, [failure(3, at=1024)], 100, 1024),  # a later step
        (2048, [failure(0, at=1024)], 100, 512),  # an earlier step, and a manifest that says more
        (800, [failure(1, at=1024)], 100, 800),  # the manifest says less than was too much
        (1024, [], 2000, 1024),
    ],
)
def test_after_memory_ran_out_micro_batches_have_half_the_tokens(
    manifest: int, failures: list[StepFailure], longest: int, bound: int
) -> None:
    assert bounded_tokens(manifest, failures, version=2, longest=longest) == bound
