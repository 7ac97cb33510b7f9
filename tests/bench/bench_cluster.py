"""A job in pods on real nodes beside the same manifest run by `asyncrl run`, one after the other.

- the quickstart to its end: from the start to the first step, steps per minute, held-out accuracy at the end;
- SIGKILL of the trainer to its next step, beside the start of a trainer's pod to its next step;
- suspend to zero pods; resume to the next step;
- a third engine: asked for to its first trajectory published, beside the start of its containers to ready.

    python tests/bench/bench_cluster.py

takes 20 minutes; needs root, KUBEUP and KUBEBUILDER_ASSETS. Pods run on the checkout's files, or with
ASYNCRL_E2E_IMAGES=1 from images of the Dockerfiles. Either run makes its model.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).parent.parent))
from asyncrl_api.crdgen import FILE_NAME
from support.chart.installed_operator import InstalledOperator, Operator
from support.cluster.control_plane import making_namespace
from support.cluster.nodes import HOST_IMAGE, NATS_IMAGE, USES_IMAGES, NodeCluster, why_no_nodes
from support.cluster.operator_process import OperatorProcess, eventually, grant_rights
from support.cluster.running_job import GRACE_SECONDS, RunningJob, prepare, ready_at
from support.paths import EXAMPLES

ROOT = Path(__file__).parents[2]
WARM_STEPS = 20
"""The number of first steps that are left out of the rate."""
SECONDS = 900

LISTEN = """
import asyncio
import time
from pathlib import Path

from asyncrl_api.run_config import RunConfig
from asyncrl_runtime.contract.messages import Group, GroupPart, Tombstone, decode
from asyncrl_runtime.transport.broker import Broker

async def listen():
    config = RunConfig.load(Path("/etc/asyncrl/config/config.json"))
    broker = await Broker.connect(config.nats, config.names, "bench")
    subscription = await broker.client.subscribe(config.names.trajectory(">"))
    print("listens", flush=True)
    async for message in subscription.messages:
        if decode(message.data, Group, GroupPart, Tombstone).worker == {worker!r}:
            print(time.time(), flush=True)
            return

asyncio.run(asyncio.wait_for(listen(), {seconds}))
"""
"""Run in the trainer's pod: when a worker's first trajectory is published."""


@dataclass(frozen=True)
class Run:
    """What the folder of a run says of it; times are seconds since it was asked for."""

    steps: dict[int, float]
    accuracy: float

    @property
    def rate(self) -> float:
        """Steps per minute, the first ones left out; evaluations are among them on either side."""
        last = max(self.steps)
        return 60 * (last - WARM_STEPS) / (self.steps[last] - self.steps[WARM_STEPS])


def step_times(metrics: Path) -> dict[int, float]:
    """Return when each step was trained, Unix time."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    records = [json.loads(line) for line in lines]
    return {each["step"]: datetime.fromisoformat(each["time"]).timestamp() for each in records}


def read_run(folder: Path, began: float) -> Run:
    """Return what a run that has ended has left in its folder."""
    last = json.loads((folder / "evaluations.jsonl").read_text().splitlines()[-1])
    steps = {step: at - began for step, at in step_times(folder / "metrics.jsonl").items()}
    return Run(steps, last["accuracy"])


def run_locally(folder: Path) -> Run:
    """Run the example to its end."""
    asyncrl = str(Path(sys.executable).parent / "asyncrl")
    command = [asyncrl, "run", str(EXAMPLES / "quickstart.yaml"), "--out", str(folder / "run")]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "HOME": str(folder)}
    began = time.time()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment, timeout=SECONDS)
    [metrics] = (folder / "run").rglob("metrics.jsonl")
    return read_run(metrics.parent, began)


class Watched(RunningJob):
    """The quickstart in pods, and when what happened."""

    def next_step(self, after: float) -> float:
        """Wait for a step, be it a repeated one; return when it was trained."""

        def later() -> list[float]:
            times = step_times(self.folder / "metrics.jsonl").values()
            return [at for at in times if at > after]

        return float(min(eventually("the next step", later, SECONDS)))

    def started_at(self, group: str, number: int = 0) -> float:
        """Return when the containers of a group's pod were started."""
        pod = sorted(self.pods(group), key=lambda each: str(each["metadata"]["name"]))[number]
        states = [each["state"]["running"]["startedAt"] for each in pod["status"]["containerStatuses"]]
        return min(datetime.fromisoformat(at).timestamp() for at in states)

    @contextmanager
    def listening_for(self, worker: str) -> Iterator[IO[str]]:
        """Give where the time of a worker's first trajectory will be told."""
        [trainer] = self.pods("trainer")
        code = LISTEN.format(worker=worker, seconds=SECONDS)
        command = ["exec", trainer["metadata"]["name"], "-c", "trainer", "--", "python3", "-c", code]
        with subprocess.Popen(
            ["kubectl", "-n", self.namespace, *command],
            env=self._nodes.environment,
            stdout=subprocess.PIPE,
            text=True,
        ) as listener:
            try:
                assert listener.stdout is not None
                assert listener.stdout.readline() == "listens\n", "nobody listens in the trainer's pod"
                yield listener.stdout
            finally:
                listener.terminate()


@contextmanager
def cluster(folder: Path) -> Iterator[NodeCluster]:
    """Provide two nodes with an operator."""
    nodes = NodeCluster(os.environ["KUBEUP"], folder / "cluster")
    operator: Operator | None = None
    try:
        nodes.start()
        if USES_IMAGES:
            operator = InstalledOperator(nodes)
        else:
            nodes.apply_crd(ROOT / "crds" / FILE_NAME)
            images = {"ASYNCRL_RUNTIME_IMAGE": HOST_IMAGE, "ASYNCRL_NATS_IMAGE": NATS_IMAGE}
            operator = OperatorProcess(grant_rights(nodes, folder), folder, **images)
        operator.start()
        yield nodes
    finally:
        if operator is not None:
            operator.kill()
        nodes.stop()


def run_in_pods(nodes: NodeCluster) -> Run:
    """Run the example to its end."""
    with making_namespace(nodes) as namespace:
        prepare(nodes, namespace)
        job = Watched(nodes, namespace)
        began = time.time()
        job.apply()
        while job.condition("Finished")["status"] != "True":
            assert time.time() < began + SECONDS, job.describe()
            time.sleep(5)  # each look takes a tenth of a second of a core
        return read_run(job.folder, began)


def disturb(nodes: NodeCluster) -> None:
    """Kill, suspend, resume and grow a job that trains."""
    with making_namespace(nodes) as namespace:
        prepare(nodes, namespace)
        job = Watched(nodes, namespace)
        job.apply(
            training={"maxSteps": 100_000},
            evaluation={"samples": 50, "everySteps": 100_000},
            checkpoint={"everySteps": 20},
        )
        job.wait_for_step(30, SECONDS)
        [trainer] = job.pods("trainer")
        killed = time.time()
        nodes.kill_process(trainer["spec"]["nodeName"], "asyncrl_runtime.main rank")
        again = job.next_step(killed + 1) - killed  # one may have been under way
        job.wait_for_step(job.trained() + 20, SECONDS)

        asked = time.time()
        job.patch({"suspend": True})
        eventually("no pod is left", lambda: not job.names("pods"), SECONDS)
        print(f"suspend to zero pods: {time.time() - asked:.1f} s (grace {GRACE_SECONDS} s)")
        asked = time.time()
        job.patch({"suspend": False})
        resumed = job.next_step(asked)
        cold = resumed - job.started_at("trainer")
        print(f"resume to the next step: {resumed - asked:.1f} s; its pod's start to that step: {cold:.1f} s")
        print(f"SIGKILL of the trainer to the next step: {again:.1f} s, {again / cold:.2f} x that start")

        grow(job)


def grow(job: Watched) -> None:
    """Ask for a third engine, and wait for its first trajectory."""
    name = f"{job.name}-rollout-2"
    with job.listening_for(name) as told:
        asked = time.time()
        job.kubectl("scale", "arl", job.name, "--replicas=4")
        first = float(told.readline())
    pod = eventually("it is ready", lambda: job.ready_pods("rollout").get(name), SECONDS)
    cold = ready_at(pod) - job.started_at("rollout", 2)
    print(f"a third engine: asked for to its first trajectory {first - asked:.1f} s;", end=" ")
    print(f"its containers' start to ready {cold:.1f} s")


def main() -> None:
    if reason := why_no_nodes():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        local = run_locally(folder)
        print(f"locally: first step {local.steps[1]:.1f} s, {local.rate:.1f} steps/min", flush=True)
        with cluster(folder) as nodes:
            pods = run_in_pods(nodes)
            reach = 1.25 * local.steps[1] + 10
            first = f"{pods.steps[1]:.1f} s, locally {local.steps[1]:.1f} s (reach {reach:.1f} s)"
            print(f"to the first step: {first}")
            print(f"steps/min: {pods.rate:.1f}, locally {local.rate:.1f}: {pods.rate / local.rate:.2f} x")
            print(f"held-out accuracy: {pods.accuracy:.1%}, locally {local.accuracy:.1%}", flush=True)
            disturb(nodes)


if __name__ == "__main__":
    main()
