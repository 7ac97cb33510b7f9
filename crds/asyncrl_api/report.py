"""The state of a job, as its trainer reports it, and how others read it.

A report is written by one process and read by others, of other versions and in other hands: whoever reads one
uses `read_report`, which never raises, and gets values that can be counted with and shown.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from asyncrl_api.base import MAX_INT
from asyncrl_api.times import is_time
from asyncrl_api.wire import Wire

MASTERED_STATE = "Mastered"
"""The state of a trainer that has finished before the last step, since nothing was left to learn."""
LONGEST_WORD, LONGEST_TEXT = 253, 1024
"""The longest strings that a status holds."""


class CheckpointReport(Wire):
    step: int
    path: str
    time: str


class EvaluationReport(Wire):
    step: int
    accuracy: float
    """Mean reward of held-out prompts, answered greedily."""
    num_prompts: int
    lowest_version: int
    highest_version: int


class Report(Wire):
    """The job's state as the trainer sees it: the source of status.progress and of the local display.

    A job's images may be newer than the operator that reads this, so unknown fields are ignored.
    """

    model_config = ConfigDict(extra="ignore")

    attempt: int
    step: int
    max_steps: int
    state: str
    """What the trainer is doing, in one word: Starting, Training, WaitingForBatch, Evaluating, Finished or
    Mastered."""
    message: str = ""
    disk_fault: str = ""
    """What the disk does not take, and since how often; empty if it takes everything."""
    reward: float | None = None
    staleness_mean: float | None = None
    staleness_p50: int | None = None
    staleness_p95: int | None = None
    staleness_max: int | None = None
    tokens_per_second: float | None = None
    wait_share: float | None = None
    """The share of the last steps' time in which the trainer waited for a batch."""
    masked_share: float | None = None
    """The share of the last steps' sampled tokens that were too old for the loss."""
    rollout_load: float | None = None
    """The share of the samples that the engines could have run at once which they ran during the last steps.
    None: there were no engines, or the runtime is older than this field."""
    skipped_updates: int = 0
    """The number of optimizer updates of the last steps that were skipped: their gradient was not finite."""
    queue_depth: int = 0
    """The number of prompt groups that have arrived and are not trained yet."""
    num_engines: int = 0
    update_gather_seconds: float | None = None
    """How long the last update of engines waited for weights to be gathered."""
    update_transfer_seconds: float | None = None
    """How long it sent them, which waits for engines that still load what came before."""
    update_load_seconds: float | None = None
    """How long engines loaded after the last had been sent."""
    update_pause_seconds: float | None = None
    """How long the engine sampled nothing that was paused longest."""
    publish_copy_seconds: float | None = None
    """How long the trainer's ranks copied the weights that were published last."""
    publish_wait_seconds: float | None = None
    """How long the last step waited, when it was trained, for the publication before it."""
    remaining_seconds: float | None = None
    first_evaluation: EvaluationReport | None = None
    last_evaluation: EvaluationReport | None = None
    last_checkpoint: CheckpointReport | None = None
    export: str = ""
    num_held_out_in_training: int | None = None
    """The number of held-out prompts that also occur among the training prompts."""
    num_held_out_in_warmup: int | None = None
    """The number of held-out prompts that the model factory trained on."""
    time: str = Field(default="", description="When the report was written: ISO 8601, UTC.")
    seconds_without_progress: float | None = None
    """How long the trainer had made no progress when the report was written, though it was its turn; 0 while
    it waits for groups, answers or engines. Measured by its own monotonic clock, so that nobody has to
    compare two clocks. None: the runtime is older than this field."""
    num_refused_messages: int | None = None
    """The number of messages that this attempt has refused, since they were not what was asked for."""

    def save(self, path: Path) -> None:
        """Replace the file atomically, so that a reader never sees half of it."""
        scratch = path.with_suffix(".tmp")
        scratch.write_text(self.model_dump_json(by_alias=True, exclude_none=True))
        scratch.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Report | None":
        """Return the last report as `read_report` does; None if there is none yet, or none that is one."""
        try:
            return read_report(path.read_bytes()).report
        except FileNotFoundError:
            return None


class ReadReport(NamedTuple):
    """A report as it may be used."""

    report: Report | None
    """None: the text is no report."""
    fault: str = ""
    """What was wrong with it, in words; empty if nothing was."""


R = TypeVar("R", bound=Wire)


def read_report(text: str | bytes) -> ReadReport:
    """Return the report in a text, with values beyond all bounds cut to them, or left out. Never raises."""
    try:
        report = Report.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        return ReadReport(None, f"it is not understood: {where}: {first['msg']}"[:LONGEST_TEXT])
    usable = _usable_report(report)
    names = [
        name for name in Report.model_fields if not _is_equal(getattr(report, name), getattr(usable, name))
    ]
    fault = f"{', '.join(names)}: out of bounds, and cut or left out" if names else ""
    return ReadReport(usable, fault)


def _usable_report(report: Report) -> Report:
    changes: dict[str, Any] = {name: _count(getattr(report, name)) for name in _COUNTS}
    changes |= {name: _amount(getattr(report, name)) for name in _AMOUNTS}
    changes |= {name: getattr(report, name)[:most] for name, most in _TEXTS.items()}
    return report.model_copy(
        update={
            **changes,
            "reward": _finite(report.reward),
            "wait_share": _share(report.wait_share),
            "masked_share": _share(report.masked_share),
            "rollout_load": _share(report.rollout_load),
            "time": report.time if is_time(report.time) else "",
            "first_evaluation": _usable(report.first_evaluation, _usable_evaluation),
            "last_evaluation": _usable(report.last_evaluation, _usable_evaluation),
            "last_checkpoint": _usable(report.last_checkpoint, _usable_checkpoint),
        }
    )


_COUNTS = (
    "attempt",
    "step",
    "max_steps",
    "staleness_p50",
    "staleness_p95",
    "staleness_max",
    "queue_depth",
    "num_engines",
    "num_held_out_in_training",
    "num_held_out_in_warmup",
    "num_refused_messages",
)
_AMOUNTS = (
    "staleness_mean",
    "tokens_per_second",
    "remaining_seconds",
    "update_gather_seconds",
    "update_transfer_seconds",
    "update_load_seconds",
    "update_pause_seconds",
    "publish_copy_seconds",
    "publish_wait_seconds",
    "seconds_without_progress",
)
_TEXTS = {"state": LONGEST_WORD, "message": LONGEST_TEXT, "export": LONGEST_TEXT}


def _usable(value: R | None, usable: Callable[[R], R | None]) -> R | None:
    return None if value is None else usable(value)


def _usable_checkpoint(checkpoint: CheckpointReport) -> CheckpointReport | None:
    if not is_time(checkpoint.time):
        return None
    changes = {"step": _count(checkpoint.step), "path": checkpoint.path[:LONGEST_TEXT]}
    return checkpoint.model_copy(update=changes)


def _usable_evaluation(evaluation: EvaluationReport) -> EvaluationReport | None:
    if not math.isfinite(evaluation.accuracy):
        return None
    counts = ("step", "num_prompts", "lowest_version", "highest_version")
    return evaluation.model_copy(update={name: _count(getattr(evaluation, name)) for name in counts})


def _count(value: int | None) -> int | None:
    return None if value is None else min(max(value, 0), MAX_INT)


def _amount(value: float | None) -> float | None:
    """Return an amount within its bounds; None where nobody can tell which amount was meant."""
    return None if value is None or math.isnan(value) else min(max(value, 0.0), float(MAX_INT))


def _share(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else min(max(value, 0.0), 1.0)


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def _is_equal(one: Any, other: Any) -> bool:
    return bool(one == other)
