"""A Kubernetes control plane for tests, from the kit that KUBEUP names, with fake nodes (kwok)."""

import json
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NODES, GPUS = 4, 8
WAIT_SECONDS = 60
SIZE = {"storage": "1Gi"}
"""The size of a claim, which nobody checks."""


class Cluster:
    """One control plane with fake nodes."""

    def __init__(self, command: str, folder: Path) -> None:
        self._command = command
        self._folder = str(folder)
        self.kubeconfig = ""
        self.programs = Path(os.environ["KUBEBUILDER_ASSETS"])

    def kubeup(self, *arguments: str) -> str:
        """Run the kit's command for this cluster."""
        command = [self._command, *arguments, "--dir", self._folder]
        done = subprocess.run(command, check=False, text=True, capture_output=True, timeout=300)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def start(self, nodes: int = NODES) -> None:
        """Start it; for tests without nodes any API server will do."""
        self.kubeup("start")
        if nodes:
            self.kubeup("kwok", "start", "--nodes", str(nodes), "--gpus", str(GPUS))
        self.kubeconfig = self.kubeup("kubeconfig")

    def stop(self) -> None:
        self.kubeup("stop")
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of programs that talk to this cluster."""
        path = f"{self.programs}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "KUBECONFIG": self.kubeconfig, "PATH": path}

    def run(self, *command: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a program (kubectl, helm) against this cluster; the caller checks how it ended."""
        return subprocess.run(
            command,
            check=False,
            env=self.environment,
            input=stdin,
            text=True,
            capture_output=True,
            timeout=600,  # what is asked may have a deadline of its own, which is shorter
        )

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Run kubectl, which must succeed, and return what it prints."""
        done = self.run("kubectl", *arguments, stdin=stdin)
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def apply(self, *manifests: dict[str, Any], namespace: str | None = None) -> str:
        """Apply manifests as a user does."""
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(manifests)})
        where = ["-n", namespace] if namespace else []
        return self.kubectl(*where, "apply", "-f", "-", stdin=text)

    def apply_crd(self, path: Path) -> None:
        """Apply a CRD, and wait until its objects are served; at first it has no condition to wait for."""
        self.kubectl("apply", "--server-side", "-f", str(path))
        deadline = time.monotonic() + WAIT_SECONDS
        established = ["wait", "--for=condition=Established", "--timeout=5s", "-f", str(path)]
        while self.run("kubectl", *established).returncode != 0:
            assert time.monotonic() < deadline, f"{path.name} is not established"
            time.sleep(0.1)

    def get(self, namespace: str, kind: str, name: str) -> dict[str, Any]:
        """Return an object."""
        found: dict[str, Any] = json.loads(self.kubectl("-n", namespace, "get", kind, name, "-o", "json"))
        return found

    def list(self, namespace: str, kind: str, selector: str = "") -> list[dict[str, Any]]:
        """Return the objects of a kind."""
        select = ["-l", selector] if selector else []
        text = self.kubectl("-n", namespace, "get", kind, *select, "-o", "json")
        items: list[dict[str, Any]] = json.loads(text)["items"]
        return items

    @contextmanager
    def proxy(self) -> Iterator[str]:
        """Provide the address of a `kubectl proxy`: the API over plain HTTP, with the rights of the tests."""
        command = ["kubectl", "proxy", "--port=0"]
        process = subprocess.Popen(command, env=self.environment, text=True, stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()  # "Starting to serve on 127.0.0.1:12345"
            yield f"http://{line.split()[-1]}"
        finally:
            process.terminate()
            process.communicate(timeout=10)


def claim(name: str, modes: list[str] | None = None, **spec: Any) -> dict[str, Any]:
    """Return a PersistentVolumeClaim; of the default class unless told otherwise."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {"accessModes": modes or ["ReadWriteMany"], "resources": {"requests": SIZE}, **spec},
    }


def claim_of_folder(namespace: str, name: str, folder: str, modes: list[str]) -> list[dict[str, Any]]:
    """Return a claim to a folder of this machine, and the volume that it is bound to."""
    volume = f"{namespace}-{name}"
    spec = {
        "capacity": SIZE,
        "accessModes": modes,
        "storageClassName": "",
        "hostPath": {"path": folder},
        "claimRef": {"namespace": namespace, "name": name},
    }
    bound = claim(name, modes, storageClassName="", volumeName=volume)
    bound["metadata"]["namespace"] = namespace
    metadata = {"name": volume}
    return [{"apiVersion": "v1", "kind": "PersistentVolume", "metadata": metadata, "spec": spec}, bound]


@contextmanager
def making_namespace(cluster: Cluster) -> Iterator[str]:
    """Provide a namespace of the restricted pod security level; delete it at the end without waiting."""
    name = f"t-{uuid.uuid4().hex[:8]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    wait = ["wait", "--for=create", "serviceaccount/default", "--timeout=30s"]
    cluster.kubectl("-n", name, *wait)  # pods need it
    yield name
    # Jobs first: a namespace waits for its pods' grace periods before it deletes the rest, and until then an
    # operator is refused there.
    cluster.run("kubectl", "-n", name, "delete", "asyncrljobs", "--all", "--wait=false")
    cluster.kubectl("delete", "namespace", name, "--wait=false")


def why_not() -> str:
    """Return why there can be no cluster here; empty if there can."""
    for name in ("KUBEUP", "KUBEBUILDER_ASSETS"):
        if not os.environ.get(name):
            return f"{name} is not set: tests that need an API server are skipped"
    return ""
