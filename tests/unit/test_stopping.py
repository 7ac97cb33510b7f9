"""Whether a step fits into the grace, and what is announced beside the live values."""

from pathlib import Path

import pytest

from asyncrl_runtime.trainer.stopping import LEAVE_SECONDS, StepTimes, announced_disruption, fits_into_grace


@pytest.mark.parametrize(
    ("left", "step_seconds", "checkpoint_seconds", "fits"),
    [
        (300, 1500, 60, False),  # 25 minutes
        (300, 200, 60, True),
        (300, 200, 100, False),  # the checkpoint does not
        (200 + 60 + LEAVE_SECONDS, 200, 60, True),
        (300, None, 0, False),  # no step has been measured
        (300, 0, 0, True),  # done by all that is known
        (LEAVE_SECONDS - 1, 0, 0, False),  # but it is not, and the time is over
    ],
)
def test_a_step_fits_with_the_checkpoint_after_it_or_not_at_all(
    left: float, step_seconds: float | None, checkpoint_seconds: float, fits: bool
) -> None:
    assert fits_into_grace(left, step_seconds, checkpoint_seconds) is fits


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_what_a_step_still_takes_is_told_by_the_longest_of_the_last_ones() -> None:
    time = Time()
    steps = StepTimes(time)
    assert steps.left() is None
    for seconds in (20, 30, 10):
        with steps.measured():
            time.now += seconds
    with steps.measured():
        assert steps.left() == 30
        time.now += 12
        assert steps.left() == 18
        time.now += 100
        assert steps.left() == 0


def test_a_step_that_was_broken_off_is_no_measure() -> None:
    time = Time()
    steps = StepTimes(time)
    with pytest.raises(ValueError, match="x"), steps.measured():
        raise ValueError("x")
    assert steps.left() is None


def test_a_disruption_is_announced_by_a_file_that_is_not_empty(tmp_path: Path) -> None:
    live_file = tmp_path / "live.json"
    assert announced_disruption(live_file) == ""
    (tmp_path / "disruption").write_text("")
    assert announced_disruption(live_file) == ""
    (tmp_path / "disruption").write_text("node n1: taint karpenter.sh/disrupted\n")
    assert announced_disruption(live_file) == "node n1: taint karpenter.sh/disrupted"
    (tmp_path / "disruption").write_bytes(b"\xff\xfe")
    assert announced_disruption(live_file) == ""
