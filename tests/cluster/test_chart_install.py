"""The chart in a cluster of its own, since it brings the CRD and takes it away."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncrl_api import __version__
from asyncrl_api.parsing import load_documents
from support.chart.rendered_chart import NAME, NAMESPACE, RELEASE, sets
from support.cluster.control_plane import Cluster, why_not
from support.cluster.operator_process import (
    Job,
    OperatorProcess,
    eventually,
    make_claim,
    make_job,
    running_operator,
)
from support.paths import CHART

pytestmark = pytest.mark.e2e

CRD = "asyncrljobs.asyncrl.dev"
CALM_SECONDS = 3.0


class Release:
    """The release of a test."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def helm(self, verb: str, *arguments: str) -> str:
        done = self._cluster.run("helm", verb, RELEASE, *arguments, "--namespace", NAMESPACE)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def install(self, *settings: str, chart: Path = CHART) -> str:
        """Install it, and wait until its Deployment is there."""
        return self.helm("install", str(chart), "--wait", "--timeout=60s", *sets(settings))

    def upgrade(self, *settings: str, chart: Path = CHART) -> str:
        return self.helm("upgrade", str(chart), "--wait", "--timeout=60s", *sets(settings))

    def uninstall(self) -> str:
        return self.helm("uninstall", "--wait", "--timeout=60s")

    def kubeconfig(self, folder: Path) -> Path:
        """Return a kubeconfig of the operator's ServiceAccount."""
        kubectl = self._cluster.kubectl
        token = kubectl("-n", NAMESPACE, "create", "token", NAME, "--duration=2h").strip()
        config = json.loads(kubectl("config", "view", "--raw", "--minify", "-o", "json"))
        config["users"] = [{"name": config["users"][0]["name"], "user": {"token": token}}]
        path = folder / "kubeconfig"
        path.write_text(json.dumps(config))
        return path


@pytest.fixture(scope="module")
def own_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A control plane without our CRD; the operator's namespace admits restricted pods alone."""
    if reason := why_not():
        pytest.skip(reason)
    made = Cluster(os.environ["KUBEUP"], tmp_path_factory.mktemp("kube") / "cluster")
    try:
        made.start()
        made.kubectl("create", "namespace", NAMESPACE)
        made.kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=restricted")
        for name in ("red", "blue"):
            made.kubectl("create", "namespace", name)
            made.kubectl("-n", name, "wait", "--for=create", "serviceaccount/default", "--timeout=30s")
            made.apply(*make_claim(name))
        yield made
    finally:
        made.stop()


@pytest.fixture
def release(own_cluster: Cluster) -> Iterator[Release]:
    """A release that the test installs; nothing of it is left for the next one."""
    yield Release(own_cluster)
    own_cluster.run("helm", "uninstall", RELEASE, "--namespace", NAMESPACE, "--ignore-not-found", "--wait")
    own_cluster.run("kubectl", "delete", "crd", CRD, "--ignore-not-found", "--timeout=60s")


def wait_until_calm(operator: OperatorProcess) -> None:
    """Return once the operator has written nothing for a while: a wave of an update would have begun."""
    seen, since = operator.num_writes(), time.monotonic()

    def is_calm() -> bool:
        nonlocal seen, since
        if (now := operator.num_writes()) != seen:
            seen, since = now, time.monotonic()
        return time.monotonic() - since > CALM_SECONDS

    eventually("the operator is calm", is_calm)


def has_crd(cluster: Cluster) -> bool:
    return cluster.run("kubectl", "get", "crd", CRD).returncode == 0


def next_version(folder: Path) -> Path:
    """Return the chart as a later version: another image, another runtime image, a field more in the CRD."""
    chart = folder / "asyncrl"
    shutil.copytree(CHART, chart)
    about = chart / "Chart.yaml"
    about.write_text(about.read_text().replace(__version__, "0.2.0"))
    crd = chart / "files" / "asyncrl.dev_asyncrljobs.yaml"
    before = crd.read_text()
    after = before.replace("    - arl\n", "    - arl\n    - arlj\n", 1)
    assert after != before
    crd.write_text(after)
    return chart


def test_it_is_installed_and_says_what_it_watches(own_cluster: Cluster, release: Release) -> None:
    notes = release.install()
    assert "watches all namespaces" in notes
    assert f"rollout status deployment/{NAME}" in notes
    [pod] = own_cluster.list(NAMESPACE, "pods", f"app.kubernetes.io/instance={RELEASE}")
    assert pod["status"]["phase"] == "Running", "the restricted level has admitted it"
    own_cluster.apply(make_job(), namespace="red")


def test_users_may_see_and_edit_jobs_by_the_roles_of_the_cluster(
    own_cluster: Cluster, release: Release
) -> None:
    release.install()

    def may(user: str, verb: str, subresource: str = "") -> bool:
        question = ["auth", "can-i", verb, "asyncrljobs", f"--subresource={subresource}", f"--as={user}"]
        return own_cluster.run("kubectl", "-n", "red", *question).stdout.strip() == "yes"

    for user, role in (("vera", "view"), ("eddie", "edit")):
        binding = ["-n", "red", "create", "rolebinding", user, f"--clusterrole={role}", f"--user={user}"]
        own_cluster.kubectl(*binding)
    eventually("the roles are aggregated", lambda: may("eddie", "create"))
    assert may("vera", "watch") and may("vera", "get", "scale") and may("vera", "get", "status")
    assert not may("vera", "patch") and not may("vera", "patch", "scale")
    assert may("eddie", "list") and may("eddie", "patch") and may("eddie", "patch", "scale")
    assert not may("eddie", "patch", "status"), "a status is the operator's"


def test_an_upgrade_brings_the_new_crd_and_touches_no_pod_of_a_job(
    own_cluster: Cluster, release: Release, tmp_path: Path
) -> None:
    release.install()
    job = Job(own_cluster, "red")
    with running_operator(release.kubeconfig(tmp_path), tmp_path) as operator:
        job.apply()
        job.wait("Running")
        eventually("both engines are ready", lambda: job.condition("RolloutReady")["message"] == "2/2")
        pods = {each["metadata"]["name"]: each["metadata"]["uid"] for each in job.children("pods")}
        operator.stop()
    release.upgrade(chart=next_version(tmp_path))
    deployment = own_cluster.get(NAMESPACE, "deployment", NAME)
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "asyncrl/operator:0.2.0"
    eventually(
        "the new CRD is served", lambda: own_cluster.run("kubectl", "get", "arlj", "-A").returncode == 0
    )
    image = {"ASYNCRL_RUNTIME_IMAGE": "asyncrl/runtime:0.2.0"}
    with running_operator(release.kubeconfig(tmp_path), tmp_path, **image) as operator:
        eventually("it is reconciled", lambda: "0.2.0" in json.dumps(job.get("statefulset", "gsm8k-rollout")))
        job.patch({"training": {"maxSteps": 300}})
        eventually("and once more", lambda: job.status()["observedGeneration"] == 2)
        wait_until_calm(operator)
        assert {each["metadata"]["name"]: each["metadata"]["uid"] for each in job.children("pods")} == pods
        assert job.condition("Running")["status"] == "True"


def test_an_operator_that_finds_an_older_crd_touches_nothing(
    own_cluster: Cluster, release: Release, tmp_path: Path
) -> None:
    release.install()
    rights, job = release.kubeconfig(tmp_path), Job(own_cluster, "red")
    with running_operator(rights, tmp_path):
        job.apply()
        job.wait("Running")
        eventually("both engines are ready", lambda: job.condition("RolloutReady")["message"] == "2/2")
    before = what_there_is(job)
    crd = CHART / "files" / "asyncrl.dev_asyncrljobs.yaml"
    serve(own_cluster, without_field(crd, "retainPodsOnFailure"))
    with running_operator(rights, tmp_path):
        message = job.wait_for_reason("Stalled", "CRDTooOld")
        assert "spec.failurePolicy.retainPodsOnFailure" in message
        assert "apply the CRD of this operator's version" in message
        job.patch({"training": {"maxSteps": 300}})
        eventually("the edit is seen", lambda: job.status()["observedGeneration"] == 2)
        assert what_there_is(job) == before
        assert job.condition("Running")["status"] == "True"
        own_cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(crd))
        live = "it goes on by itself"
        eventually(live, lambda: "300" in str(job.get("configmap", "gsm8k-live")["data"]), 60)


def what_there_is(job: Job) -> dict[str, tuple[str, str]]:
    """Return the UID and version of each child; if it has a status, which others write, its generation."""
    return {
        f"{each['kind']}/{each['metadata']['name']}": (
            each["metadata"]["uid"],
            str(each["metadata"].get("generation") or each["metadata"]["resourceVersion"]),
        )
        for each in job.children("services,configmaps,statefulsets,jobs")
    }


def without_field(path: Path, name: str) -> str:
    """Return a CRD from before a field came, which has it neither in its schema nor in a default."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(each) for key, each in value.items() if key != name}
        return [without(each) for each in value] if isinstance(value, list) else value

    [crd] = load_documents(path)
    return json.dumps(without(crd))


def serve(cluster: Cluster, crd: str) -> None:
    """Apply another version of the CRD, and wait until it is what the API server publishes."""
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=crd)
    document = ["get", "--raw", "/openapi/v3/apis/asyncrl.dev/v1alpha1"]
    gone = "the field is not served any more"
    eventually(gone, lambda: "retainPodsOnFailure" not in cluster.kubectl(*document))


def test_an_operator_of_one_namespace_runs_jobs_there_and_sees_no_other(
    own_cluster: Cluster, release: Release, tmp_path: Path
) -> None:
    release.install("watchNamespaces={red}")
    own_cluster.apply(make_job(), namespace="blue")
    with running_operator(release.kubeconfig(tmp_path), tmp_path, ASYNCRL_NAMESPACES="red") as operator:
        job = Job(own_cluster, "red")
        job.apply()
        job.wait("Running")
        assert operator.is_healthy()
        assert own_cluster.list("blue", "statefulsets,jobs") == []
        assert "403" not in operator.log.read_text()


def test_the_crd_outlives_the_release_and_is_taken_back(own_cluster: Cluster, release: Release) -> None:
    release.install()
    own_cluster.apply(make_job(), namespace="red")
    uid = own_cluster.get("red", "asyncrljob", "gsm8k")["metadata"]["uid"]
    release.uninstall()
    assert own_cluster.get("red", "asyncrljob", "gsm8k")["metadata"]["uid"] == uid
    left = own_cluster.run("kubectl", "get", "clusterrole", "-l", f"app.kubernetes.io/instance={RELEASE}")
    assert "No resources found" in left.stderr
    release.install()
    assert own_cluster.get("red", "asyncrljob", "gsm8k")["metadata"]["uid"] == uid


def test_a_release_that_does_not_keep_the_crd_warns_and_takes_it_along(
    own_cluster: Cluster, release: Release
) -> None:
    notes = release.install("crds.keep=false")
    assert "helm uninstall will delete the CRD, and with it every AsyncRLJob" in notes
    release.uninstall()
    eventually("the CRD is gone", lambda: not has_crd(own_cluster))


def test_a_release_without_the_crd_leaves_it_alone(own_cluster: Cluster, release: Release) -> None:
    crd = CHART / "files" / "asyncrl.dev_asyncrljobs.yaml"
    own_cluster.kubectl("apply", "--server-side", "-f", str(crd))
    notes = release.install("crds.install=false")
    assert "waits until AsyncRLJobs are served" in notes
    release.uninstall()
    assert has_crd(own_cluster)
