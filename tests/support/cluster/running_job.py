"""The quickstart as a job whose pods run, and what a user sees of it."""

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from asyncrl_api.parsing import load_documents
from asyncrl_operator.render.overlay import lay_over
from asyncrl_runtime.trainer.update.deepspeed_config import deep_merge
from support.cluster.control_plane import claim
from support.cluster.nodes import USES_IMAGES, NodeCluster, host_claims, host_overlay
from support.cluster.operator_process import Job, eventually
from support.paths import EXAMPLES

GRACE_SECONDS = 20
STEP_SECONDS = 180
"""The time for the next step, including the start of all pods."""


class RunningJob(Job):
    """One of the examples in a namespace of real nodes."""

    def __init__(self, nodes: NodeCluster, namespace: str, example: str = "quickstart.yaml") -> None:
        self._example = EXAMPLES / example
        super().__init__(nodes, namespace, load_documents(self._example)[0]["metadata"]["name"])
        self._nodes = nodes

    def apply(self, **spec: Any) -> None:
        self._nodes.apply(in_pods(self._example, **spec), namespace=self.namespace)

    @property
    def folder(self) -> Path:
        """The folder of its checkpoints on this machine."""
        return self._nodes.folder_of(self.namespace, "checkpoints") / self.namespace / self.name

    def step(self) -> int:
        """Return the last step that its status shows."""
        return int(self.status().get("progress", {}).get("step", 0))

    def trained(self) -> int:
        """Return the last step that its trainer has recorded: a status is up to 30 s behind."""
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def wait_for_step(self, step: int, seconds: float = STEP_SECONDS) -> None:
        eventually(f"step {step} is trained", lambda: self.trained() >= step, seconds)

    def pods(self, group: str) -> list[dict[str, Any]]:
        """Return the pods of a group that are not being deleted."""
        return [
            pod
            for pod in self.children("pods")
            if pod["metadata"]["labels"]["asyncrl.dev/group"] == group
            and "deletionTimestamp" not in pod["metadata"]
        ]

    def ready_pods(self, group: str) -> dict[str, dict[str, Any]]:
        """Return the pods of a group that are ready, by their names."""
        found = {str(pod["metadata"]["name"]): pod for pod in self.pods(group)}
        return {name: pod for name, pod in found.items() if ready_at(pod)}

    def execute(self, group: str, container: str, code: str) -> str:
        """Run Python code in the first pod of a group, with everything the pod has; return what it prints."""
        [name, *_] = sorted(pod["metadata"]["name"] for pod in self.pods(group))
        return self.kubectl("exec", name, "-c", container, "--", "python3", "-c", code).strip()

    def logs(self, group: str) -> str:
        """Return what a user sees of a group by its labels."""
        labels = f"asyncrl.dev/job={self.name},asyncrl.dev/group={group}"
        return self.kubectl("logs", "-l", labels, "--all-containers", "--tail=20")

    def describe(self) -> str:
        """Return everything that there is to see of the job, for the reader of a failed test."""
        questions = [
            ["get", "arl,jobs,statefulsets,pods", "-o", "wide"],
            ["get", "events", "--sort-by=.lastTimestamp"],
            *(["logs", name, "--all-containers", "--tail=30"] for name in self.names("pods")),
        ]
        answers = [self._nodes.run("kubectl", "-n", self.namespace, *question) for question in questions]
        return "\n\n".join(answer.stdout + answer.stderr for answer in answers)

    def audit(self) -> str:
        """Return what `asyncrl audit` says of its books."""
        command = [str(Path(sys.executable).parent / "asyncrl"), "audit", str(self.folder)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr


def ready_at(pod: dict[str, Any]) -> float:
    """Return when a pod has become ready, Unix time to the second; 0 if it is not."""
    for each in pod["status"].get("conditions", ()):
        if (each["type"], each["status"]) == ("Ready", "True"):
            return datetime.fromisoformat(each["lastTransitionTime"]).timestamp()
    return 0.0


def prepare(nodes: NodeCluster, namespace: str) -> None:
    """Create what the examples need in their namespace."""
    folders = [] if USES_IMAGES else host_claims(namespace)
    nodes.apply(claim("checkpoints"), claim("models"), *folders, namespace=namespace)


def in_pods(example: Path, **spec: Any) -> dict[str, Any]:
    """Return an example with a cache for its model; `spec` is merged into the blocks of its spec."""
    [manifest] = load_documents(example)
    blocks = manifest["spec"]
    ours: dict[str, Any] = {
        "model": {"cache": {"claimName": "models"}},
        "trainer": {"terminationGracePeriodSeconds": GRACE_SECONDS},
    }
    for changes in (ours, pod_templates(), spec):
        for name, value in changes.items():
            blocks[name] = deep_merge(blocks.get(name, {}), value) if isinstance(value, dict) else value
    return dict(manifest)


def pod_templates(**overlays: dict[str, Any]) -> dict[str, Any]:
    """Return blocks for trainer and rollout whose pods find our code, with a test's overlays by group."""
    if USES_IMAGES:
        return {group: {"podTemplate": overlay} for group, overlay in overlays.items()}
    files = {"trainer": host_overlay("trainer"), "rollout": host_overlay("engine", "worker")}
    laid = {
        group: lay_over(file, overlays.get(group, {}), "podTemplate", "nvidia.com/gpu")
        for group, file in files.items()
    }
    return {group: {"podTemplate": template} for group, template in laid.items()}
