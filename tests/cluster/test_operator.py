"""The operator as a process with its chart's rights, on a real control plane: what a user does and sees."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cluster.control_plane import Cluster
from support.cluster.operator_process import (
    Job,
    OperatorProcess,
    eventually,
    jobs_that_end,
    running_operator,
)

pytestmark = pytest.mark.e2e

KINDS = "serviceaccounts,roles,rolebindings,services,configmaps,pdb,networkpolicies,statefulsets,jobs,secrets"


@pytest.fixture(scope="module")
def operator(operator_rights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    with running_operator(operator_rights, tmp_path_factory.mktemp("operator")) as running:
        yield running


@pytest.fixture
def running(operator: OperatorProcess, job: Job) -> Job:
    job.apply()
    job.wait("Running")
    return job


def wait_until_still(cluster: Cluster, operator: OperatorProcess) -> float:
    """Return the writes of an operator once the jobs of the tests before are gone, and it is still."""
    eventually("no job is left in a namespace that ends", lambda: not jobs_that_end(cluster), 200)
    seen = [-1.0]

    def is_still() -> bool:
        time.sleep(1)
        seen.append(operator.num_writes())
        return seen[-1] == seen[-2]

    eventually("the operator has nothing to do", is_still)
    return seen[-1]


def test_a_job_that_is_applied_runs(cluster: Cluster, operator: OperatorProcess, job: Job) -> None:
    before = wait_until_still(cluster, operator)
    job.apply()
    job.wait("Running")
    eventually("both engines are ready", lambda: job.condition("RolloutReady")["message"] == "2/2")
    assert job.names("statefulsets") == ["gsm8k-nats", "gsm8k-rollout"]
    assert job.names("jobs") == ["gsm8k-trainer-1"]
    status = job.status()
    assert (status["gpus"]["summary"], status["observedGeneration"]) == ("3/3", 1)
    events = job.events()
    assert (events["Started"], events["Running"]) == (1, 1)
    live = job.get("asyncrljob", "gsm8k")["metadata"]
    assert "finalizers" not in live
    assert set(live["annotations"]) == {"kubectl.kubernetes.io/last-applied-configuration"}
    assert operator.num_writes() - before <= 40, "calls per job"


def test_a_running_job_is_left_alone(cluster: Cluster, operator: OperatorProcess, running: Job) -> None:
    eventually("both engines are ready", lambda: running.condition("RolloutReady")["message"] == "2/2")
    before = wait_until_still(cluster, operator)
    running.kubectl("annotate", "asyncrljob", "gsm8k", "team=rl")
    running.kubectl("annotate", "service", "gsm8k-nats", "cost-center=7")
    time.sleep(1)  # nothing is to happen in it
    assert operator.num_writes() == before
    assert running.get("service", "gsm8k-nats")["metadata"]["annotations"]["cost-center"] == "7"


def test_a_suspended_job_has_no_pods_and_resumes(running: Job) -> None:
    running.patch({"suspend": True})
    running.wait("Suspended")
    assert running.children("pods") == []
    assert running.condition("Ready")["status"] == "True"
    running.patch({"suspend": False})
    running.wait("Running")
    assert running.names("jobs") == ["gsm8k-trainer-2"]
    assert running.status()["attempt"].get("restarts") == 0
    assert {"Suspending", "Suspended", "Resumed"} <= set(running.events())


def test_a_job_created_suspended_starts_nothing(operator: OperatorProcess, job: Job) -> None:
    job.apply(suspend=True)
    job.wait("Suspended")
    assert job.children("pods") == [] and job.children("jobs") == []
    assert [(each["name"], each["count"]) for each in job.status()["podSets"]][:2] == [
        ("trainer", 1),
        ("rollout", 2),
    ]


def test_a_child_that_is_deleted_or_edited_comes_back_as_it_was(running: Job) -> None:
    running.kubectl("delete", "service", "gsm8k-rollout")
    eventually("the Service is back", lambda: "gsm8k-rollout" in running.names("services"))
    running.kubectl("scale", "statefulset", "gsm8k-rollout", "--replicas=5")
    replicas = "the StatefulSet has its size again"
    eventually(replicas, lambda: running.get("statefulset", "gsm8k-rollout")["spec"]["replicas"] == 2)
    for label in ("asyncrl.dev/job-", "app.kubernetes.io/managed-by-"):
        running.kubectl("label", "configmap", "gsm8k-live", label)
    eventually("its labels are back", lambda: "gsm8k-live" in running.names("configmaps"))
    events = eventually("it is told", lambda: (found := running.events()).get("DriftCorrected") and found)
    assert events["ChildRecreated"] >= 1
    assert running.names("jobs") == ["gsm8k-trainer-1"], "nothing was restarted for it"


def test_a_deleted_trainer_job_is_a_disruption(running: Job) -> None:
    running.kubectl("delete", "job", "gsm8k-trainer-1", "--wait=false")
    eventually("a new attempt", lambda: "gsm8k-trainer-2" in running.names("jobs"))
    running.wait("Running")
    attempt = running.status()["attempt"]
    assert (attempt["disruptions"], attempt["restarts"]) == (1, 0)
    configs = "the configuration of the lost attempt is deleted"
    eventually(configs, lambda: "gsm8k-config-1" not in running.names("configmaps"))


def test_a_trainer_that_fails_is_restarted(running: Job) -> None:
    pod = next(name for name in running.names("pods") if "trainer" in name)
    running.kubectl("annotate", "pod", pod, "kubeup/exit-code=1")
    eventually("a new attempt", lambda: "gsm8k-trainer-2" in running.names("jobs"))
    running.wait("Running")
    assert running.status()["attempt"]["restarts"] == 1
    assert running.events()["TrainerRestart"] == 1


def test_a_finished_job_has_no_pods_and_later_no_children(running: Job) -> None:
    pod = next(name for name in running.names("pods") if "trainer" in name)
    running.kubectl("annotate", "pod", pod, "kubeup/exit-code=0")
    running.wait("Complete")
    running.wait("Finished")
    eventually("no pod of it runs", lambda: all("trainer" in name for name in running.names("pods")))
    running.patch({"ttlSecondsAfterFinished": 0})
    eventually("its children are deleted", lambda: not running.names("statefulsets,jobs,services,configmaps"))
    assert running.status()["phase"] == "Succeeded"
    assert "TTLExpired" in running.events()


def test_live_fields_reach_a_running_job_and_restart_nothing(running: Job) -> None:
    before = running.names("pods")
    running.patch({"training": {"batchSize": 8, "maxSteps": 250}})
    live = "the live fields are written"
    eventually(live, lambda: "250" in str(running.get("configmap", "gsm8k-live")["data"]))
    assert running.names("pods") == before and running.names("jobs") == ["gsm8k-trainer-1"]


def test_a_job_grows_and_shrinks_with_its_budget(running: Job) -> None:
    running.kubectl("scale", "asyncrljob", "gsm8k", "--replicas=5")
    eventually("5 slots are used", lambda: running.status()["gpus"]["summary"] == "5/5")
    running.kubectl("scale", "asyncrljob", "gsm8k", "--replicas=2")
    eventually("2 slots are used", lambda: running.status()["gpus"]["summary"] == "2/2")


def test_a_job_deleted_and_applied_again_at_once_is_a_new_one(running: Job) -> None:
    old = running.get("asyncrljob", "gsm8k")["metadata"]["uid"]
    running.delete()
    running.apply()
    running.wait("Running")
    new = running.get("asyncrljob", "gsm8k")["metadata"]["uid"]
    assert new != old

    def owners() -> set[str]:
        children = running.children(KINDS)
        return {each["metadata"]["ownerReferences"][0]["uid"] for each in children}

    eventually("all children are the new job's", lambda: owners() == {new})
    assert running.status()["attempt"]["number"] == 1


def test_a_foreign_object_of_our_name_is_not_touched(operator: OperatorProcess, job: Job) -> None:
    job.kubectl("create", "configmap", "gsm8k-live", "--from-literal=theirs=1")
    job.apply()
    message = job.wait_for_reason("Stalled", "NameConflict")
    assert "ConfigMap gsm8k-live exists and was not made for this job" in message
    foreign = job.get("configmap", "gsm8k-live")
    assert foreign["data"] == {"theirs": "1"} and "ownerReferences" not in foreign["metadata"]
    assert job.names("jobs") == []
    job.kubectl("delete", "configmap", "gsm8k-live")
    job.wait("Running", 40)


def test_a_missing_config_map_is_named_and_waited_for(operator: OperatorProcess, job: Job) -> None:
    reward = {"type": "Function", "function": "code:score", "configMapRef": {"name": "code"}}
    job.apply(reward=reward)
    message = job.wait_for_reason("Stalled", "MissingReference")
    assert message == "spec.reward.configMapRef: ConfigMap 'code' does not exist"
    assert job.names("jobs") == []
    job.kubectl("create", "configmap", "code", "--from-literal=code.py=")
    job.wait("Running", 40)


@pytest.mark.parametrize(
    ("hard", "words"),
    [("pods=1", "exceeded quota: few"), ("count/jobs.batch=0", "Job gsm8k-trainer-1")],
    ids=["pods", "job"],
)
def test_a_quota_that_refuses_is_told_and_waited_for(
    operator: OperatorProcess, job: Job, hard: str, words: str
) -> None:
    job.kubectl("create", "quota", "few", f"--hard={hard}")
    job.apply()
    assert words in job.wait_for_reason("Reconciling", "QuotaExceeded")
    job.kubectl("delete", "quota", "few")
    job.wait("Running", 60)


def test_an_overlay_that_the_api_server_refuses_starts_nothing(operator: OperatorProcess, job: Job) -> None:
    overlay = {"spec": {"priority": "high"}}
    trainer = {"deepspeed": {"zeroStage": 0}, "podTemplate": overlay}
    job.apply(trainer=trainer)
    message = job.wait_for_reason("Stalled", "InvalidSpec")
    assert "priority" in message
    assert job.names("jobs") == [] and job.names("pods") == []
    job.apply()
    job.wait("Running")


def test_a_namespace_that_ends_takes_its_job_with_it(
    operator: OperatorProcess, running: Job, cluster: Cluster
) -> None:
    cluster.kubectl("delete", "namespace", running.namespace, "--wait=false")
    gone = f"namespace {running.namespace} is gone"
    eventually(gone, lambda: running.namespace not in cluster.kubectl("get", "namespaces"), 60)
    series = f'namespace="{running.namespace}"'
    eventually("its series are gone", lambda: not any(series in name for name in operator.metrics()))
    cluster.kubectl("create", "namespace", running.namespace)  # for the fixture to delete


def test_the_api_server_is_restarted_under_it(
    operator: OperatorProcess, running: Job, cluster: Cluster
) -> None:
    cluster.kubeup("restart", "kube-apiserver", "--down", "3")
    running.patch({"training": {"batchSize": 8, "maxSteps": 260}})
    live = "it goes on within 10 s"
    eventually(live, lambda: "260" in str(running.get("configmap", "gsm8k-live")["data"]), 10)
    assert operator.is_healthy()


def test_two_operators_come_to_the_same_end(
    operator: OperatorProcess, operator_rights: Path, job: Job, tmp_path: Path
) -> None:
    with running_operator(operator_rights, tmp_path):
        job.apply()
        job.wait("Running")
        eventually("both engines are ready", lambda: job.condition("RolloutReady")["message"] == "2/2")
        attempt = job.status()["attempt"]
        assert (attempt["number"], attempt["disruptions"], attempt["restarts"]) == (1, 0, 0)
        assert job.names("jobs") == ["gsm8k-trainer-1"] and len(job.names("pods")) == 4
