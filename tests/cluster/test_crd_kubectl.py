"""What kubectl does with the CRD: apply, diff, explain, scale, get."""

import json
from typing import Any

import pytest

from support.cluster.control_plane import Cluster
from support.cluster.status_samples import full_status
from support.manifests.rule_cases import BASE

pytestmark = pytest.mark.e2e

MANIFEST = """\
apiVersion: asyncrl.dev/v1alpha1
kind: AsyncRLJob
metadata: {name: gsm8k}
spec:
  model: {source: "hf://Qwen/Qwen3-1.7B"}
  dataset: {source: "hf://openai/gsm8k"}
  training: {batchSize: 64, maxSteps: 200, learningRate: 1e-6}
  scheduling: {tolerations: [{key: gpu, operator: Exists}]}
  gpuBudget: {total: 16}
  rollout: {podTemplate: {spec: {containers: [{name: engine, resources: {limits: {memory: 1.5Gi}}}]}}}
  checkpoint: {location: {claimName: checkpoints}}
"""


@pytest.mark.parametrize("how", [[], ["--server-side"]], ids=["client-side", "server-side"])
def test_applied_again_nothing_differs(cluster: Cluster, namespace: str, how: list[str]) -> None:
    for _ in range(2):
        cluster.kubectl("-n", namespace, "apply", *how, "-f", "-", stdin=MANIFEST)
    assert cluster.kubectl("-n", namespace, "diff", *how, "-f", "-", stdin=MANIFEST) == ""
    job = cluster.get(namespace, "arl", "gsm8k")
    assert job["metadata"]["generation"] == 1
    assert job["spec"]["training"]["learningRate"] == 1e-6


@pytest.mark.parametrize("how", [[], ["--server-side"]], ids=["client-side", "server-side"])
def test_an_apply_that_breaks_a_rule_says_which(cluster: Cluster, namespace: str, how: list[str]) -> None:
    broken = MANIFEST.replace("total: 16", "total: 1")
    refused = cluster.run("kubectl", "-n", namespace, "apply", *how, "-f", "-", stdin=broken)
    assert refused.returncode == 1
    assert "spec.gpuBudget.total: Invalid value: gpuBudget.total is 1, but must be at least" in refused.stderr


def test_explain_tells_the_mark(cluster: Cluster) -> None:
    told = cluster.kubectl("explain", "asyncrljob.spec.training.maxSteps")
    assert "FIELD: maxSteps <integer>" in told
    assert "[L] Steps after which the job is complete; may only grow." in " ".join(told.split())


def test_scale_changes_the_budget_within_its_rules(cluster: Cluster, namespace: str) -> None:
    cluster.apply(BASE, namespace=namespace)
    cluster.kubectl("-n", namespace, "scale", "arl/gsm8k", "--replicas=24")
    assert cluster.get(namespace, "arl", "gsm8k")["spec"]["gpuBudget"]["total"] == 24
    refused = cluster.run("kubectl", "-n", namespace, "scale", "arl/gsm8k", "--replicas=1")
    assert refused.returncode == 1
    assert "gpuBudget.total is 1, but must be at least" in refused.stderr


def test_get_shows_how_the_job_stands(cluster: Cluster, namespace: str) -> None:
    cluster.apply(BASE, namespace=namespace)
    write_status(cluster, namespace, full_status().to_json())
    head, line = cluster.kubectl("-n", namespace, "get", "asyncrl").splitlines()
    assert head.split() == [
        "NAME",
        "PHASE",
        "STEP",
        "TRAINER",
        "ROLLOUT",
        "GPUS",
        "STALENESS",
        "REWARD",
        "AGE",
    ]
    assert line.split()[:-1] == ["gsm8k", "Running", "410/2000", "1/1", "7/8", "16/16", "3", "0.412"]
    head, line = cluster.kubectl("-n", namespace, "get", "arl", "-o", "wide").splitlines()
    assert head.split()[-3:] == ["ATTEMPT", "CHECKPOINT", "MESSAGE"]
    assert line.split()[9:11] == ["2", "400"]
    assert line.rstrip().endswith("16/16 GPUs in use, step 410 of 2000")


def write_status(cluster: Cluster, namespace: str, status: dict[str, Any]) -> None:
    patch = json.dumps({"status": status})
    how = ["--subresource=status", "--type=merge", "-p", patch]
    cluster.kubectl("-n", namespace, "patch", "arl", "gsm8k", *how)
