"""What a user sees of a local run."""

import io

import pytest
from rich.console import Console

from asyncrl_api.report import CheckpointReport, EvaluationReport, Report
from asyncrl_operator.local.progress import LINE_SECONDS, REFRESH_SECONDS, Display, render_end, render_line

START = Report(attempt=1, step=0, max_steps=200, state="Starting")
BEFORE = EvaluationReport(step=0, accuracy=0.37, num_prompts=500, lowest_version=0, highest_version=0)
AFTER = EvaluationReport(step=200, accuracy=0.815, num_prompts=500, lowest_version=200, highest_version=200)
EVERYTHING = Report(
    attempt=1,
    step=41,
    max_steps=200,
    state="Training",
    reward=0.41249,
    staleness_mean=1.26,
    staleness_max=4,
    tokens_per_second=12345.6,
    wait_share=0.084,
    queue_depth=3,
    num_engines=2,
    remaining_seconds=59.6,
    first_evaluation=BEFORE,
)


class Screen:
    """A display, what it wrote, and its clock."""

    def __init__(self, *, is_terminal: bool = False, width: int = 120) -> None:
        self.now = 100.0
        self._file = io.StringIO()
        console = Console(file=self._file, force_terminal=is_terminal, width=width, color_system=None)
        self.display = Display(console, clock=lambda: self.now)

    def show(self, report: Report | None, *, after: float = 0.0, attempt: int = 1) -> None:
        self.now += after
        self.display.show(report, attempt)

    @property
    def text(self) -> str:
        return self._file.getvalue()

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


def training(step: int, state: str = "Training") -> Report:
    return START.model_copy(update={"step": step, "state": state})


def test_a_line_shows_all_that_is_known() -> None:
    assert render_line(EVERYTHING) == (
        "step 41/200  Training  reward 0.412  held-out 37.0% (step 0)  staleness 1.3 (max 4)  "
        "tokens/s 12,346  waited 8%  queue 3  engines 2  left 1:00"
    )


def test_a_line_leaves_out_what_is_not_known_yet() -> None:
    assert render_line(None) == "starting: the model is being made or loaded"
    assert render_line(START) == "step 0/200  Starting  queue 0  engines 0"


def test_zero_is_shown_and_not_taken_for_unknown() -> None:
    zeros = {"reward": 0.0, "staleness_mean": 0.0, "staleness_max": 0, "wait_share": 0.0}
    shown = render_line(START.model_copy(update=zeros))
    assert "reward 0.000  staleness 0.0 (max 0)  waited 0%" in shown


def test_skipped_updates_are_shown() -> None:
    report = START.model_copy(update={"skipped_updates": 2})
    assert render_line(report) == "step 0/200  Starting  skipped updates 2  queue 0  engines 0"


def test_the_last_evaluation_is_shown() -> None:
    assert "held-out 81.5% (step 200)" in render_line(
        EVERYTHING.model_copy(update={"last_evaluation": AFTER})
    )


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (9.4, "0:09"), (61, "1:01"), (3599.7, "1:00:00"), (7325, "2:02:05")]
)
def test_time_left_is_shown_as_a_clock_does(seconds: float, shown: str) -> None:
    assert render_line(START.model_copy(update={"remaining_seconds": seconds})).endswith(f"  left {shown}")


def test_without_a_terminal_lines_come_now_and_then() -> None:
    screen = Screen()
    screen.show(training(1))
    for _ in range(79):
        screen.show(training(2), after=LINE_SECONDS / 80)
    assert screen.lines == [render_line(training(1))]
    screen.show(training(3), after=LINE_SECONDS / 80)
    assert screen.lines == [render_line(training(1)), render_line(training(3))]


def test_without_a_terminal_nothing_is_said_twice() -> None:
    screen = Screen()
    for _ in range(5):
        screen.show(training(1), after=2 * LINE_SECONDS)
    assert screen.lines == [render_line(training(1))]


def test_a_new_state_is_told_at_once_but_waiting_between_steps_is_no_news() -> None:
    screen = Screen()
    reports = [
        None,
        START,
        training(0, "Evaluating"),
        training(1),
        training(1, "WaitingForBatch"),
        training(2),
        training(2, "Finished"),
    ]
    for report in reports:
        screen.show(report, after=0.1)
    assert screen.lines == [render_line(reports[index]) for index in (0, 2, 6)]


def test_what_an_earlier_attempt_did_last_is_not_what_is_done_now() -> None:
    screen = Screen()
    screen.show(training(7))
    screen.show(training(7), after=0.1, attempt=2)
    assert screen.lines == [render_line(training(7)), render_line(training(7, "Starting"))]


def test_without_a_terminal_lines_are_plain_whole_and_one_each() -> None:
    screen = Screen()
    message = (
        "trainer was ended by SIGKILL after 4 s; restarted in 0.0 s (log: " + "folder/" * 30 + "trainer.log)"
    )
    screen.show(EVERYTHING)
    screen.display.note(message)
    screen.display.close()
    assert screen.text == f"{render_line(EVERYTHING)}\n{message}\n"


@pytest.mark.parametrize("width", [50, 120])
def test_on_a_terminal_a_panel_is_drawn_again_in_place(width: int) -> None:
    screen = Screen(is_terminal=True, width=width)
    screen.show(EVERYTHING)
    for word in ("step 41 of 200", "Training", "0.412", "37.0% (step 0)", "1.3 (max 4)", "12,346", "1:00"):
        assert word in screen.text
    before = screen.text
    screen.show(EVERYTHING, after=REFRESH_SECONDS / 2)
    assert screen.text == before  # cheap enough to be called ten times a second
    screen.show(EVERYTHING.model_copy(update={"step": 42}), after=REFRESH_SECONDS / 2)
    assert "step 42 of 200" in screen.text[len(before) :] and "\x1b[2K" in screen.text[len(before) :]
    screen.display.close()


def test_on_a_terminal_the_first_report_is_awaited_and_notes_stay() -> None:
    screen = Screen(is_terminal=True)
    screen.show(None)
    assert "starting: the model is being made or loaded" in screen.text
    screen.display.note("rollout-0-engine fails its liveness probe: killed")
    screen.show(EVERYTHING, after=1)
    screen.display.close()
    assert screen.text.count("rollout-0-engine fails its liveness probe: killed\n") == 1
    screen.display.close()  # once is enough, twice does no harm


def test_the_end_says_what_it_was_good_for_and_where_things_lie() -> None:
    report = EVERYTHING.model_copy(
        update={
            "state": "Finished",
            "last_evaluation": AFTER,
            "last_checkpoint": CheckpointReport(step=200, path="runs/q/checkpoints/200", time="now"),
            "export": "runs/q/export",
            "num_held_out_in_training": 0,
            "num_held_out_in_warmup": 0,
        }
    )
    assert (
        render_end(report, folder="runs/q", metrics="runs/q/metrics.jsonl")
        == """\
held-out accuracy: 37.0% before, 81.5% after step 200 (500 prompts, greedy)
held-out prompts that occur in training: 0, in warm-up: 0
checkpoint: runs/q/checkpoints/200
Hugging Face folder: runs/q/export
metrics: runs/q/metrics.jsonl
everything: runs/q"""
    )


def test_the_end_of_a_run_that_mastered_its_prompts_says_so_first() -> None:
    report = START.model_copy(
        update={"state": "Mastered", "message": "the policy has mastered its prompts: 9"}
    )
    first, *_ = render_end(report, folder="runs/q", metrics="runs/q/metrics.jsonl").splitlines()
    assert first == "the policy has mastered its prompts: 9"


def test_the_end_of_a_run_without_evaluation_is_short() -> None:
    assert render_end(START, folder="runs/q", metrics="runs/q/metrics.jsonl") == (
        "metrics: runs/q/metrics.jsonl\neverything: runs/q"
    )
