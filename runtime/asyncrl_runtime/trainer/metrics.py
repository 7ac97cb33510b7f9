"""metrics.jsonl, one line per step, and the report that the operator and the local display read."""

import asyncio
import json
import logging
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from asyncrl_api.report import Report

log = logging.getLogger(__name__)

RECENT_STEPS = 20
"""The number of steps over which the report's rates and shares are taken."""
RENEW_SECONDS = 5.0
"""The time after which a report is renewed even if nothing has changed."""


class Metrics:
    """Writes a job's metrics.jsonl and its report file.

    Args:
        wall_clock: returns the time that is written into the files.
        seconds_without_progress: returns the report's field of that name.
    """

    def __init__(
        self,
        folder: Path,
        report_file: Path,
        report: Report,
        wall_clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        seconds_without_progress: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._path = folder / "metrics.jsonl"
        self._evaluations = folder / "evaluations.jsonl"
        self._report_file = report_file
        self._wall_clock = wall_clock
        self._seconds_without_progress = seconds_without_progress
        self._recent: deque[Mapping[str, float]] = deque(maxlen=RECENT_STEPS)
        self.report = report

    def rewind(self, version: int) -> None:
        """Drop the lines of steps after `version`, which will be trained and written again."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= version:
                    kept.append(line)
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # a crash left the line incomplete
        scratch = self._path.with_suffix(".tmp")
        scratch.write_text("".join(line + "\n" for line in kept))
        scratch.replace(self._path)

    def log_step(self, values: Mapping[str, Any]) -> None:
        """Append one step's line and renew the report.

        Args:
            values: `step`, `step_seconds`, `wait_seconds`, perhaps `num_tokens` and `skipped_updates`, and
                any others.
        """
        line = {"time": self._wall_clock().isoformat(timespec="milliseconds"), **values}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._recent.append(values)
        seconds = sum(step["step_seconds"] for step in self._recent)
        waited = sum(step["wait_seconds"] for step in self._recent)
        tokens = sum(step.get("num_tokens", 0) for step in self._recent)
        remaining = (self.report.max_steps - values["step"]) * seconds / len(self._recent)
        self.update(
            step=values["step"],
            reward=values.get("reward_mean"),
            staleness_mean=values.get("staleness_mean"),
            staleness_p50=_whole(values.get("staleness_p50")),
            staleness_p95=_whole(values.get("staleness_p95")),
            staleness_max=int(values.get("staleness_max", 0)),
            tokens_per_second=tokens / seconds if seconds else None,
            wait_share=waited / seconds if seconds else None,
            remaining_seconds=remaining,
            skipped_updates=sum(int(step.get("skipped_updates", 0)) for step in self._recent),
        )

    def log_evaluation(self, values: Mapping[str, Any]) -> None:
        with self._evaluations.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def update(self, **changes: Any) -> None:
        """Change the report and write it."""
        changes["time"] = self._wall_clock().isoformat(timespec="seconds")
        changes["seconds_without_progress"] = self._seconds_without_progress()
        self.report = self.report.model_copy(update=changes)
        self.report.save(self._report_file)

    async def keep_renewed(self) -> None:
        """Renew the report every RENEW_SECONDS until cancelled; its time shows that the event loop runs."""
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            try:
                self.update()
            except OSError as error:
                log.warning("the report was not written to %s: %s", self._report_file, error)


def _whole(versions: float | None) -> int | None:
    return None if versions is None else int(versions)
