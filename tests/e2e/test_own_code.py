"""A user's own reward in a ConfigMap and a hub's token, under a quota, its groups on nodes of their own."""

import re
from pathlib import Path
from typing import Any

import pytest

from support.chart.installed_operator import Operator
from support.cluster.nodes import NodeCluster
from support.cluster.running_job import RunningJob, pod_templates

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600, func_only=True)]

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 60
TOKEN = "import os; print(os.environ['HF_TOKEN'])"
REQUESTS = {"cpu": "10m", "memory": "64Mi"}


def template(node: str, *containers: str) -> dict[str, Any]:
    """Return an overlay with a place and with requests, as a quota asks for."""
    limits = {"requests": REQUESTS, "limits": {"cpu": "2", "memory": "4Gi"}}
    each = [{"name": name, "resources": limits} for name in containers]
    return {"spec": {"nodeSelector": {"kubernetes.io/hostname": node}, "containers": each}}


def test_a_reward_of_ones_own_under_a_quota(nodes: NodeCluster, operator: Operator, namespace: str) -> None:
    job = RunningJob(nodes, namespace, "custom_reward/job.yaml")
    job.kubectl("create", "configmap", "code", f"--from-file={EXAMPLES / 'custom_reward' / 'digits.py'}")
    job.kubectl("create", "secret", "generic", "hub", "--from-literal=HF_TOKEN=of-the-hub")
    hard = "requests.cpu=1,requests.memory=2Gi,limits.cpu=20,limits.memory=40Gi,pods=6"
    job.kubectl("create", "quota", "all", f"--hard={hard}")
    limits = {"type": "Container", "defaultRequest": REQUESTS, "default": {"cpu": "1", "memory": "1Gi"}}
    nodes.apply(
        {
            "apiVersion": "v1",
            "kind": "LimitRange",
            "metadata": {"name": "defaults"},
            "spec": {"limits": [limits]},
        },
        namespace=namespace,
    )
    job.apply(
        model={"secretRef": {"name": "hub"}},
        reward={"configMapRef": {"name": "code"}},
        training={"maxSteps": STEPS},
        evaluation={"samples": 50, "everySteps": 50},
        **pod_templates(trainer=template("n1", "trainer"), rollout=template("n2", "engine", "worker")),
    )
    job.wait_for_step(1, 240)
    places = {
        pod["metadata"]["labels"]["asyncrl.dev/group"]: pod["spec"]["nodeName"]
        for pod in job.children("pods")
    }
    assert (places["trainer"], places["rollout"]) == ("n1", "n2")
    for group, container in (("trainer", "trainer"), ("rollout", "engine"), ("rollout", "worker")):
        assert job.execute(group, container, TOKEN) == "of-the-hub"
    job.wait("Finished", 240)
    assert job.condition("Complete")["status"] == "True", job.status()
    assert re.search(r"missing 0  twice 0", job.audit())
