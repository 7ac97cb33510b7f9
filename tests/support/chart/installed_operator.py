"""The operator as its chart installs it, from its own image."""

from typing import Protocol

from support.cluster.nodes import NATS_IMAGE, OPERATOR_IMAGE, RUNTIME_IMAGE, NodeCluster
from support.paths import CHART

NAMESPACE, RELEASE, DEPLOYMENT = "asyncrl", "asyncrl", "deployment/asyncrl-operator"


class Operator(Protocol):
    """An operator that a test may kill at any time."""

    def start(self) -> None:
        """Return once it is working."""

    def kill(self) -> None: ...


class InstalledOperator:
    """A release in a namespace of the restricted level; its pod is created again whenever it is deleted."""

    def __init__(self, nodes: NodeCluster) -> None:
        self._nodes = nodes
        self._is_installed = False

    def start(self) -> None:
        if not self._is_installed:
            self._install()
        self._nodes.kubectl("-n", NAMESPACE, "rollout", "status", DEPLOYMENT, "--timeout=120s")

    def kill(self) -> None:
        pods = ["delete", "pod", "-l", f"app.kubernetes.io/instance={RELEASE}", "--grace-period=0", "--force"]
        self._nodes.kubectl("-n", NAMESPACE, *pods)

    def _install(self) -> None:
        self._nodes.kubectl("create", "namespace", NAMESPACE)
        level = "pod-security.kubernetes.io/enforce=restricted"
        self._nodes.kubectl("label", "namespace", NAMESPACE, level)
        repository, _, tag = OPERATOR_IMAGE.rpartition(":")
        values = {
            "image.repository": repository,
            "image.tag": tag,
            "runtimeImage": RUNTIME_IMAGE,
            "natsImage": NATS_IMAGE,
        }
        sets = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
        done = self._nodes.run("helm", "install", RELEASE, str(CHART), "--namespace", NAMESPACE, *sets)
        assert done.returncode == 0, done.stderr
        self._is_installed = True
