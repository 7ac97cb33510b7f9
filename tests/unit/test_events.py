"""What the user is told of a pass, and how often."""

import pytest

from asyncrl_api.job_status import CheckpointStatus, Status
from asyncrl_api.times import to_text
from asyncrl_operator.decide.events import CHECKPOINT_SECONDS, between

SAVED_AT = 1_800_000_000.0


def saved(step: int, seconds: float) -> Status:
    """Return a status whose last checkpoint was saved so long after the first."""
    path = f"team/gsm8k/checkpoints/{step}"
    checkpoint = CheckpointStatus(step=step, path=path, time=to_text(SAVED_AT + seconds))
    return Status(phase="Running", last_checkpoint=checkpoint)


def told(before: Status, after: Status) -> list[tuple[str, str]]:
    return [(event.reason, event.message) for event in between(before, after, None, ())]


def test_the_first_checkpoint_is_told() -> None:
    assert told(Status(phase="Running"), saved(50, 0)) == [
        ("CheckpointSaved", "step 50: team/gsm8k/checkpoints/50")
    ]


@pytest.mark.parametrize(
    ("seconds", "is_told"),
    [(1, False), (CHECKPOINT_SECONDS - 1, False), (CHECKPOINT_SECONDS, True), (3600, True)],
)
def test_checkpoints_that_come_close_together_are_not_told_each(seconds: float, is_told: bool) -> None:
    assert CHECKPOINT_SECONDS == 600
    assert bool(told(saved(50, 0), saved(100, seconds))) == is_told


def test_the_same_checkpoint_is_not_told_again() -> None:
    assert told(saved(50, 0), saved(50, 0)) == []
