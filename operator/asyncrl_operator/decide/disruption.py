"""What is announced to end the trainer's pods soon, so that it makes a checkpoint after each step. Pure."""

from collections.abc import Iterable, Mapping

from asyncrl_operator.decide.observed import Node, Pod

LONGEST_NOTICE = 200
TAINTS = (
    "ToBeDeletedByClusterAutoscaler",
    "karpenter.sh/disrupted",
    "karpenter.sh/disruption",
    "node.kubernetes.io/out-of-service",
    "aws-node-termination-handler/asg-lifecycle-termination",
    "aws-node-termination-handler/rebalance-recommendation",
    "aws-node-termination-handler/scheduled-maintenance",
    "aws-node-termination-handler/spot-itn",
    "cloud.google.com/impending-node-termination",
)
"""The taints by which autoscalers and termination handlers announce the end of a node."""
EVICTING_PREFIX = "node.kubernetes.io/"
"""A taint of the node controller with effect NoExecute ends the pods, some after a while. One with another
prefix may be there for good, to reserve nodes, and pods that tolerate it stay."""


def taint_that_announces(taints: Iterable[Mapping[str, str]]) -> str:
    """Return the key of the first taint that announces the end of its node, or of the pods there, or ''."""
    for taint in taints:
        key = taint.get("key", "")
        if key in TAINTS or (taint.get("effect") == "NoExecute" and key.startswith(EVICTING_PREFIX)):
            return key
    return ""


def announced_disruption(pods: Iterable[Pod], nodes: Mapping[str, Node] | None) -> str:
    """Return in words what is about to end one of these pods; empty if nothing is announced.

    Args:
        nodes: None if the operator may not see nodes; what is said of a node is then not known.
    """
    for pod in sorted(pods, key=lambda pod: pod.name):
        if not pod.is_alive:
            continue
        if pod.disruption:
            return f"pod {pod.name}: {pod.disruption}"
        if pod.notice:
            return f"pod {pod.name}: {pod.notice}"
        node = (nodes or {}).get(pod.node)
        if node is not None and node.notice:
            return f"node {pod.node}: {node.notice}"
    return ""
