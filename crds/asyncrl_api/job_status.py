"""AsyncRLJobStatus: what the operator writes, and all that it remembers between two passes.

`attempt`, `split` and `clocks` are the only memory, written before the action that rests on them; all else
is observed anew. Times are RFC 3339 in UTC, in seconds.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from asyncrl_api.base import MAX_INT, Text

Number = Annotated[int, Field(ge=0, le=MAX_INT)]
Word = Annotated[str, Field(max_length=253)]
Time = Annotated[str, Field(max_length=40, json_schema_extra={"format": "date-time"})]
Decimal = Annotated[str, Field(max_length=32, description="A decimal number, as text.")]

Phase = Literal[
    "Pending",
    "Queued",
    "Starting",
    "Running",
    "Resizing",
    "Restarting",
    "Suspending",
    "Suspended",
    "Succeeded",
    "Failed",
]


def _of(description: str, default: Any = None, **constraints: Any) -> Any:
    return Field(default, description=description, **constraints)


class StatusType(BaseModel):
    """Base of the blocks of a status: frozen; what an older or newer operator wrote besides is ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=to_camel, populate_by_name=True)


class Condition(StatusType):
    """One fact about the job (Kubernetes API conventions)."""

    type: Word = _of("Which fact.", ...)
    status: Literal["True", "False", "Unknown"] = _of("Whether it holds.", ...)
    reason: Word = _of("Why, in one CamelCase word.", ...)
    message: Text = _of("Why, in a sentence.", "")
    last_transition_time: Time = _of("When status changed last.", ...)
    observed_generation: Number = _of("Generation of the spec that this is about.", ...)


class AttemptStatus(StatusType):
    """The attempt of the trainer: one start of the whole group."""

    number: Number = _of("Counts the starts of the trainer, from 1 on.", ...)
    job_name: Word = _of("The Job of this attempt.", ...)
    config_hash: Word = _of("Of the fields that a trainer is restarted for.", ...)
    gpus: Number = _of("GPUs of this attempt.", ...)
    start_time: Time | None = _of("When its Job was made; absent until then.")
    next_retry_time: Time | None = _of("Set when the attempt has ended: the next one is not made before.")
    last_reason: Word = _of("Why the last attempt ended.", "")
    restarts: Number = _of("Ends counted against failurePolicy.trainer.maxRestarts.", 0)
    disruptions: Number = _of("Ends counted against failurePolicy.trainer.maxDisruptions.", 0)
    failures_in_a_row: Number = _of("Ends since a step was made.", 0)
    step: int = _of("Step at the last end; -1: none yet.", -1)


class SplitStatus(StatusType):
    """Who has how many GPUs. In mode Auto this is the operator's decision."""

    trainer: Number = _of("GPUs of the trainer.", ...)
    rollout: Number = _of("GPUs of the rollout group.", ...)
    idle: Number = _of("GPUs of the budget that are not used.", ...)
    gpus_per_replica: Number = _of("GPUs of one engine.", ...)
    total: Number = _of("The budget that was split.", ...)
    decided_by: Literal["Auto", "Manual"] = _of("Whose decision it is.", ...)
    reason: Word = _of("What it was decided for.", ...)
    last_change_time: Time = _of("When it was decided.", ...)
    pressure: Literal["", "Rollout", "Trainer"] = _of("The group that is short, by the last report.", "")
    pressure_time: Time | None = _of("Since when that has been so without a break.")


class ClocksStatus(StatusType):
    """Since when something has been so; absent while it is not."""

    pending_since: Time | None = _of("The job wants to run and does not yet.")
    below_minimum_since: Time | None = _of("Fewer engines are ready than minAvailablePercent asks for.")


class GroupStatus(StatusType):
    """One group of pods."""

    name: Word = _of("trainer, rollout or messaging.", ...)
    kind: Word = _of("Kind of the object that holds the pods.", ...)
    resource: Word = _of("Its name.", ...)
    desired: Number = _of("Pods that there should be.", ...)
    ready: Number = _of("Pods that are ready.", ...)
    updated: Number = _of("Pods of the newest template.", 0)
    gpus: Number = _of("GPUs that its pods hold.", 0)
    summary: Word = _of("ready/desired", "")


class ProgressStatus(StatusType):
    """How far training is."""

    step: Number = _of("Steps behind the published weights: the policy version.", ...)
    max_steps: Number = _of("spec.training.maxSteps as the trainer knows it.", ...)
    summary: Word = _of("step/maxSteps", ...)
    percent: Number = _of("Of maxSteps.", ...)
    state: Word = _of("What the trainer does.", "")
    estimated_remaining_seconds: Number | None = _of("Until maxSteps, at the present speed.")


class StalenessStatus(StatusType):
    """Age of the tokens trained last, in whole policy versions."""

    p50: Number | None = _of("Median.")
    p95: Number | None = _of("95th percentile.")
    max: Number | None = _of("Oldest.")


class ThroughputStatus(StatusType):
    """Speed of the job."""

    tokens_per_second: Number | None = _of("Sampled tokens trained per second.")
    queue_depth: Number = _of("Prompt groups that wait for the trainer.", 0)
    trainer_wait_percent: Number | None = _of("Share of the time in which the trainer waited for a batch.")


class RewardStatus(StatusType):
    """What the policy is worth."""

    mean: Decimal | None = _of("Mean reward of the last step.")
    held_out: Decimal | None = _of("Mean reward of held-out prompts, answered greedily.")


class GPUsStatus(StatusType):
    """The budget and what is held of it."""

    budget: Number = _of("spec.gpuBudget.total", ...)
    allocated: Number = _of("GPUs of all pods that have not ended.", ...)
    summary: Word = _of("allocated/budget", ...)


class CheckpointStatus(StatusType):
    """What a restarted trainer continues from."""

    step: Number = _of("Step of the policy.", ...)
    path: Text = _of("Its folder on the claim.", ...)
    time: Time = _of("When it was complete.", ...)


class PodSetStatus(StatusType):
    """Pods that are wanted at once when the job starts, for a queue such as Kueue's."""

    name: Word = _of("trainer, rollout or messaging.", ...)
    count: Number = _of("Number of pods.", ...)
    requests: dict[str, str] = _of("Resources that one pod asks for.", {})


class Status(StatusType):
    """How the job stands."""

    observed_generation: int = _of("Generation of the spec that this status is about; -1: none yet.", -1)
    phase: Phase | None = _of("A summary to be read by people; programs read conditions.")
    message: Text = _of("A sentence about the phase.", "")
    conditions: tuple[Condition, ...] = _of("Facts, by type.", ())
    start_time: Time | None = _of("When the job began to be active; begins again with each resume.")
    completion_time: Time | None = _of("When the job succeeded or failed.")
    attempt: AttemptStatus | None = _of("The attempt of the trainer.")
    split: SplitStatus | None = _of("Who has how many GPUs.")
    clocks: ClocksStatus | None = _of("Since when something has been so.")
    groups: tuple[GroupStatus, ...] = _of("The groups of pods, by name.", ())
    progress: ProgressStatus | None = _of("How far training is.")
    staleness: StalenessStatus | None = _of("Age of the tokens trained last.")
    throughput: ThroughputStatus | None = _of("Speed of the job.")
    reward: RewardStatus | None = _of("What the policy is worth.")
    gpus: GPUsStatus | None = _of("The budget and what is held of it.")
    last_checkpoint: CheckpointStatus | None = _of("What a restarted trainer continues from.")
    report_time: Time | None = _of("When the trainer reported last, by its own clock.")
    report_seen_time: Time | None = _of("When the operator saw reportTime change, by the operator's clock.")
    pod_sets: tuple[PodSetStatus, ...] = _of("Pods wanted at the start; fixed while suspended.", ())
    selector: Text = _of("Label selector of the pods, for the scale subresource.", "")

    def condition(self, kind: str) -> Condition | None:
        return next((each for each in self.conditions if each.type == kind), None)

    def is_true(self, kind: str) -> bool:
        found = self.condition(kind)
        return found is not None and found.status == "True"

    def to_json(self) -> dict[str, Any]:
        """Return it as the API server takes it: what is absent stays absent."""
        return self.model_dump(by_alias=True, exclude_none=True, mode="json")
