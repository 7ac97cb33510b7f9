"""Engines on a spot node beside a trainer on demand: the node goes, the trainer stays."""

from collections.abc import Iterator

import pytest

from support.chart.installed_operator import Operator
from support.cluster.nodes import NodeCluster
from support.cluster.operator_process import eventually
from support.cluster.running_job import RunningJob

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600, func_only=True)]

SECONDS = 240


@pytest.fixture
def pools(nodes: NodeCluster) -> Iterator[tuple[str, str]]:
    """One node on demand, and one that takes only what tolerates spot."""
    nodes.kubectl("label", "node", "n1", "pool=on-demand")
    nodes.kubectl("label", "node", "n2", "pool=spot")
    nodes.kubectl("taint", "node", "n2", "pool=spot:NoSchedule")
    yield "n1", "n2"
    nodes.kubectl("taint", "node", "n2", "pool-")
    nodes.kubectl("label", "node", "n1", "n2", "pool-")


def test_a_spot_node_takes_its_engines_and_nothing_else(
    nodes: NodeCluster, operator: Operator, namespace: str, pools: tuple[str, str]
) -> None:
    on_demand, spot = pools
    job = RunningJob(nodes, namespace, "spot.yaml")
    job.apply(training={"maxSteps": 5000}, evaluation={"samples": 50, "everySteps": 5000})
    job.wait_for_step(3, SECONDS)
    places = {group: {pod["spec"]["nodeName"] for pod in job.pods(group)} for group in ("trainer", "rollout")}
    assert places == {"trainer": {on_demand}, "rollout": {spot}}

    nodes.kill_node(spot)
    try:
        eventually("no engine is left", lambda: not is_any_ready(job), SECONDS)
    finally:
        nodes.start_node(spot)
    eventually("engines are back", lambda: job.condition("RolloutReady")["message"] == "2/2", SECONDS)
    job.wait_for_step(job.trained() + 3, SECONDS)
    assert job.names("jobs") == ["spot-trainer-1"], "the trainer waited"
    assert "missing 0  twice 0" in job.audit()


def is_any_ready(job: RunningJob) -> bool:
    """Whether the operator knows of an engine that serves."""
    return not job.condition("RolloutReady")["message"].startswith("0/")
