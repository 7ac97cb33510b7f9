"""The operator as a process of its own, with the rights that its chart gives it, and jobs for it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from asyncrl_api.report import Report
from support.cluster.control_plane import Cluster, claim_of_folder
from support.paths import ROOT

HOME = "asyncrl-system"
"""The namespace of the operator's ServiceAccount."""
SECONDS = 60.0
STOP_SECONDS = 10.0


def make_job(name: str = "gsm8k", **spec: Any) -> dict[str, Any]:
    """Return a job without GPUs, one trainer and two engines; `spec` replaces whole blocks."""
    blocks = {
        "model": {"source": "file:///models/tiny", "dtype": "Float32"},
        "dataset": {"source": "reasoning-gym://chain_sum"},
        "reward": {"type": "ReasoningGym"},
        "training": {"batchSize": 8, "maxSteps": 200},
        "gpuBudget": {"total": 3, "allocation": "None"},
        "rollout": {"engine": {"type": "CPU"}},
        "trainer": {"deepspeed": {"zeroStage": 0}, "terminationGracePeriodSeconds": 5},
        "weightSync": {"backend": "Gloo"},
        "checkpoint": {"location": {"claimName": "checkpoints"}},
    }
    return {
        "apiVersion": "asyncrl.dev/v1alpha1",
        "kind": "AsyncRLJob",
        "metadata": {"name": name},
        "spec": blocks | spec,
    }


def make_claim(namespace: str) -> list[dict[str, Any]]:
    """Return the claim that the jobs' checkpoints go to, and a volume for it."""
    return claim_of_folder(namespace, "checkpoints", "/tmp", ["ReadWriteMany"])


def eventually(what: str, holds: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """Return what `holds` returns once it is true.

    Raises:
        AssertionError: it has not become true in time; says what was waited for.
    """
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)
    return found


def grant_rights(cluster: Cluster, folder: Path) -> Path:
    """Make the operator's ServiceAccount with the rights of its chart; return a kubeconfig of its own."""
    cluster.kubectl("create", "namespace", HOME)
    chart = ["helm", "template", "op", str(ROOT / "charts" / "asyncrl"), "--namespace", HOME]
    chart += ["--show-only", "templates/rbac.yaml"]
    rendered = cluster.run(*chart)
    assert rendered.returncode == 0, rendered.stderr
    cluster.kubectl("apply", "-f", "-", stdin=rendered.stdout)
    account = next(
        each["metadata"]["name"]
        for each in cluster.list(HOME, "serviceaccounts")
        if each["metadata"]["name"] != "default"
    )
    token = cluster.kubectl("-n", HOME, "create", "token", account, "--duration=2h").strip()
    config = json.loads(cluster.kubectl("config", "view", "--raw", "--minify", "-o", "json"))
    config["users"] = [{"name": config["users"][0]["name"], "user": {"token": token}}]
    path = folder / "operator.kubeconfig"
    path.write_text(json.dumps(config))
    return path


class OperatorProcess:
    """One `asyncrl-operator`."""

    def __init__(self, kubeconfig: Path, folder: Path, **settings: str) -> None:
        self.log = folder / "operator.log"
        self._metrics, self._liveness = (_free_port() for _ in range(2))
        self._environment = {
            **os.environ,
            "KUBECONFIG": str(kubeconfig),
            "ASYNCRL_RUNTIME_IMAGE": "asyncrl/runtime:test",
            "ASYNCRL_NATS_IMAGE": "nats:test",
            "ASYNCRL_METRICS_PORT": str(self._metrics),
            "ASYNCRL_LIVENESS_PORT": str(self._liveness),
            **settings,
        }
        self._popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and return once it has filled its caches."""
        command = [str(Path(sys.executable).parent / "asyncrl-operator")]
        with self.log.open("wb") as log:
            self._popen = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)
        eventually("the operator's caches are filled", self._is_ready)

    @property
    def pid(self) -> int:
        assert self._popen is not None
        return self._popen.pid

    def kill(self) -> None:
        """Kill it."""
        assert self._popen is not None
        self._popen.kill()
        self._popen.wait()

    def stop(self) -> float:
        """End it as the kubelet does; return how many seconds that took."""
        assert self._popen is not None
        began = time.monotonic()
        self._popen.send_signal(signal.SIGTERM)
        self._popen.wait(STOP_SECONDS)
        return time.monotonic() - began

    def metrics(self) -> dict[str, float]:
        """Return all series that it shows."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def num_writes(self) -> float:
        """Return how many calls it has made that change something."""
        return sum(self.num_calls(verb=verb) for verb in ("create", "patch", "delete"))

    def num_calls(self, resource: str = "", verb: str = "") -> float:
        """Return how many calls it has made, in all or of a resource or a verb."""
        labels = [f'{name}="{value}"' for name, value in (("resource", resource), ("verb", verb)) if value]
        return sum(
            number
            for name, number in self.metrics().items()
            if name.startswith("asyncrl_api_calls_total") and all(label in name for label in labels)
        )

    def is_healthy(self) -> bool:
        """Whether its liveness endpoint answers that it is alive."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._liveness}/healthz", timeout=5) as answer:
                return int(answer.status) == 200
        except OSError:
            return False

    def _is_ready(self) -> bool:
        assert self._popen is not None and self._popen.poll() is None, self.log.read_text()
        return b"caches are filled" in self.log.read_bytes() and self.is_healthy()


@contextlib.contextmanager
def running_operator(kubeconfig: Path, folder: Path, **settings: str) -> Iterator[OperatorProcess]:
    """Run an operator during the body, which may end it itself."""
    operator = OperatorProcess(kubeconfig, folder, **settings)
    try:
        operator.start()
        yield operator
    finally:
        operator.kill()


def jobs_that_end(cluster: Cluster) -> list[str]:
    """Return the jobs of namespaces that are being deleted: the operator is refused there at each event."""
    namespaces = json.loads(cluster.kubectl("get", "namespaces", "-o", "json"))["items"]
    ending = {each["metadata"]["name"] for each in namespaces if each["status"]["phase"] == "Terminating"}
    jobs = json.loads(cluster.kubectl("get", "arl", "--all-namespaces", "-o", "json"))["items"]
    return [each["metadata"]["name"] for each in jobs if each["metadata"]["namespace"] in ending]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Job:
    """One AsyncRLJob of a test, as a user sees it."""

    def __init__(self, cluster: Cluster, namespace: str, name: str = "gsm8k") -> None:
        self._cluster = cluster
        self.namespace = namespace
        self.name = name

    def apply(self, **spec: Any) -> None:
        self._cluster.apply(make_job(self.name, **spec), namespace=self.namespace)

    def patch(self, spec: dict[str, Any]) -> None:
        self.kubectl("patch", "asyncrljob", self.name, "--type=merge", "-p", json.dumps({"spec": spec}))

    def delete(self) -> None:
        """Delete it if it still exists, without waiting."""
        self.kubectl("delete", "asyncrljob", self.name, "--wait=false", "--ignore-not-found")

    def report(self, step: int = 1, **values: Any) -> bool:
        """Write a report as the present attempt's trainer does; always true."""
        report = Report(
            attempt=self.status()["attempt"]["number"],
            step=step,
            max_steps=200,
            state="Training",
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            **values,
        )
        body = {"data": {"report": report.model_dump_json(by_alias=True, exclude_none=True)}}
        self.kubectl("patch", "configmap", f"{self.name}-report", "--type=merge", "-p", json.dumps(body))
        return True

    def wait(self, condition: str, seconds: int = 60) -> None:
        """Wait as a user does."""
        args = ["wait", f"--for=condition={condition}", f"asyncrljob/{self.name}", f"--timeout={seconds}s"]
        self.kubectl(*args)

    def wait_for_reason(self, condition: str, reason: str) -> str:
        """Wait until a condition is True for a reason; return its message."""

        def holds() -> bool:
            found = self.condition(condition)
            return (found["status"], found["reason"]) == ("True", reason)

        eventually(f"{condition} is True/{reason}", holds)
        return str(self.condition(condition)["message"])

    def condition(self, kind: str) -> dict[str, Any]:
        """Return a condition; Absent if there is none."""
        found = self.status().get("conditions", ())
        absent = {"status": "Absent", "reason": "", "message": ""}
        return next((each for each in found if each["type"] == kind), absent)

    def status(self) -> dict[str, Any]:
        return dict(self.get("asyncrljob", self.name).get("status", {}))

    def get(self, kind: str, name: str) -> dict[str, Any]:
        return self._cluster.get(self.namespace, kind, name)

    def children(self, kind: str) -> list[dict[str, Any]]:
        """Return the objects of the job of a kind."""
        return self._cluster.list(self.namespace, kind, f"asyncrl.dev/job={self.name}")

    def names(self, kind: str) -> list[str]:
        return sorted(each["metadata"]["name"] for each in self.children(kind))

    def events(self) -> dict[str, int]:
        """Return how many Events about the job have each reason."""
        counts: dict[str, int] = {}
        for event in self._cluster.list(self.namespace, "events"):
            if event["involvedObject"]["kind"] == "AsyncRLJob":
                reason = event["reason"]
                counts[reason] = counts.get(reason, 0) + (event.get("count") or 1)
        return counts

    def kubectl(self, *arguments: str) -> str:
        return self._cluster.kubectl("-n", self.namespace, *arguments)
