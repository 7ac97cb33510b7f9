"""A status with everything in it."""

from asyncrl_api.job_status import (
    AttemptStatus,
    CheckpointStatus,
    ClocksStatus,
    Condition,
    GPUsStatus,
    GroupStatus,
    PodSetStatus,
    ProgressStatus,
    RewardStatus,
    SplitStatus,
    StalenessStatus,
    Status,
    ThroughputStatus,
    WeightUpdateStatus,
)

TIME = "2026-01-02T03:04:05Z"


READY = Condition(
    type="Ready",
    status="True",
    reason="Running",
    message="16/16 GPUs in use",
    last_transition_time=TIME,
    observed_generation=3,
)
ATTEMPT = AttemptStatus(
    number=2,
    job_name="gsm8k-trainer-2",
    config_hash="5f3c",
    gpus=8,
    start_time=TIME,
    next_retry_time=TIME,
    last_reason="Disrupted",
    restarts=1,
    disruptions=1,
    failures_in_a_row=1,
    step=400,
)
SPLIT = SplitStatus(
    trainer=8,
    rollout=8,
    idle=0,
    gpus_per_replica=1,
    total=16,
    decided_by="Auto",
    reason="InitialRatio",
    last_change_time=TIME,
    pressure="Rollout",
    pressure_time=TIME,
)
GROUPS = (
    GroupStatus(name="trainer", kind="Job", resource="gsm8k-trainer-2", desired=1, ready=1, summary="1/1"),
    GroupStatus(
        name="rollout", kind="StatefulSet", resource="gsm8k-rollout", desired=8, ready=7, summary="7/8"
    ),
)
PROGRESS = ProgressStatus(
    step=410,
    max_steps=2000,
    summary="410/2000",
    percent=20,
    state="Training",
    estimated_remaining_seconds=5400,
)


def full_status() -> Status:
    """Return the status of a job at step 410 of 2000, one engine short."""
    return Status(
        observed_generation=3,
        phase="Running",
        message="16/16 GPUs in use, step 410 of 2000",
        conditions=(READY,),
        start_time=TIME,
        completion_time=TIME,
        attempt=ATTEMPT,
        split=SPLIT,
        clocks=ClocksStatus(pending_since=TIME, below_minimum_since=TIME),
        groups=GROUPS,
        progress=PROGRESS,
        staleness=StalenessStatus(p50=1, p95=3, max=4),
        throughput=ThroughputStatus(tokens_per_second=61000, queue_depth=128, trainer_wait_percent=2),
        weight_update=WeightUpdateStatus(
            gather_milliseconds=40, transfer_milliseconds=310, load_milliseconds=25, pause_milliseconds=380
        ),
        reward=RewardStatus(mean="0.412", held_out="0.500"),
        gpus=GPUsStatus(budget=16, allocated=16, summary="16/16"),
        last_checkpoint=CheckpointStatus(step=400, path="gsm8k/step-400", time=TIME),
        report_time=TIME,
        report_seen_time=TIME,
        pod_sets=(PodSetStatus(name="trainer", count=1, requests={"nvidia.com/gpu": "8"}),),
        selector="asyncrl.dev/job=gsm8k",
    )
