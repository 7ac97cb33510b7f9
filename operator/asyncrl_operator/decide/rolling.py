"""Which rollout pods are replaced now, and which pods no kubelet answers for any more. Pure."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from asyncrl_operator.decide.desired import DeletePod
from asyncrl_operator.decide.observed import Node, Pod

STUCK_SECONDS = 900.0
"""How long an updated pod may take to become ready before the update counts as stuck."""
PATIENCE_SECONDS = 10.0
"""How long a pod of an older template must have been unready to be replaced as one that serves nobody."""
UNKNOWN_NODE_SECONDS = 60.0
"""How old a pod on an unknown node must be for the node to count as gone: a new node may become known later
than its pod."""


@dataclass(frozen=True)
class Wave:
    """The next step of a rolling update."""

    deletions: tuple[DeletePod, ...] = ()
    is_under_way: bool = False
    stuck: str = ""
    """The updated pod that does not become ready, and why; empty if there is none. The old pods are kept."""
    wake_at: float | None = None


def next_wave(
    pods: Iterable[Pod], current: Set[str], replicas: int, max_unavailable_percent: int, now: float
) -> Wave:
    """Return which pods of an outdated template go now, so that no more than the allowed share is down.

    Pods that have not been ready for a while go first and do not count, so that an update that follows a
    broken one gets through (kubernetes#67250). Updated pods that fail use up what may be down, and then no
    more pods go.

    Args:
        current: the names of the templates whose pods may stay; replaced pods get the newest of them.
        replicas: those of the StatefulSet; at least one pod may always be down.
        max_unavailable_percent: the share of the replicas that may be down.
    """
    alive = [pod for pod in pods if pod.is_alive and pod.deleted_at is None]
    outdated = [pod for pod in alive if pod.template not in current]
    if not outdated:
        return Wave()
    unready = [pod for pod in outdated if not pod.is_ready]
    failing = [pod for pod in unready if now >= pod.ready_changed_at + PATIENCE_SECONDS]
    ready = [pod for pod in alive if pod.is_ready]
    budget = max(1, replicas * max_unavailable_percent // 100) - (replicas - len(ready))
    serving = sorted((pod for pod in outdated if pod.is_ready), key=_ordinal, reverse=True)
    chosen = failing + serving[: max(0, budget)]
    waiting = [pod for pod in alive if pod.template in current and not pod.is_ready]
    late = [pod for pod in waiting if now >= pod.created_at + STUCK_SECONDS]
    wakes = [pod.created_at + STUCK_SECONDS for pod in waiting if pod not in late]
    wakes += [pod.ready_changed_at + PATIENCE_SECONDS for pod in unready if pod not in failing]
    return Wave(
        tuple(DeletePod(pod.name, pod.uid, is_forced=False) for pod in chosen),
        is_under_way=True,
        stuck=f"{late[0].name} is not ready: {late[0].waiting or 'its probe fails'}" if late else "",
        wake_at=min(wakes, default=None),
    )


@dataclass(frozen=True)
class Lost:
    """The pods that only a forced deletion removes."""

    deletions: tuple[DeletePod, ...]
    wake_at: float | None


def lost_pods(
    pods: Iterable[Pod], nodes: Mapping[str, Node] | None, delay_seconds: float, now: float
) -> Lost:
    """Return the pods that are being deleted on nodes dead for `delay_seconds`, those that ended included.

    Rollout pods and trainers are fenced (by ticket and by attempt), so one that lives on does no harm.

    Args:
        nodes: None if the operator may not see nodes; the delay then begins when the pod's grace period ends.
    """
    deletions, wakes = [], []
    for pod in pods:
        if pod.deleted_at is None or not is_on_dead_node(pod, nodes, now):
            continue
        node = (nodes or {}).get(pod.node)
        due = (pod.deleted_at if node is None else node.since) + delay_seconds
        if now >= due:
            deletions.append(DeletePod(pod.name, pod.uid, is_forced=True))
        else:
            wakes.append(due)
    return Lost(tuple(deletions), min(wakes, default=None))


def is_on_dead_node(pod: Pod, nodes: Mapping[str, Node] | None, now: float) -> bool:
    """Whether the pod's node is gone or not ready; if nodes cannot be seen, whether it is being deleted."""
    if not pod.node:
        return False
    if nodes is None:
        return pod.deleted_at is not None
    node = nodes.get(pod.node)
    if node is None:
        return now >= pod.created_at + UNKNOWN_NODE_SECONDS
    return not node.is_ready


def _ordinal(pod: Pod) -> int:
    return int(pod.name.rpartition("-")[2])
