"""The status of an AsyncRLJob: what the operator writes, and all that it remembers between two passes.

`attempt`, `split` and `clocks` are its only memory and are written before the action that relies on them;
everything else is observed anew. Times are RFC 3339 in UTC, to the second.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from asyncrl_api.base import MAX_INT, Text
from asyncrl_api.times import is_time

Number = Annotated[int, Field(ge=0, le=MAX_INT)]
Word = Annotated[str, Field(max_length=253)]


def _checked_time(text: str) -> str:
    if not is_time(text):
        raise ValueError(f"{text!r} is no time; must be RFC 3339")
    return text


Time = Annotated[
    str, Field(max_length=40, json_schema_extra={"format": "date-time"}), AfterValidator(_checked_time)
]
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
    """Base of the blocks of a status: frozen; unknown fields, from another version, are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=to_camel, populate_by_name=True)


class Condition(StatusType):
    """One fact about the job (Kubernetes API conventions)."""

    type: Word = _of("Type of the condition, such as Ready.", ...)
    status: Literal["True", "False", "Unknown"] = _of("Whether the condition holds.", ...)
    reason: Word = _of("Why, in one CamelCase word.", ...)
    message: Text = _of("Why, in a sentence.", "")
    last_transition_time: Time = _of("When `status` last changed.", ...)
    observed_generation: Number = _of("Generation of the spec that the condition is about.", ...)


class AttemptStatus(StatusType):
    """The current attempt of the trainer; an attempt is one start of the whole group."""

    number: Number = _of("Number of the attempt: counts the starts of the trainer, from 1.", ...)
    job_name: Word = _of("Name of this attempt's Job.", ...)
    config_hash: Word = _of(
        "Hash of the fields whose edits restart the trainer; used where its configuration is gone.", ...
    )
    gpus: Number = _of("GPUs of this attempt.", ...)
    start_time: Time | None = _of("When the attempt's Job was created; absent until then.")
    next_retry_time: Time | None = _of("Earliest time of the next attempt; set when this one ends.")
    last_reason: Word = _of("Why the last attempt ended.", "")
    restarts: Number = _of("Attempts that count against failurePolicy.trainer.maxRestarts.", 0)
    disruptions: Number = _of("Attempts that count against failurePolicy.trainer.maxDisruptions.", 0)
    failures_in_a_row: Number = _of("Attempts that ended since the last step was made.", 0)
    step: int = _of("Step at which the last attempt ended; -1: none has ended yet.", -1, ge=-1, le=MAX_INT)


class SplitStatus(StatusType):
    """How many GPUs each group has. In mode Auto this is the operator's decision."""

    trainer: Number = _of("GPUs of the trainer.", ...)
    rollout: Number = _of("GPUs of the rollout group.", ...)
    idle: Number = _of("GPUs of the budget that are not used.", ...)
    gpus_per_replica: Annotated[int, Field(ge=1, le=MAX_INT)] = _of("GPUs of one engine.", ...)
    total: Number = _of("The budget that was split.", ...)
    decided_by: Literal["Auto", "Manual"] = _of(
        "Who decided the split: the operator (Auto) or the user (Manual).", ...
    )
    reason: Word = _of("Why the split was decided so, in one CamelCase word.", ...)
    last_change_time: Time = _of("When the split was decided.", ...)
    pressure: Literal["", "Rollout", "Trainer"] = _of(
        "The group that is short of GPUs, by the last report; empty: neither.", ""
    )
    pressure_time: Time | None = _of("When that group began to be short, without a break since.")


class ClocksStatus(StatusType):
    """When something began that has lasted since; absent while it is not so."""

    pending_since: Time | None = _of("When the job began to wait for its pods to run.")
    below_minimum_since: Time | None = _of(
        "When the share of engines that are ready fell below minAvailablePercent."
    )


class GroupStatus(StatusType):
    """One group of pods."""

    name: Word = _of("trainer, rollout or messaging.", ...)
    kind: Word = _of("Kind of the object that holds the pods.", ...)
    resource: Word = _of("Name of that object.", ...)
    desired: Number = _of("Number of pods that there should be.", ...)
    ready: Number = _of("Number of pods that are ready.", ...)
    updated: Number = _of("Number of pods that need not be replaced.", 0)
    gpus: Number = _of("GPUs that the group's pods hold.", 0)
    summary: Word = _of("Ready and desired pods: ready/desired.", "")


class ProgressStatus(StatusType):
    """How far training is."""

    step: Number = _of("Training steps in the published weights: the policy version.", ...)
    max_steps: Number = _of("The spec.training.maxSteps that the trainer works with.", ...)
    summary: Word = _of("Progress in short: step/maxSteps.", ...)
    percent: Number = _of("Share of maxSteps that is done, in percent.", ...)
    state: Word = _of("What the trainer is doing, in one word.", "")
    estimated_remaining_seconds: Number | None = _of("Seconds until maxSteps at the present speed.")


class StalenessStatus(StatusType):
    """Age of the tokens that were trained last, in whole policy versions."""

    p50: Number | None = _of("Median age.")
    p95: Number | None = _of("95th percentile of the age.")
    max: Number | None = _of("Age of the oldest token.")
    masked_percent: Number | None = _of("Share of the tokens that were too old for the loss.")


class ThroughputStatus(StatusType):
    """Speed of the job."""

    tokens_per_second: Number | None = _of("Sampled tokens that are trained per second.")
    queue_depth: Number = _of("Prompt groups that are waiting for the trainer.", 0)
    trainer_wait_percent: Number | None = _of("Share of the time in which the trainer waited for a batch.")


class WeightUpdateStatus(StatusType):
    """What the time of the last update of engines went into; transfer and load overlap."""

    gather_milliseconds: Number | None = _of("Waiting for weights to be gathered from the trainer's ranks.")
    transfer_milliseconds: Number | None = _of("Sending them, until engines have loaded all but the last.")
    load_milliseconds: Number | None = _of("Loading, after the last had been sent.")
    pause_milliseconds: Number | None = _of("How long the engine was paused that was paused longest.")
    copy_milliseconds: Number | None = _of("How long the trainer copied its weights, before the update.")
    wait_milliseconds: Number | None = _of("How long the last step waited for the update before it.")


class RewardStatus(StatusType):
    """How well the policy does."""

    mean: Decimal | None = _of("Mean reward of the last step.")
    held_out: Decimal | None = _of("Mean reward of held-out prompts, answered greedily.")


class GPUsStatus(StatusType):
    """The GPU budget, and how much of it the job holds."""

    budget: Number = _of("The budget: spec.gpuBudget.total.", ...)
    allocated: Number = _of("GPUs of all pods that have not ended.", ...)
    summary: Word = _of("Both in short: allocated/budget.", ...)


class CheckpointStatus(StatusType):
    """The checkpoint that a restarted trainer continues from."""

    step: Number = _of("Step that the checkpoint holds.", ...)
    path: Text = _of("Folder of the checkpoint on the claim.", ...)
    time: Time = _of("When the checkpoint was complete.", ...)


class PodSetStatus(StatusType):
    """Pods that the job needs at once when it starts, for a queueing system such as Kueue."""

    name: Word = _of("trainer, rollout or messaging.", ...)
    count: Number = _of("Number of pods.", ...)
    requests: dict[str, str] = _of("Resources that one pod asks for.", {})


class Status(StatusType):
    """The state of the job, as observed by the operator."""

    observed_generation: int = _of("Generation of the spec that this status is about; -1: none yet.", -1)
    phase: Phase | None = _of("A summary for people; programs should read the conditions.")
    message: Text = _of("A sentence that explains the phase.", "")
    conditions: tuple[Condition, ...] = _of("Facts about the job, by type.", ())
    start_time: Time | None = _of("When the job became active; reset whenever it is resumed.")
    completion_time: Time | None = _of("When the job succeeded or failed.")
    attempt: AttemptStatus | None = _of("The current attempt of the trainer.")
    split: SplitStatus | None = _of("How many GPUs each group has.")
    clocks: ClocksStatus | None = _of("When something began that has lasted since.")
    groups: tuple[GroupStatus, ...] = _of("The groups of pods, by name.", ())
    progress: ProgressStatus | None = _of("How far training is.")
    staleness: StalenessStatus | None = _of("Age of the tokens that were trained last.")
    throughput: ThroughputStatus | None = _of("Speed of the job.")
    weight_update: WeightUpdateStatus | None = _of("What the last update of engines spent its time on.")
    reward: RewardStatus | None = _of("How well the policy does.")
    gpus: GPUsStatus | None = _of("The GPU budget, and how much of it the job holds.")
    last_checkpoint: CheckpointStatus | None = _of("The checkpoint that a restarted trainer continues from.")
    report_time: Time | None = _of("When the trainer last reported, by its own clock.")
    report_seen_time: Time | None = _of("When the operator saw reportTime change, by the operator's clock.")
    pod_sets: tuple[PodSetStatus, ...] = _of(
        "Pods that the job needs at once when it starts; fixed while it is suspended.", ()
    )
    selector: Text = _of("Label selector of the pods, for the scale subresource.", "")

    def condition(self, kind: str) -> Condition | None:
        return next((each for each in self.conditions if each.type == kind), None)

    def is_true(self, kind: str) -> bool:
        found = self.condition(kind)
        return found is not None and found.status == "True"

    def to_json(self) -> dict[str, Any]:
        """Return the status as the API server takes it: absent fields stay absent."""
        return self.model_dump(by_alias=True, exclude_none=True, mode="json")
