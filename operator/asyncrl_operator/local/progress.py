"""Shows a local run: as a live panel on a terminal, as plain lines elsewhere."""

import time
from collections.abc import Callable

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from asyncrl_api.report import MASTERED_STATE, Report

LINE_SECONDS = 10.0
"""The time between two plain lines while only the step changes."""


REFRESH_SECONDS = 0.25


class Display:
    """Shows reports as they come, and notes between them."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._live: Live | None = None
        self._line = ""
        self._line_at = float("-inf")
        self._state = ""

    def show(self, report: Report | None, attempt: int) -> None:
        """Show the state of the job; cheap enough to be called ten times a second.

        Args:
            attempt: the trainer's latest attempt; what an earlier one reported is not what it is doing now.
        """
        if report is not None and report.attempt < attempt:
            report = report.model_copy(update={"state": "Starting"})
        if self._console.is_terminal:
            if self._live is None:  # it has no thread of its own, because this process forks
                self._live = Live(console=self._console, auto_refresh=False, transient=True)
                self._live.start()
            if self._clock() - self._line_at >= REFRESH_SECONDS:
                self._live.update(_panel(report), refresh=True)
                self._line_at = self._clock()
            return
        line = render_line(report)
        state = report.state if report is not None else "Starting"
        is_news = state != self._state and state not in ("Training", "WaitingForBatch")
        if line != self._line and (is_news or self._clock() - self._line_at >= LINE_SECONDS):
            self.note(line)
            self._line, self._line_at, self._state = line, self._clock(), state

    def note(self, message: str) -> None:
        """Print one line that stays, exactly as it is, since it may contain paths and words from a log."""
        self._console.print(message, highlight=False, soft_wrap=True, markup=False, emoji=False)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def render_line(report: Report | None) -> str:
    """Return a report as one plain line."""
    if report is None:
        return "starting: the model is being made or loaded"
    parts = [f"step {report.step}/{report.max_steps}", report.state]
    parts += [f"{name} {value}" for name, value in _columns(report) if value]
    return "  ".join(parts)


def _columns(report: Report) -> list[tuple[str, str]]:
    evaluation = report.last_evaluation or report.first_evaluation
    wait, staleness = report.wait_share, report.staleness_mean
    return [
        ("reward", "" if report.reward is None else f"{report.reward:.3f}"),
        ("held-out", "" if evaluation is None else f"{evaluation.accuracy:.1%} (step {evaluation.step})"),
        (
            "staleness",
            "" if report.staleness_mean is None else f"{staleness:.1f} (max {report.staleness_max})",
        ),
        ("tokens/s", "" if report.tokens_per_second is None else f"{report.tokens_per_second:,.0f}"),
        ("waited", "" if wait is None else f"{wait:.0%}"),
        ("masked", f"{report.masked_share:.0%}" if report.masked_share else ""),
        ("skipped updates", str(report.skipped_updates or "")),
        ("queue", str(report.queue_depth)),
        ("engines", str(report.num_engines)),
        ("left", "" if report.remaining_seconds is None else _duration(report.remaining_seconds)),
    ]


def _panel(report: Report | None) -> Group:
    if report is None:
        return Group(Text("starting: the model is being made or loaded"))
    bar = ProgressBar(total=report.max_steps, completed=report.step, width=40)
    head = Table.grid(padding=(0, 2))
    head.add_row(f"step {report.step} of {report.max_steps}", bar, report.state)
    values = [
        Text.assemble((f"{name}\n", "dim"), value, no_wrap=True) for name, value in _columns(report) if value
    ]
    return Group(head, Columns(values, padding=(0, 2)))  # a narrow terminal shows them in several rows


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def render_end(report: Report, *, folder: str, metrics: str) -> str:
    """Return the last words of a run: where its results are, and what it has achieved."""
    lines = [report.message] if report.state == MASTERED_STATE else []
    first, last = report.first_evaluation, report.last_evaluation
    if first is not None and last is not None:
        lines.append(
            f"held-out accuracy: {first.accuracy:.1%} before, {last.accuracy:.1%} after step {last.step} "
            f"({last.num_prompts} prompts, greedy)"
        )
    if report.num_held_out_in_training is not None and first is not None:
        lines.append(
            f"held-out prompts that occur in training: {report.num_held_out_in_training}, "
            f"in warm-up: {report.num_held_out_in_warmup}"
        )
    if report.last_checkpoint is not None:
        lines.append(f"checkpoint: {report.last_checkpoint.path}")
    if report.export:
        lines.append(f"Hugging Face folder: {report.export}")
    lines += [f"metrics: {metrics}", f"everything: {folder}"]
    return "\n".join(lines)
