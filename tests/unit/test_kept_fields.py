"""What is kept of objects from a watch."""

import json
from typing import Any

from asyncrl_operator.api_server.kept_fields import compact, trim_job, trim_node, trim_pod
from asyncrl_operator.api_server.observe import missing_reference
from asyncrl_operator.decide.observed import ContainerEnd


def make_pod(**status: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "gsm8k-trainer-2-0-x",
            "uid": "p1",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {
                "asyncrl.dev/group": "trainer",
                "asyncrl.dev/attempt": "2",
                "asyncrl.dev/job-uid": "u1",
            },
            "annotations": {"asyncrl.dev/gpus": "4"},
            "managedFields": [{"manager": "kubelet"}],
        },
        "spec": {"nodeName": "n1", "containers": []},
        "status": {"phase": "Running", **status},
    }


def test_a_pod_is_kept_as_the_planner_sees_it() -> None:
    raw = make_pod(
        conditions=[
            {"type": "Ready", "status": "True"},
            {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"},
        ],
        containerStatuses=[
            {"name": "trainer", "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}
        ],
    )
    raw["metadata"]["deletionTimestamp"] = "2026-01-01T00:01:00Z"
    kept = trim_pod(raw)
    pod = kept.pod
    assert (kept.job_uid, pod.group, pod.attempt, pod.gpus, pod.node) == ("u1", "trainer", 2, 4, "n1")
    assert pod.is_ready and pod.disruption == "PreemptionByScheduler"
    assert pod.ends == (ContainerEnd("trainer", 137, "OOMKilled"),)
    assert pod.deleted_at is not None and pod.deleted_at - pod.created_at == 60


def test_the_last_end_of_a_container_that_runs_again_is_kept() -> None:
    state = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
    raw = make_pod(
        containerStatuses=[{"name": "e", "state": state, "lastState": {"terminated": {"exitCode": 3}}}]
    )
    assert trim_pod(raw).pod.ends == (ContainerEnd("e", 3, ""),)


def test_what_a_pod_waits_for_is_kept_in_the_words_of_kubelet_and_scheduler() -> None:
    waiting = {"reason": "ImagePullBackOff", "message": "no such image"}
    raw = make_pod(
        phase="Pending",
        conditions=[{"type": "PodScheduled", "status": "False", "message": "0/4 nodes are available"}],
        containerStatuses=[{"name": "trainer", "state": {"waiting": waiting}}],
    )
    pod = trim_pod(raw).pod
    assert (pod.waiting, pod.unschedulable) == ("ImagePullBackOff: no such image", "0/4 nodes are available")


def test_labels_edited_by_hand_do_not_stop_a_pass() -> None:
    raw = make_pod()
    raw["metadata"]["labels"]["asyncrl.dev/attempt"] = "two"
    raw["metadata"]["annotations"] = {"asyncrl.dev/gpus": "-1"}
    pod = trim_pod(raw).pod
    assert (pod.attempt, pod.gpus) == (0, 0)


def test_a_secret_or_claim_that_is_missing_is_a_missing_reference() -> None:
    message = 'persistentvolumeclaim "ckpt" not found. preemption is not helpful'
    raw = make_pod(conditions=[{"type": "PodScheduled", "status": "False", "message": message}])
    problem = missing_reference([trim_pod(raw).pod])
    assert problem is not None and problem.reason == "MissingReference"
    assert "persistentvolumeclaim 'ckpt' does not exist" in problem.message
    assert missing_reference([trim_pod(make_pod()).pod]) is None


def test_a_node_is_ready_since_its_condition_says_so() -> None:
    ready = {"type": "Ready", "status": "Unknown", "lastTransitionTime": "2026-01-01T00:00:10Z"}
    raw = {"metadata": {"creationTimestamp": "2026-01-01T00:00:00Z"}, "status": {"conditions": [ready]}}
    node = trim_node(raw)
    assert not node.is_ready and node.since == trim_pod(make_pod()).pod.created_at + 10


def test_changes_that_nobody_reads_leave_the_kept_bytes_as_they_are() -> None:
    before = {"metadata": {"name": "s", "resourceVersion": "1"}, "spec": {"replicas": 2}, "status": {"a": 1}}
    after = {
        "metadata": {"name": "s", "resourceVersion": "2", "managedFields": [{}], "generation": 3},
        "spec": {"replicas": 2},
        "status": {"a": 2},
    }
    assert compact(before) == compact(after) and trim_job(before) != trim_job(after)
    conditions = [{"type": "Complete", "status": "True", "lastProbeTime": "x"}]
    ended = compact({**after, "status": {"conditions": conditions}})
    assert json.loads(ended)["conditions"][0]["type"] == "Complete"
