"""The state of a job, as its trainer reports it."""

from pathlib import Path
from typing import Self

from pydantic import ConfigDict, Field

from asyncrl_api.wire import Wire


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
    """What the trainer is doing, in one word: Starting, Training, WaitingForBatch, Evaluating, Finished."""
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
    queue_depth: int = 0
    """The number of prompt groups that have arrived and are not trained yet."""
    num_engines: int = 0
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

    def save(self, path: Path) -> None:
        """Replace the file atomically, so that a reader never sees half of it."""
        scratch = path.with_suffix(".tmp")
        scratch.write_text(self.model_dump_json(by_alias=True, exclude_none=True))
        scratch.replace(path)

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Return the last report, or None if there is none yet."""
        try:
            return cls.model_validate_json(path.read_text())
        except FileNotFoundError:
            return None
