"""Whatever dies, the job goes on: every ticket is trained once, and Events tell what happened."""

import re
import time

import pytest

from support.chart.installed_operator import Operator
from support.cluster.nodes import NodeCluster
from support.cluster.operator_process import eventually
from support.cluster.running_job import RunningJob

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900, func_only=True)]

MANY = 5000
MORE = 3
"""Steps that are trained between two kills."""
SECONDS = 240


def test_a_job_goes_on_whatever_dies(nodes: NodeCluster, operator: Operator, job: RunningJob) -> None:
    job.apply(
        training={"maxSteps": MANY},
        evaluation={"samples": 50, "everySteps": 5000},
        checkpoint={"everySteps": 10},
        failurePolicy={"deadNodeForceDeleteSeconds": 5, "trainer": {"maxRestarts": 5, "backoffSeconds": 1}},
    )
    job.wait_for_step(2, SECONDS)

    job.kubectl("delete", "pod", "quickstart-rollout-0", "--grace-period=0", "--force")
    goes_on(job)

    [trainer] = job.pods("trainer")
    nodes.kill_process(trainer["spec"]["nodeName"], "asyncrl_runtime.main rank")
    eventually("a second attempt", lambda: "quickstart-trainer-2" in job.names("jobs"), SECONDS)
    goes_on(job)
    assert job.events()["Disrupted"] == 1, "SIGKILL comes from outside, and is no fault of the trainer"

    [trainer] = job.pods("trainer")
    job.kubectl("delete", "pod", trainer["metadata"]["name"], "--grace-period=0", "--force")
    eventually("a third attempt", lambda: "quickstart-trainer-3" in job.names("jobs"), SECONDS)
    goes_on(job)

    job.kubectl("delete", "pod", "quickstart-nats-0", "--grace-period=0", "--force")
    goes_on(job)

    operator.kill()
    goes_on(job)
    operator.start()

    nodes.kubeup("restart", "kube-apiserver", "--down", "5")
    goes_on(job)

    [trainer] = job.pods("trainer")
    nodes.kill_node(trainer["spec"]["nodeName"])
    try:
        eventually("a fourth attempt", lambda: "quickstart-trainer-4" in job.names("jobs"), SECONDS)
        goes_on(job)
    finally:
        nodes.start_node(trainer["spec"]["nodeName"])
    attempt = job.status()["attempt"]
    assert (attempt["restarts"], attempt["disruptions"]) == (0, 3)

    job.patch({"training": {"maxSteps": MANY}, "suspend": True})
    job.wait("Suspended", 120)
    assert re.search(r"missing 0  twice 0", job.audit())


STOP_RANK_1 = """
import os, pathlib, signal
for folder in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        words = (folder / "environ").read_bytes().split(b"\\0")
    except OSError:
        continue
    if b"RANK=1" in words:
        os.kill(int(folder.name), signal.SIGSTOP)
        print("stopped")
"""


def test_a_trainer_one_of_whose_ranks_is_stopped_is_restarted(operator: Operator, job: RunningJob) -> None:
    """The other rank keeps reporting, but says that it makes no progress."""
    job.apply(
        training={"maxSteps": MANY},
        evaluation={"samples": 50, "everySteps": 5000},
        checkpoint={"everySteps": 10},
        trainer={"deepspeed": {"zeroStage": 2}},
        gpuBudget={"total": 3, "mode": "Manual", "split": {"trainer": 2, "rollout": 1}},
        failurePolicy={"trainer": {"backoffSeconds": 1}},
    )
    job.wait_for_step(2, SECONDS)
    job.patch({"failurePolicy": {"trainer": {"hangSeconds": 30}}})
    goes_on(job)
    assert job.execute("trainer", "trainer", STOP_RANK_1).startswith("stopped")
    stopped_at = time.monotonic()
    eventually("a second attempt", lambda: "quickstart-trainer-2" in job.names("jobs"), SECONDS)
    print(f"\nthe second attempt began {time.monotonic() - stopped_at:.0f} s after a rank was stopped")
    goes_on(job)
    attempt = job.status()["attempt"]
    assert (attempt["lastReason"], attempt["restarts"], attempt["disruptions"]) == ("Hung", 1, 0)
    assert "made no progress in" in job.kubectl("get", "events", "-o", "jsonpath={.items[*].message}")


@pytest.mark.parametrize("storage", ["Ephemeral", "Persistent"])
def test_messaging_is_lost_with_its_node(nodes: NodeCluster, job: RunningJob, storage: str) -> None:
    """What was in it is made again from the checkpoint, or has survived."""
    job.apply(
        training={"maxSteps": MANY},
        evaluation={"samples": 50, "everySteps": 5000},
        checkpoint={"everySteps": 10},
        failurePolicy={"deadNodeForceDeleteSeconds": 5},
        messaging={"embedded": {"storage": {"type": storage, "size": "1Gi"}}},
    )
    job.wait_for_step(2, SECONDS)
    [pod] = job.pods("messaging")
    lost = pod["spec"]["nodeName"]
    nodes.kill_node(lost)
    try:
        eventually("NATS elsewhere", lambda: [lost] != nodes_of(job, "messaging") != [], SECONDS)
        goes_on(job)
    finally:
        nodes.start_node(lost)
    assert job.status()["attempt"]["restarts"] == 0
    job.patch({"suspend": True})
    job.wait("Suspended", 120)
    assert re.search(r"missing 0  twice 0", job.audit())


def nodes_of(job: RunningJob, group: str) -> list[str]:
    """Return where the pods of a group are; those that wait for a node are nowhere."""
    return [pod["spec"]["nodeName"] for pod in job.pods(group) if "nodeName" in pod["spec"]]


def goes_on(job: RunningJob) -> None:
    """Wait until the job has trained on; what is repeated after a restart does not count."""
    time.sleep(1)  # a step that was under way when something died
    job.wait_for_step(job.trained() + MORE, SECONDS)
