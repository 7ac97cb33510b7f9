"""A Kubernetes with real nodes for tests: pods run, from our images or on the checkout's own `.venv`.

In the second case the image holds nothing: /usr, the environment and the checkout are mounted read-only, by
claims, which namespaces of the restricted level allow. The next pod has every edit, and no image is built.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from support.cluster.control_plane import Cluster, claim_of_folder, why_not
from support.jobs.nats_server import nats_binary
from support.paths import ROOT

ENVIRONMENT = Path(sys.executable).parents[1]
"""The virtual environment of the tests, and of the pods."""
NODES: Final = ("n1", "n2")
GPUS = 4
VOLUMES = 60
PACKAGES = ("containerd", "runc", "containernetworking-plugins", "iptables", "nftables", "iproute2")
IMAGE_PACKAGES = ("buildah", "debootstrap")
USES_IMAGES = bool(os.environ.get("ASYNCRL_E2E_IMAGES"))
"""Whether operator and jobs run from images of the project's Dockerfiles."""
HOST_IMAGE, NATS_IMAGE = "localhost/host:1", "localhost/nats:1"
OPERATOR_IMAGE, RUNTIME_IMAGE = "localhost/asyncrl/operator:e2e", "localhost/asyncrl/runtime:e2e"

Object = dict[str, Any]


def why_no_nodes() -> str:
    """Return why there can be no real nodes here; empty if there can. Root gets the packages they need."""
    if reason := why_not():
        return reason
    if os.getuid() != 0:
        return "real nodes need root: tests on them are skipped"
    programs = ["containerd", "runc", "nft", "iptables", "ip", *(IMAGE_PACKAGES if USES_IMAGES else ())]
    if all(shutil.which(each) for each in programs):
        return ""
    packages = [*PACKAGES, *(IMAGE_PACKAGES if USES_IMAGES else ())]
    if not shutil.which("apt-get"):
        return f"real nodes need {', '.join(packages)}: tests on them are skipped"
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
    for command in (["apt-get", "update", "-qq"], install):
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
        if done.returncode != 0:
            return f"real nodes need {', '.join(packages)}: {' '.join(command)}: {done.stderr[-300:]}"
    return ""


class NodeCluster(Cluster):
    """One control plane with real nodes, DNS and NetworkPolicies."""

    def start(self, nodes: int = len(NODES)) -> None:
        self.kubeup("start", "--nodes", "--network-policy")
        self.kubeconfig = self.kubeup("kubeconfig")
        ours = self._build_images() if USES_IMAGES else [self._make_host_image()]
        images = [str(each) for each in (*ours, self._make_nats_image())]
        self.start_node(*NODES[:nodes], images=images)
        self.kubeup("volumes", str(VOLUMES))

    def start_node(self, *names: str, images: list[str] | None = None) -> None:
        """Start nodes; a node that has died boots again with its disk."""
        more = ["--image", *images] if images else []
        self.kubeup("node", "start", *names, "--gpus", str(GPUS), *more)

    def kill_node(self, name: str) -> None:
        self.kubeup("node", "kill", name)

    def kill_process(self, node: str, pattern: str) -> None:
        """Kill with SIGKILL those processes of a node whose command line matches, if there are any."""
        done = self._on_node(node, "pkill", "-9", "-f", pattern)
        assert done.returncode in (0, 1), done.stderr

    def tag_image(self, image: str, name: str) -> None:
        """Give another name to an image that the nodes have."""
        for node in NODES:
            done = self._on_node(node, "ctr", "-n", "k8s.io", "images", "tag", "--force", image, name)
            assert done.returncode == 0, done.stderr

    def _on_node(self, node: str, *command: str) -> subprocess.CompletedProcess[str]:
        execute = [self._command, "node", "exec", "--dir", self._folder, node, "--", *command]
        return subprocess.run(execute, check=False, capture_output=True, text=True, timeout=60)

    def folder_of(self, namespace: str, claim: str) -> Path:
        """Return the folder of this machine that a claim is bound to."""
        volume = self.get(namespace, "persistentvolumeclaim", claim)["spec"]["volumeName"]
        found = self.kubectl("get", "persistentvolume", volume, "-o", "jsonpath={.spec.hostPath.path}")
        return Path(found)

    def _build_images(self) -> list[Path]:
        """Build operator and runtime as the README says, but without a registry."""
        return [
            self._build(OPERATOR_IMAGE, "operator"),
            self._build(RUNTIME_IMAGE, "runtime", "--target", "cpu"),
        ]

    def _build(self, image: str, name: str, *options: str) -> Path:
        archive = Path(self._folder) / f"{name}.tar"
        command = [str(Path(self._command).parent / "mkapp"), str(ROOT), image, str(archive)]
        command += ["-f", str(ROOT / "images" / name / "Dockerfile"), *options, *_constraints()]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return archive

    def _make_host_image(self) -> Path:
        """Make an image of empty folders, for pods that mount this machine's own."""
        root = Path(self._folder) / "host"
        for name in ("usr", "proc", "sys", "dev", "tmp", "etc"):
            (root / name).mkdir(parents=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            (root / name).symlink_to(f"usr/{name}")
        return self._make_image(HOST_IMAGE, root)

    def _make_nats_image(self) -> Path:
        root = Path(self._folder) / "nats"
        (root / "bin").mkdir(parents=True)
        (root / "tmp").mkdir()
        shutil.copy(nats_binary(), root / "bin" / "nats-server")
        return self._make_image(NATS_IMAGE, root)

    def _make_image(self, name: str, root: Path) -> Path:
        archive = root.with_suffix(".tar")
        command = [str(Path(self._command).parent / "mkimg"), name, str(root), str(archive)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return archive


def _constraints() -> list[str]:
    """Return buildah's options for the file that this machine's pip takes its constraints from, if any."""
    pip = [sys.executable, "-m", "pip", "config", "list"]
    settings = subprocess.run(pip, check=True, capture_output=True, text=True, timeout=60).stdout
    found = re.search(r"\.constraint='(/.+)'", settings)
    return ["-v", f"{found[1]}:{found[1]}:ro"] if found else []


def mounted_folders() -> dict[str, Path]:
    """Return what pods of the host image see of this machine, by the name of the claim."""
    folders = {"usr": Path("/usr"), "checkout": ROOT}
    if not ENVIRONMENT.is_relative_to(ROOT):
        folders["environment"] = ENVIRONMENT
    base = Path(sys.base_prefix).resolve()  # of the interpreter that the environment was made from
    if not base.is_relative_to("/usr"):
        folders["python"] = base
    return folders


def host_claims(namespace: str) -> list[Object]:
    """Return claims to the folders of this machine that pods of the host image need, and their volumes."""
    return [
        each
        for name, folder in mounted_folders().items()
        for each in claim_of_folder(namespace, name, str(folder), ["ReadOnlyMany"])
    ]


def host_overlay(*containers: str) -> Object:
    """Return the `podTemplate` of a group whose pods use this machine's folders."""
    folders = mounted_folders()
    mounts = [{"name": name, "mountPath": str(path), "readOnly": True} for name, path in folders.items()]
    path = f"{ENVIRONMENT / 'bin'}:/usr/bin:/bin"
    env = [{"name": "PATH", "value": path}, {"name": "PYTHONDONTWRITEBYTECODE", "value": "1"}]
    volumes = [
        {"name": name, "persistentVolumeClaim": {"claimName": name, "readOnly": True}} for name in folders
    ]
    each = [{"name": container, "volumeMounts": mounts, "env": env} for container in containers]
    return {"spec": {"volumes": volumes, "containers": each}}
