"""The reports of a starting trainer, written by a thread of their own, since loading holds up all others."""

import asyncio
import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from asyncrl_api.ledger import LedgerError, read_ledger
from asyncrl_api.report import Report
from asyncrl_api.run_config import RunConfig
from asyncrl_runtime.trainer.cluster_report import copying_report
from asyncrl_runtime.trainer.metrics import RENEW_SECONDS
from asyncrl_runtime.trainer.turn_clock import TurnClock, disk_bytes

log = logging.getLogger(__name__)

END_SECONDS = 10.0
"""The time for the last copy; a thread that a disk holds up is left behind."""


class Start:
    """A start, from the process's first moment until the attempt has metrics to report with.

    Its thread consumes nothing and produces a report every RENEW_SECONDS, in a cluster also its copy. `end`
    wakes it.
    """

    def __init__(self, config: RunConfig, attempt: int) -> None:
        self.clock = TurnClock(time.monotonic)
        self._config = config
        self._attempt = attempt
        self._report: Report | None = None
        self._is_unwritten = False
        self._disk_fault = ""
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._report_on, name="starting", daemon=True)

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Report until the body ends or calls `end`."""
        self._thread.start()
        try:
            yield
        finally:
            self.end()

    def end(self) -> None:
        """Stop reporting, so that whoever writes the report next is the only one."""
        self._is_over.set()
        self._thread.join(END_SECONDS)

    def tell_disk_fault(self, message: str) -> None:
        """Say in the next report what the disk does not take; empty when it does again."""
        self._disk_fault = message

    def _report_on(self) -> None:
        try:
            asyncio.run(self._report_until_over())
        except Exception:  # the edge of this thread: without its reports the start is merely not seen
            log.exception("a start is no longer reported; the trainer itself goes on")

    async def _report_until_over(self) -> None:
        report = first_report(self._config, self._attempt)
        with self.clock.turn(what_moves):
            self._write(report)
            async with copying_report(self._config, time.monotonic, lambda: self._report):
                while not self._is_over.is_set():
                    await asyncio.to_thread(self._is_over.wait, RENEW_SECONDS)
                    if not self._is_over.is_set():
                        self._write(report)

    def _write(self, report: Report) -> None:
        changes: dict[str, Any] = {
            "disk_fault": self._disk_fault,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds_without_progress": self.clock.seconds_without_progress(),
        }
        self._report = report.model_copy(update=changes)
        try:
            self._config.report_file.parent.mkdir(parents=True, exist_ok=True)  # a new claim is empty
            self._report.save(self._config.report_file)
        except OSError as error:  # whoever needs the disk will wait for it, or end for it
            if not self._is_unwritten:
                log.warning("the report was not written to %s: %s", self._config.report_file, error)
            self._is_unwritten = True


def what_moves() -> int:
    """Return a number that changes while a trainer loads: bytes read and written, plus imported modules."""
    return disk_bytes() + len(sys.modules)


def first_report(config: RunConfig, attempt: int) -> Report:
    """Return the report of an attempt that has not loaded anything yet.

    It contains what an earlier attempt of this same object has reached, but not its rates and states.
    """
    report = Report(attempt=attempt, step=0, max_steps=config.spec.training.max_steps, state="Starting")
    try:
        is_ours = read_ledger(config.job_folder / "ledger.jsonl").uid == config.uid
        before = Report.load(config.report_file) if is_ours else None
    except (OSError, ValueError, LedgerError):  # whoever needs these files will say what is wrong with them
        before = None
    if before is None:
        return report
    kept = {"step", "max_steps", "first_evaluation", "last_evaluation", "last_checkpoint"}
    return report.model_copy(update={name: getattr(before, name) for name in kept})
