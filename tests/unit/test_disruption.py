"""What announces the end of a trainer's pods reaches the trainer, and what does not, does not."""

import json
from dataclasses import replace
from typing import Any

import pytest

from asyncrl_operator.api_server.kept_fields import trim_node, trim_pod
from asyncrl_operator.decide.disruption import announced_disruption, taint_that_announces
from asyncrl_operator.decide.observed import Node, Pod
from asyncrl_operator.render.manifests import render_shared
from asyncrl_operator.resources import CONFIG_MAPS, PODS
from asyncrl_runtime.simulation.virtual_time import run_virtually
from support.cluster.model_cluster import ModelCluster
from support.cluster.whole_operator import NAME, World, running_world
from support.manifests.rendered_jobs import DEFAULTS, job_of

TRAINER = Pod("t-0", "u", "trainer", node="n1", phase="Running")
HEALTHY = Node(is_ready=True, since=0.0)


@pytest.mark.parametrize(
    ("taint", "announces"),
    [
        ({"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule", "value": "1"}, True),
        ({"key": "karpenter.sh/disrupted", "effect": "NoSchedule"}, True),
        ({"key": "aws-node-termination-handler/spot-itn", "effect": "NoSchedule"}, True),
        ({"key": "cloud.google.com/impending-node-termination", "effect": "NoSchedule"}, True),
        ({"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}, True),
        ({"key": "node.kubernetes.io/memory-pressure", "effect": "NoSchedule"}, False),
        (
            {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"},
            False,
        ),  # cordoned, for days perhaps
        ({"key": "nvidia.com/gpu", "effect": "NoExecute"}, False),  # reserves the node, for good
        ({}, False),
    ],
)
def test_taints_that_announce_an_end(taint: dict[str, str], announces: bool) -> None:
    assert taint_that_announces([{"key": "other"}, taint]) == (taint["key"] if announces else "")


def node(**spec: Any) -> Node:
    return trim_node({"metadata": {"creationTimestamp": "2026-01-01T00:00:00Z"}, "spec": spec})


def test_what_is_kept_of_a_node() -> None:
    assert node(taints=[{"key": "karpenter.sh/disrupted"}]).notice == "taint karpenter.sh/disrupted"
    assert node().notice == "" and node(taints=None).notice == ""
    metadata = {
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "annotations": {"asyncrl.dev/disruption": "spot: reclaimed at noon" + "!" * 999},
    }
    assert trim_node({"metadata": metadata}).notice == ("spot: reclaimed at noon" + "!" * 999)[:200]


def test_what_is_kept_of_a_pod() -> None:
    metadata = {
        "name": "t-0",
        "uid": "u",
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "annotations": {"asyncrl.dev/disruption": "moved"},
    }
    assert trim_pod({"metadata": metadata}).pod.notice == "moved"


@pytest.mark.parametrize(
    ("pod", "nodes", "told"),
    [
        (TRAINER, {"n1": HEALTHY}, ""),
        (TRAINER, None, ""),
        (replace(TRAINER, disruption="PreemptionByScheduler"), None, "pod t-0: PreemptionByScheduler"),
        (replace(TRAINER, notice="moved"), {}, "pod t-0: moved"),
        (TRAINER, {"n1": replace(HEALTHY, notice="spot")}, "node n1: spot"),
        (TRAINER, {"n2": replace(HEALTHY, notice="spot")}, ""),
        (replace(TRAINER, disruption="EvictionByEvictionAPI", phase="Failed"), None, ""),  # it is over
    ],
)
def test_what_is_announced_of_a_trainer(pod: Pod, nodes: dict[str, Node] | None, told: str) -> None:
    assert announced_disruption([pod], nodes) == told


def live_data(disruption: str) -> dict[str, str]:
    objects = render_shared(job_of("cpu"), DEFAULTS, disruption)
    [live] = [each for each in objects if each["metadata"]["name"].endswith("-live")]
    data: dict[str, str] = live["data"]
    return data


def test_the_trainer_is_told_beside_its_live_values_and_told_when_it_is_over() -> None:
    """The key is always there: one that is left out would stay as it was."""
    assert live_data("node n1: spot")["disruption"] == "node n1: spot"
    assert live_data("")["disruption"] == ""
    assert json.loads(live_data("")["live.json"])["checkpoint"]["everySeconds"] == 600


def test_a_taint_on_the_trainers_node_is_handed_on_and_shown() -> None:
    cluster = ModelCluster()
    cluster.run_until_still()
    desired = cluster.decide().desired
    assert desired is not None and desired.disruption == ""
    name = cluster.pods["gsm8k-trainer-1-0"].node
    cluster.nodes[name] = replace(cluster.nodes[name], notice="taint karpenter.sh/disrupted")
    outcome = cluster.pass_once()
    assert outcome.desired is not None
    assert outcome.desired.disruption == f"node {name}: taint karpenter.sh/disrupted"
    told = f"a disruption is announced (node {name}: taint karpenter.sh/disrupted): a checkpoint after each"
    assert told in cluster.status.message and cluster.phase == "Running"


def test_a_disk_that_fails_is_a_condition() -> None:
    cluster = ModelCluster()
    cluster.run_until_still()
    cluster.reports(disk_fault="the ledger: [Errno 28] No space left on device; tried again in 1 s")
    cluster.pass_once()
    assert (cluster.condition("Degraded"), cluster.phase) == ("True/DiskFailing", "Running")
    cluster.reports()
    cluster.pass_once()
    assert cluster.condition("Degraded") == "False/AsExpected"


def test_an_annotation_on_a_pod_reaches_the_config_map_of_the_running_trainer() -> None:
    async def scenario(world: World) -> None:
        world.create_job()
        await world.until(lambda: world.is_up)
        await world.until_quiet()

        def told() -> str:
            return str(world.get(CONFIG_MAPS, f"{NAME}-live")["data"]["disruption"])

        pod = f"{NAME}-trainer-1-0"
        pod = next(name for name in world.names(PODS) if name.startswith(pod))
        assert told() == ""
        world.edit(PODS, pod, {"metadata": {"annotations": {"asyncrl.dev/disruption": "spot notice"}}})
        await world.until(lambda: told() == f"pod {pod}: spot notice")
        world.edit(PODS, pod, {"metadata": {"annotations": {"asyncrl.dev/disruption": None}}})
        await world.until(lambda: told() == "")
        assert world.status()["attempt"]["number"] == 1, "it goes on"

    async def play() -> None:
        async with running_world() as world:
            await scenario(world)

    run_virtually(play())
