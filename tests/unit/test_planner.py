"""The planner against a cluster in memory: one example for each thing that a user or a fault can do."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from asyncrl_api.base import MAX_INT
from asyncrl_api.exits import ExitCode
from asyncrl_operator.decide.observed import Pod, Problem
from asyncrl_operator.decide.rolling import next_wave
from support.cluster.model_cluster import NAME, ModelCluster, make_spec


def running(**overrides: object) -> ModelCluster:
    """Return a cluster whose job runs."""
    cluster = ModelCluster(make_spec(**overrides))
    cluster.run_until_still()
    assert cluster.phase == "Running"
    return cluster


def reasons(cluster: ModelCluster) -> list[str]:
    return [event.reason for event in cluster.events]


def test_a_job_is_brought_up_trainer_first() -> None:
    cluster = ModelCluster()
    cluster.pass_once()
    assert list(cluster.jobs) == ["gsm8k-trainer-1"] and cluster.messaging is not None
    assert cluster.rollout is not None and cluster.rollout.replicas == 0
    assert (cluster.phase, cluster.condition("Ready")) == ("Starting", "False/TrainerStarting")
    assert {(each.name, each.kind) for each in cluster.status.groups} <= {
        ("messaging", "StatefulSet"),
        ("trainer", "Job"),
        ("rollout", "StatefulSet"),
    }
    assert cluster.condition("Reconciling") == "True/TrainerStarting"
    cluster.run_until_still()
    assert (cluster.phase, cluster.condition("Ready")) == ("Running", "True/Running")
    assert cluster.held == 8 and cluster.rollout.replicas == 6
    assert {group.name: group.summary for group in cluster.status.groups} == {
        "messaging": "1/1",
        "trainer": "1/1",
        "rollout": "6/6",
    }
    kinds = {group.name: group.kind for group in cluster.status.groups}
    assert kinds == {"messaging": "StatefulSet", "trainer": "Job", "rollout": "StatefulSet"}
    assert reasons(cluster) == ["Started", "Running"]


def test_a_pass_over_a_running_job_does_nothing() -> None:
    cluster = running()
    outcome = cluster.decide()
    assert not outcome.deletions and not outcome.events and not outcome.write_status_first
    assert outcome.status == cluster.status


@pytest.mark.parametrize(
    ("code", "reason", "ends_as"),
    [(1, "Error", "TrainerFailed"), (137, "OOMKilled", "OOMKilled"), (75, "Error", "TrainerFailed")],
)
def test_a_trainer_that_fails_is_restarted_from_its_checkpoint(code: int, reason: str, ends_as: str) -> None:
    cluster = running()
    cluster.trainer_exits(code, reason)
    cluster.settle()
    cluster.pass_once()
    assert cluster.phase == "Restarting" and cluster.status.attempt is not None
    assert (cluster.status.attempt.restarts, cluster.status.attempt.last_reason) == (1, ends_as)
    assert cluster.rollout is not None and cluster.rollout.replicas == 6, "the engines stay"
    cluster.run_until_still()
    assert cluster.phase == "Running" and cluster.status.attempt.number == 2
    assert "TrainerRestart" in reasons(cluster)
    assert "gsm8k-trainer-1" in cluster.jobs, "the failed Job stays for its logs"


def test_a_step_that_cannot_be_trained_is_tried_twice_and_costs_no_restart() -> None:
    cluster = running(failurePolicy={"trainer": {"maxRestarts": 0, "backoffSeconds": 0}})
    for number in (2, 3):
        cluster.trainer_exits(ExitCode.STEP_FAILED)
        cluster.run_until_still()
        attempt = cluster.status.attempt
        assert attempt is not None and cluster.phase == "Running"
        assert (attempt.number, attempt.restarts, attempt.last_reason) == (number, 0, "StepFailed")
    cluster.trainer_exits(ExitCode.STEP_FAILED)
    cluster.run_until_still()
    assert cluster.condition("Failed") == "True/StepFailed"


@pytest.mark.parametrize("code", [137, 143])
def test_a_trainer_that_a_signal_has_ended_was_disrupted_and_costs_no_restart(code: int) -> None:
    cluster = running(failurePolicy={"trainer": {"maxRestarts": 0}})
    cluster.trainer_exits(code)
    cluster.run_until_still()
    attempt = cluster.status.attempt
    assert cluster.phase == "Running" and attempt is not None and attempt.number == 2
    assert (attempt.restarts, attempt.disruptions, attempt.last_reason) == (0, 1, "Killed")
    assert "Disrupted" in reasons(cluster)


def test_a_job_whose_pod_has_failed_is_left_to_fail_by_itself() -> None:
    """The pod's failure is seen before the Job's; deleting the Job then would delete its logs too."""
    for max_restarts in (0, 3):
        cluster = running(failurePolicy={"trainer": {"maxRestarts": max_restarts}})
        cluster.trainer_exits(1)
        cluster.pass_once()
        cluster.pass_once()
        assert not cluster.jobs["gsm8k-trainer-1"].is_deleting


def test_restarts_end() -> None:
    cluster = running(failurePolicy={"trainer": {"maxRestarts": 2}})
    for _ in range(3):
        cluster.trainer_exits(1)
        cluster.run_until_still()
    assert (cluster.phase, cluster.condition("Failed")) == ("Failed", "True/TrainerFailed")
    assert "more than maxRestarts = 2" in cluster.status.message
    assert cluster.held == 0


def test_a_final_exit_code_is_not_tried_again() -> None:
    cluster = running()
    cluster.trainer_exits(65)
    cluster.run_until_still()
    assert (cluster.condition("Finished"), cluster.condition("Stalled")) == ("True/Failed", "True/Failed")
    assert cluster.condition("Failed") == "True/FatalExit" and "exit code 65" in cluster.status.message


def test_a_lost_node_is_a_disruption_and_its_pods_are_forced_away() -> None:
    cluster = running(failurePolicy={"deadNodeForceDeleteSeconds": 60})
    trainer = cluster.pods["gsm8k-trainer-1-0"]
    cluster.node_dies(trainer.node)
    cluster.settle()
    cluster.pass_once()
    assert cluster.status.attempt is not None
    assert (cluster.status.attempt.disruptions, cluster.status.attempt.restarts) == (1, 0)
    assert cluster.jobs["gsm8k-trainer-1"].is_deleting
    cluster.now += 59
    cluster.pass_once()
    assert trainer.name in cluster.pods, "it counts until it is certainly gone"
    cluster.run_until_still()
    assert cluster.phase == "Running" and cluster.status.attempt.number == 2
    assert {"Disrupted", "PodForceDeleted"} <= set(reasons(cluster))


def test_a_preempted_pod_counts_as_a_disruption_though_its_peers_crash() -> None:
    cluster = running(
        gpuBudget={"total": 32, "mode": "Manual", "split": {"trainer": 16, "rollout": 16}},
    )
    first, second = sorted(name for name in cluster.pods if "trainer" in name)
    cluster.pods[first] = replace(cluster.pods[first], disruption="PreemptionByScheduler")
    cluster.trainer_exits(1)
    cluster.pass_once()
    assert cluster.status.attempt is not None and second
    assert (cluster.status.attempt.disruptions, cluster.status.attempt.restarts) == (1, 0)


def test_a_deleted_trainer_job_is_a_disruption() -> None:
    cluster = running()
    cluster.delete_job("gsm8k-trainer-1")
    cluster.run_until_still()
    assert cluster.status.attempt is not None and cluster.status.attempt.number == 2
    assert cluster.status.attempt.disruptions == 1


def test_a_job_that_has_mastered_its_prompts_is_complete_and_says_so() -> None:
    cluster = running()
    cluster.reports(
        step=9, state="Mastered", message="the policy has mastered its prompts: 20 of the last 20"
    )
    cluster.trainer_exits(0, "Completed")
    cluster.run_until_still()
    assert cluster.phase == "Succeeded"
    assert [cluster.condition(kind) for kind in ("Complete", "Ready", "Finished", "Failed")] == [
        "True/Mastered",
        "True/Mastered",
        "True/Succeeded",
        "False/NotFailed",
    ]
    said = "9 steps were trained; the policy has mastered its prompts: 20 of the last 20"
    assert cluster.status.message == said
    assert [event.message for event in cluster.events if event.reason == "Mastered"] == [said]


def test_success_ends_all_pods_and_the_children_later() -> None:
    cluster = running()
    cluster.reports(step=9, state="Finished")
    cluster.trainer_exits(0, "Completed")
    cluster.run_until_still()
    assert (cluster.condition("Complete"), cluster.condition("Ready")) == ("True/Complete", "True/Complete")
    assert cluster.condition("Finished") == "True/Succeeded" and cluster.held == 0
    assert cluster.rollout is not None and cluster.has_children
    before = cluster.status
    cluster.now += 3600
    cluster.pass_once()
    cluster.settle()
    cluster.settle()
    assert not cluster.has_children and not cluster.pods
    assert cluster.status.completion_time == before.completion_time
    outcome = cluster.pass_once()
    assert not outcome.deletions and outcome.wake_at is None


def test_a_finished_job_takes_no_edit() -> None:
    cluster = running()
    cluster.trainer_exits(0, "Completed")
    cluster.run_until_still()
    cluster.edit(suspend=True, training={"maxSteps": 90}, gpuBudget={"total": 16})
    before = cluster.status
    cluster.run_until_still()
    assert cluster.status == before.model_copy(update={"observed_generation": 2})


def test_suspension_ends_in_zero_pods_and_resumes_with_a_new_attempt_free_of_charge() -> None:
    cluster = running()
    cluster.edit(suspend=True)
    cluster.pass_once()
    assert (cluster.phase, cluster.condition("Suspended")) == ("Suspending", "False/Suspending")
    assert cluster.messaging is not None and cluster.messaging.replicas == 1, "the checkpoint needs it"
    cluster.run_until_still()
    assert not cluster.pods and cluster.condition("Suspended") == "True/Suspended"
    assert cluster.condition("Ready") == "True/Suspended" and cluster.condition("Reconciling") == "absent"
    cluster.edit(suspend=False)
    cluster.run_until_still()
    assert cluster.phase == "Running" and cluster.status.attempt is not None
    assert (cluster.status.attempt.number, cluster.status.attempt.restarts) == (2, 0)
    assert reasons(cluster)[-4:] == ["Suspending", "Suspended", "Resumed", "Running"]


def test_resumed_while_suspending_it_is_suspended_first() -> None:
    cluster = running()
    cluster.edit(suspend=True)
    cluster.pass_once()
    cluster.edit(suspend=False)
    cluster.pass_once()
    assert cluster.phase == "Suspending"
    cluster.run_until_still()
    assert cluster.phase == "Running" and reasons(cluster).count("Suspended") == 1


def test_created_suspended_makes_nothing_and_tells_the_queue_what_it_wants() -> None:
    cluster = ModelCluster(make_spec(suspend=True))
    cluster.run_until_still()
    assert cluster.phase == "Suspended" and not cluster.has_children and not cluster.jobs
    assert [(s.name, s.count, s.requests) for s in cluster.status.pod_sets] == [
        ("trainer", 1, {"nvidia.com/gpu": "2"}),
        ("rollout", 6, {"nvidia.com/gpu": "1"}),
        ("messaging", 1, {}),
    ]
    told = cluster.status.pod_sets
    cluster.edit(gpuBudget={"total": 16})
    cluster.run_until_still()
    assert cluster.status.pod_sets == told, "fixed while it is suspended"


def test_budget_up_gives_engines_and_leaves_the_trainer_alone() -> None:
    cluster = running()
    cluster.edit(gpuBudget={"total": 12})
    cluster.run_until_still()
    assert cluster.held == 12 and cluster.status.attempt is not None and cluster.status.attempt.number == 1
    assert "RolloutScaled" in reasons(cluster)


def test_budget_down_takes_engines_first_then_the_trainer() -> None:
    cluster = running()
    cluster.edit(gpuBudget={"total": 3})
    cluster.run_until_still()
    assert cluster.held == 3 and cluster.status.attempt is not None and cluster.status.attempt.number == 1
    cluster.edit(gpuBudget={"total": 2})
    cluster.run_until_still()
    assert cluster.held == 2 and cluster.status.attempt.number == 2
    assert cluster.status.attempt.restarts == 0


def test_a_larger_trainer_waits_until_the_engines_have_given_back_the_last_gpu() -> None:
    def budget(trainer: int) -> dict[str, Any]:
        return {"total": 8, "mode": "Manual", "split": {"trainer": trainer, "rollout": 8 - trainer}}

    cluster, last = running(gpuBudget=budget(2)), "gsm8k-rollout-5"
    for name, pod in cluster.pods.items():
        cluster.pods[name] = replace(pod, node="n3" if name == last else "n0")
    cluster.node_dies("n3")  # and never confirms that its engine is gone
    cluster.edit(gpuBudget=budget(3))
    for _ in range(6):
        cluster.pass_once()
        cluster.settle()
        assert cluster.claimed <= 8
    attempt = cluster.status.attempt
    assert attempt is not None and (attempt.number, cluster.phase) == (1, "Resizing")
    del cluster.pods[last]
    cluster.run_until_still()
    attempt = cluster.status.attempt
    assert attempt is not None and (attempt.number, attempt.gpus, cluster.held) == (2, 3, 8)


def test_the_status_says_what_the_last_update_of_engines_spent_its_time_on() -> None:
    cluster = running()
    update = {"update_gather_seconds": 0.0, "update_transfer_seconds": 1.25, "update_pause_seconds": 1e300}
    cluster.reports(**update, publish_copy_seconds=0.02, publish_wait_seconds=3.0)
    cluster.run_until_still()
    shown = cluster.status.weight_update
    assert shown is not None and (shown.gather_milliseconds, shown.transfer_milliseconds) == (0, 1250)
    assert (shown.load_milliseconds, shown.pause_milliseconds) == (None, MAX_INT)
    assert (shown.copy_milliseconds, shown.wait_milliseconds) == (20, 3000)


def test_a_starved_trainer_gives_gpus_to_rollout_after_half_a_cooldown() -> None:
    cluster = running(gpuBudget={"auto": {"cooldownSeconds": 100}})
    cluster.now += 100
    for _ in range(8):
        cluster.reports(wait_share=0.6, rollout_load=1.0)
        cluster.run_until_still()
        cluster.now += 10
    assert cluster.status.split is not None
    assert (cluster.status.split.trainer, cluster.status.split.rollout) == (1, 7)
    assert cluster.status.split.reason == "RolloutShort" and cluster.held == 8
    assert cluster.status.attempt is not None and cluster.status.attempt.last_reason == "Resized"


def test_idle_engines_give_gpus_to_the_trainer_and_back_never_at_once() -> None:
    cluster = running(gpuBudget={"auto": {"cooldownSeconds": 100}})
    sizes = []
    for step in range(60):
        cluster.reports(wait_share=0.0, rollout_load=0.4, step=step)
        cluster.run_until_still()
        assert cluster.status.split is not None
        sizes.append(cluster.status.split.trainer)
        cluster.now += 10
    assert sizes == sorted(sizes) and sizes[-1] > 2
    changes = [i for i, (a, b) in enumerate(pairwise(sizes)) if a != b]
    assert all(b - a >= 10 for a, b in pairwise(changes)), "a cooldown lies between"


def test_without_leave_to_resize_the_trainer_spare_gpus_are_given_back() -> None:
    cluster = running(gpuBudget={"auto": {"cooldownSeconds": 100, "trainerResize": "Never"}})
    for _ in range(30):
        cluster.reports(wait_share=0.0, rollout_load=0.4)
        cluster.run_until_still()
        cluster.now += 10
    assert cluster.status.split is not None and cluster.status.split.trainer == 2
    assert cluster.status.split.idle > 0 and cluster.held == 8 - cluster.status.split.idle
    assert cluster.status.attempt is not None and cluster.status.attempt.number == 1


def test_a_changed_field_marked_r_restarts_the_trainer_alone() -> None:
    cluster = running()
    engines = {name: pod.uid for name, pod in cluster.pods.items() if pod.group == "rollout"}
    cluster.edit(training={"learningRate": 2e-6})
    cluster.run_until_still()
    assert cluster.status.attempt is not None and cluster.status.attempt.number == 2
    assert cluster.status.attempt.restarts == 0
    assert {name: pod.uid for name, pod in cluster.pods.items() if pod.group == "rollout"} == engines


def test_a_changed_field_marked_l_touches_no_pod() -> None:
    cluster = running()
    uids = {pod.uid for pod in cluster.pods.values()}
    cluster.edit(sampling={"temperature": 0.7}, training={"maxSteps": 20})
    cluster.run_until_still()
    assert {pod.uid for pod in cluster.pods.values()} == uids and cluster.status.observed_generation == 2


def engines(cluster: ModelCluster) -> set[str]:
    """Return the UIDs of the engines' pods."""
    return {pod.uid for pod in cluster.pods.values() if pod.group == "rollout"}


@pytest.mark.parametrize(
    ("block", "restarts", "rolls"),
    [
        ({"evaluation": {"source": "file:///held-out"}}, True, False),
        ({"algorithm": {"overlongPenalty": {}}}, True, False),
        ({"algorithm": {"clip": {"dual": 3.0}}}, True, False),
        ({"workflow": {"configMapRef": {"name": "code"}}}, False, True),
        ({"reward": {"configMapRef": {"name": "code"}}}, False, True),
        ({"gpuBudget": {"split": {"trainer": 4, "rollout": 4}}}, False, False),
    ],
    ids=["evaluation", "overlong-penalty", "dual-clip", "workflow-code", "reward-code", "unused-split"],
)
def test_a_block_that_comes_or_goes_does_what_its_mark_says(
    block: dict[str, Any], restarts: bool, rolls: bool
) -> None:
    bare, cluster = make_spec(), running()
    for number, spec in enumerate((make_spec(**block), bare), start=1):
        before = engines(cluster)
        cluster.replace(spec)
        cluster.run_until_still()
        assert cluster.phase == "Running" and cluster.status.attempt is not None
        assert cluster.status.attempt.number == (1 + number if restarts else 1)
        assert (before & engines(cluster) == set()) if rolls else (before == engines(cluster))


@pytest.mark.parametrize(
    "change",
    [{"source": "hf://org/other"}, {"split": "validation"}, {"parameters": {"n": 1}}, {"samples": 3}],
)
def test_what_is_held_out_is_another_from_the_next_attempt_on(change: dict[str, Any]) -> None:
    """The rows that tickets are numbered through are others then; how often it is measured changes live."""
    cluster = running(evaluation={"source": "hf://org/set"})
    uids = {pod.uid for pod in cluster.pods.values()}
    cluster.edit(evaluation={"everySteps": 3})
    cluster.run_until_still()
    assert {pod.uid for pod in cluster.pods.values()} == uids
    cluster.edit(evaluation=change)
    cluster.run_until_still()
    assert cluster.status.attempt is not None and cluster.status.attempt.number == 2
    assert {pod.uid for pod in cluster.pods.values() if pod.group == "rollout"} <= uids


def test_a_new_engine_rolls_the_engines_in_waves() -> None:
    cluster = running(rollout={"update": {"maxUnavailablePercent": 34}})
    old = engines(cluster)
    cluster.edit(rollout={"engine": {"args": ["--x"]}})
    fewest = 6
    for _ in range(20):
        cluster.pass_once()
        ready = sum(
            pod.is_ready and pod.deleted_at is None for pod in cluster.pods.values() if pod.group == "rollout"
        )
        fewest = min(fewest, ready)
        cluster.settle()
    assert fewest == 4, "two of six may be down"
    assert not old & {pod.uid for pod in cluster.pods.values()}
    assert cluster.status.attempt is not None and cluster.status.attempt.number == 1


def test_an_engine_that_is_not_ready_for_a_moment_is_not_replaced_before_its_turn() -> None:
    def pod(name: str, template: str, **values: Any) -> Pod:
        return Pod(name, name, "rollout", template=template, phase="Running", **values)

    fresh = pod("j-rollout-1", "new", created_at=95.0)
    for since, gone in ((95.0, ()), (80.0, ("j-rollout-0",))):
        old = pod("j-rollout-0", "old", ready_changed_at=since)
        wave = next_wave([old, fresh], {"new"}, 2, 25, 100.0)
        assert tuple(each.name for each in wave.deletions) == gone
    assert (
        next_wave([pod("j-rollout-0", "old", ready_changed_at=95.0)], {"new"}, 1, 25, 100.0).wake_at == 105.0
    )


def test_a_bad_image_stops_the_update_and_the_next_edit_goes_through() -> None:
    cluster = running()
    cluster.edit(rollout={"engine": {"image": "localhost/bad:1"}})
    bad = ""

    def settle() -> None:
        cluster.settle()
        for pod in list(cluster.pods.values()):
            if bad and pod.template == bad:
                cluster.pods[pod.name] = replace(
                    pod, phase="Pending", is_ready=False, waiting="ImagePullBackOff: no such image"
                )

    for _ in range(10):
        cluster.pass_once()
        assert cluster.rollout is not None
        bad = cluster.rollout.template
        settle()
    broken = [pod for pod in cluster.pods.values() if pod.waiting]
    assert len(broken) == 1, "a quarter of six"
    assert cluster.condition("Degraded") == "True/RolloutShort"
    cluster.now += 900
    cluster.pass_once()
    assert cluster.condition("Degraded") == "True/RolloutUpdateStuck"
    assert "ImagePullBackOff" in cluster.status.message or "ImagePullBackOff" in str(
        cluster.status.conditions
    )
    bad = ""
    cluster.reports()
    cluster.edit(rollout={"engine": {"image": "localhost/good:1"}})
    cluster.run_until_still()
    for _ in range(20):
        cluster.pass_once()
        cluster.settle()
    assert cluster.condition("Degraded") == "False/AsExpected"


def test_deadlines_end_a_job() -> None:
    cluster = running(activeDeadlineSeconds=100)
    cluster.now += 101
    cluster.run_until_still()
    assert cluster.condition("Failed") == "True/DeadlineExceeded" and cluster.held == 0
    waiting = ModelCluster(make_spec(pendingDeadlineSeconds=60))
    waiting.nodes = {}
    waiting.run_until_still()
    assert waiting.condition("Failed") == "True/PendingDeadlineExceeded"


def test_too_few_engines_for_too_long_fail_the_job_unless_told_to_go_on() -> None:
    policy = {"belowMinimumSeconds": 30}
    for on_below, expected in (("Fail", "Failed"), ("Continue", "Running")):
        cluster = running(failurePolicy={"rollout": policy | {"onBelowMinimum": on_below}})
        for pod in list(cluster.pods.values()):
            if pod.group == "rollout":
                cluster.pods[pod.name] = replace(pod, is_ready=False)
        cluster.pass_once()
        assert cluster.condition("Degraded") == "True/RolloutBelowMinimum"
        cluster.now += 31
        cluster.run_until_still()
        assert cluster.phase == expected


@pytest.mark.parametrize(("ready", "degraded"), [(3, "False/AsExpected"), (2, "True/RolloutBelowMinimum")])
def test_as_many_engines_as_the_minimum_are_enough(ready: int, degraded: str) -> None:
    """Three is half of six, and the time for the others to become ready has not passed."""
    cluster = running(failurePolicy={"rollout": {"minAvailablePercent": 50}})
    for index in range(ready, 6):
        name = f"gsm8k-rollout-{index}"
        cluster.pods[name] = replace(cluster.pods[name], is_ready=False)
    cluster.pass_once()
    assert cluster.condition("Degraded") == degraded
    clocks = cluster.status.clocks
    assert (clocks is not None and clocks.below_minimum_since is not None) == (ready < 3)


def test_a_silent_trainer_is_told_of() -> None:
    cluster = running()
    cluster.reports()
    cluster.pass_once()
    cluster.now += 301
    cluster.pass_once()
    assert (
        cluster.condition("Degraded") == "True/ReportStale" and cluster.condition("Ready") == "True/Degraded"
    )


def test_skipped_updates_are_told_of_until_the_last_steps_have_none() -> None:
    cluster = running()
    for skipped, degraded in ((0, "False/AsExpected"), (3, "True/UpdatesSkipped"), (0, "False/AsExpected")):
        cluster.reports(skipped_updates=skipped)
        cluster.pass_once()
        assert cluster.condition("Degraded") == degraded


def test_a_problem_touches_nothing_and_goes_when_it_is_mended() -> None:
    cluster = running()
    pods = dict(cluster.pods)
    cluster.problem = Problem("InvalidSpec", "spec.rollout.podTemplate: containers[0].command is owned")
    cluster.run_until_still()
    assert cluster.pods == pods and cluster.condition("Stalled") == "True/InvalidSpec"
    assert cluster.condition("Ready") == "False/InvalidSpec" and cluster.condition("Reconciling") == "absent"
    cluster.problem = None
    cluster.run_until_still()
    assert cluster.condition("Stalled") == "absent" and cluster.condition("Ready") == "True/Running"


def test_a_trainer_that_finishes_while_the_spec_is_refused_has_finished() -> None:
    cluster = running()
    cluster.problem = Problem("InvalidSpec", "bad")
    cluster.trainer_exits(0, "Completed")
    cluster.run_until_still()
    assert cluster.phase == "Succeeded"


def test_pods_of_an_earlier_job_of_this_name_are_waited_for() -> None:
    cluster = ModelCluster()
    cluster.pods["old"] = Pod("old", "u0", "trainer", is_ours=False, attempt=1, gpus=8, phase="Running")
    cluster.pass_once()
    assert cluster.condition("Ready") == "False/WaitingForPredecessor" and not cluster.jobs
    assert cluster.status.gpus is not None and cluster.status.gpus.summary == "8/8"
    del cluster.pods["old"]
    cluster.run_until_still()
    assert cluster.phase == "Running"


def test_a_budget_that_holds_nothing_is_told() -> None:
    cluster = ModelCluster(
        make_spec(model={"parameterCount": 70_000_000_000}, gpuBudget={"total": 2, "gpuMemory": "80Gi"})
    )
    cluster.pass_once()
    assert cluster.condition("Stalled") == "True/BudgetTooSmall" and not cluster.jobs


def test_half_a_trainer_gives_its_gpus_back() -> None:
    cluster = ModelCluster(
        make_spec(gpuBudget={"total": 32, "mode": "Manual", "split": {"trainer": 16, "rollout": 16}})
    )
    for _ in range(3):
        cluster.pass_once()
        cluster.settle()
        for pod in list(cluster.pods.values()):
            if pod.name == f"{NAME}-trainer-1-1":
                message = "0/4 nodes are available: 4 Insufficient nvidia.com/gpu"
                cluster.pods[pod.name] = replace(pod, phase="Pending", node="", unschedulable=message)
    assert cluster.phase == "Starting" and cluster.condition("Ready") == "False/Unschedulable"
    assert cluster.held == 16 + 0 + 0, "no engine before the trainer has its GPUs"
    cluster.now += 300
    cluster.pass_once()
    assert cluster.jobs[f"{NAME}-trainer-1"].is_deleting
    assert cluster.status.attempt is not None and cluster.status.attempt.restarts == 0
    cluster.run_until_still()
    assert cluster.phase == "Running"


def test_reports_of_an_earlier_attempt_are_ignored_and_shown_ones_are_throttled() -> None:
    cluster = running()
    cluster.reports(step=3, reward=0.5)
    cluster.pass_once()
    assert cluster.status.progress is not None and cluster.status.progress.summary == "3/9"
    cluster.now += 5
    cluster.reports(step=4)
    outcome = cluster.pass_once()
    assert cluster.status.progress.summary == "3/9" and outcome.wake_at is not None
    cluster.now = outcome.wake_at
    cluster.pass_once()
    assert cluster.status.progress is not None and cluster.status.progress.summary == "4/9"
    cluster.now += 60
    cluster.reports(step=1, attempt=0)
    cluster.pass_once()
    assert cluster.status.progress.summary == "4/9"


def test_a_budget_lowered_before_a_trainers_job_was_made_is_not_exceeded() -> None:
    """Its attempt is in the status; a Job that somebody deleted before the next pass is as one never made."""
    cluster = ModelCluster(make_spec(gpuBudget={"total": 3}, trainer={"gpusPerNode": 2}))

    def pass_and_settle() -> None:
        cluster.pass_once()
        cluster.settle()
        cluster.now += 1

    pass_and_settle()
    pass_and_settle()
    cluster.trainer_exits(1, "Error")
    pass_and_settle()
    pass_and_settle()
    cluster.delete_job("gsm8k-trainer-2")
    cluster.settle()
    cluster.settle()
    assert "gsm8k-trainer-2" not in cluster.jobs and cluster.held == 2
    cluster.edit(gpuBudget={"total": 2})
    cluster.pass_once()
    assert cluster.claimed == 2
    cluster.run_until_still()
    assert (cluster.phase, cluster.held) == ("Running", 2)
    assert cluster.status.attempt is not None and cluster.status.attempt.restarts == 1
