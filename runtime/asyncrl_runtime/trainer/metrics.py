"""metrics.jsonl, one line per step, and the report that the operator and the local display read."""

import asyncio
import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from asyncrl_api.report import Report
from asyncrl_runtime.history.ledger_writer import append_whole

log = logging.getLogger(__name__)

RECENT_STEPS = 20
"""The number of steps over which the report's rates and shares are taken."""
MAX_UNWRITTEN = 10_000
"""How many lines are kept for a disk that does not take them; the oldest go first."""
RENEW_SECONDS = 5.0
"""The time after which a report is renewed even if nothing has changed."""


class Metrics:
    """Writes a job's metrics.jsonl and its report file.

    A disk that fails holds nothing up: lines are kept and written later, in order, and so is the report.

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
        self._unwritten: deque[tuple[Path, bytes]] = deque(maxlen=MAX_UNWRITTEN)
        self._fault = ""
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
            values: `step`, `step_seconds`, `wait_seconds`, perhaps `published_step` (the report's,
                if it lags), `num_tokens`, `num_live_tokens`, `rollout_load` and `skipped_updates`, and
                any others.
        """
        line = {"time": self._wall_clock().isoformat(timespec="milliseconds"), **values}
        self._write_line(self._path, line)
        self._recent.append(values)
        seconds = sum(step["step_seconds"] for step in self._recent)
        waited = sum(step["wait_seconds"] for step in self._recent)
        tokens = sum(step.get("num_tokens", 0) for step in self._recent)
        live = sum(step.get("num_live_tokens", step.get("num_tokens", 0)) for step in self._recent)
        remaining = (self.report.max_steps - values["step"]) * seconds / len(self._recent)
        self.update(
            step=values.get("published_step", values["step"]),
            reward=values.get("reward_mean"),
            staleness_mean=values.get("staleness_mean"),
            staleness_p50=_whole(values.get("staleness_p50")),
            staleness_p95=_whole(values.get("staleness_p95")),
            staleness_max=int(values.get("staleness_max", 0)),
            tokens_per_second=tokens / seconds if seconds else None,
            wait_share=waited / seconds if seconds else None,
            masked_share=1 - live / tokens if tokens else None,
            rollout_load=_mean([step.get("rollout_load") for step in self._recent]),
            remaining_seconds=remaining,
            skipped_updates=sum(int(step.get("skipped_updates", 0)) for step in self._recent),
        )

    def log_evaluation(self, values: Mapping[str, Any]) -> None:
        self._write_line(self._evaluations, values)

    def _write_line(self, path: Path, values: Mapping[str, Any]) -> None:
        self._unwritten.append((path, json.dumps(values).encode() + b"\n"))
        try:
            self.flush()
        except OSError as error:
            self._tell(
                f"{path} takes no line: {error}; {len(self._unwritten)} lines are kept, and tried again"
            )

    def flush(self) -> None:
        """Write the lines that the disk has not taken yet.

        Raises:
            OSError: it still does not; they are kept.
        """
        while self._unwritten:
            append_whole(*self._unwritten[0])
            self._unwritten.popleft()

    def _tell(self, fault: str) -> None:
        """Log what is wrong with the disk, once until it is well again."""
        if fault and not self._fault:
            log.warning("%s", fault)
        elif self._fault and not fault:
            log.warning("the disk takes reports and metrics again")
        self._fault = fault

    def update(self, **changes: Any) -> None:
        """Change the report and write it. It is kept in memory if the disk does not take it."""
        changes["time"] = self._wall_clock().isoformat(timespec="seconds")
        changes["seconds_without_progress"] = self._seconds_without_progress()
        self.report = self.report.model_copy(update=changes)
        try:
            self.flush()
            self.report.save(self._report_file)
        except OSError as error:
            self._tell(f"the report was not written to {self._report_file}: {error}; it is tried again")
        else:
            self._tell("")

    def tell_disk_fault(self, message: str) -> None:
        """Say in the report what the disk does not take; empty when it does again."""
        self.update(disk_fault=message)

    async def keep_renewed(self) -> None:
        """Renew the report every RENEW_SECONDS until cancelled; its time shows that the event loop runs."""
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            self.update()


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are known; None if none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _whole(versions: float | None) -> int | None:
    return None if versions is None else int(versions)
