"""The operator on a real control plane with fake nodes: how quick, how large, how quiet.

- one apply to the rollout StatefulSet, trainer Job and Services present, operator idle: percentiles of 100;
- N jobs applied at once, ten pods each: until all run; the operator's memory; its API calls per job. What the
  control plane alone needs is measured with `--baseline`: the same objects, applied without an operator;
- N running jobs whose reports change every 30 s, for a while: its CPU, its status writes;
- the same with reports that do not change: status writes;
- a fresh operator over the N unchanged jobs: until all are reconciled, and its writes.

    python tests/bench/bench_operator.py [--jobs 100] [--steady 120] [--baseline]

needs KUBEUP and KUBEBUILDER_ASSETS.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))
from asyncrl_api.crdgen import FILE_NAME
from asyncrl_api.report import Report
from support.cluster.control_plane import Cluster, why_not
from support.cluster.operator_process import (
    OperatorProcess,
    eventually,
    grant_rights,
    make_claim,
    make_job,
    running_operator,
)

ROOT = Path(__file__).parents[2]
GROUP = "/apis/asyncrl.dev/v1alpha1"
JOBS_PER_NAMESPACE = 50
"""Some costs grow with a namespace: who may grant a Role is looked up in all its RoleBindings."""
PODS_PER_JOB = 10
PODS_PER_NODE = 100
BUDGET = {"total": 9, "allocation": "None", "mode": "Manual", "split": {"trainer": 1, "rollout": 8}}


def home_of(number: int) -> str:
    """Return the namespace of a job."""
    return f"bench-{number // JOBS_PER_NAMESPACE}"


class Jobs:
    """The API over one connection per thread."""

    def __init__(self, url: str) -> None:
        limits = httpx.Limits(max_connections=16)
        self.http = httpx.Client(base_url=url, timeout=60, trust_env=False, limits=limits)

    def create(self, name: str, namespace: str) -> None:
        # Its pods stay unbound without the claim; fake nodes run what the scheduler places.
        job = make_job(name, gpuBudget=BUDGET)
        answer = self.http.post(f"{GROUP}/namespaces/{namespace}/asyncrljobs", json=job)
        answer.raise_for_status()

    def exists(self, path: str) -> bool:
        return self.http.get(path).status_code == 200

    def phases(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        token = ""
        while True:
            query: dict[str, str | int] = {"limit": 500, "continue": token}
            page = self.http.get(f"{GROUP}/asyncrljobs", params=query).json()
            for item in page["items"]:
                phase = item.get("status", {}).get("phase", "")
                counts[phase] = counts.get(phase, 0) + 1
            if not (token := page["metadata"].get("continue", "")):
                return counts

    def report(self, number: int, step: int) -> None:
        """Write a report as the trainer does."""
        report = Report(
            attempt=1,
            step=step,
            max_steps=200,
            state="Training",
            reward=0.5,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        body = {"data": {"report": report.model_dump_json(by_alias=True, exclude_none=True)}}
        path = f"/api/v1/namespaces/{home_of(number)}/configmaps/job-{number}-report"
        headers = {"Content-Type": "application/merge-patch+json"}
        self.http.patch(path, content=json.dumps(body), headers=headers).raise_for_status()


def measure_latency(jobs: Jobs, count: int) -> list[float]:
    """Return seconds from an apply to all of the job's groups being there, one job after the other."""
    seconds = []
    for number in range(count):
        name = f"lat-{number}"
        root = f"namespaces/{home_of(0)}"
        paths = [
            f"/apis/apps/v1/{root}/statefulsets/{name}-rollout",
            f"/apis/batch/v1/{root}/jobs/{name}-trainer-1",
            f"/api/v1/{root}/services/{name}-trainer",
            f"/api/v1/{root}/services/{name}-rollout",
        ]
        began = time.monotonic()
        jobs.create(name, home_of(0))
        while paths:
            time.sleep(0.005)
            paths = [path for path in paths if not jobs.exists(path)]
        seconds.append(time.monotonic() - began)
        time.sleep(0.3)  # the operator is idle before each
    return seconds


def delete_all(cluster: Cluster, jobs: Jobs) -> None:
    cluster.kubectl("-n", home_of(0), "delete", "arl", "--all", "--wait=false")
    path = f"/api/v1/namespaces/{home_of(0)}/pods"
    eventually("all pods are gone", lambda: not jobs.http.get(path, params={"limit": 1}).json()["items"], 900)


def bring_up(jobs: Jobs, count: int) -> float:
    """Make `count` jobs at once; return seconds until all run."""
    began = time.monotonic()
    for number in range(count):
        jobs.create(f"job-{number}", home_of(number))
    shown = 0.0
    while (running := jobs.phases().get("Running", 0)) < count:
        assert time.monotonic() - began < 3600, jobs.phases()
        if time.monotonic() - shown > 30:
            print(f"  {running} of {count} run after {time.monotonic() - began:.0f} s", flush=True)
            shown = time.monotonic()
        time.sleep(min(5.0, 0.005 * count))  # a look at all jobs is work for the API server, too
    return time.monotonic() - began


def rss(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / 2**20


def watch_steady(
    operator: OperatorProcess, process: psutil.Process, jobs: Jobs, count: int, seconds: float, changes: bool
) -> tuple[float, float]:
    """Return the operator's share of a core, and its writes, while reports come every 30 s."""
    ended = threading.Event()

    def send() -> None:
        step = 1
        while not ended.is_set():
            began = time.monotonic()
            for number in range(count):
                jobs.report(number, step if changes else 1)
                if ended.wait(max(0.0, began + 30 * (number + 1) / count - time.monotonic())):
                    return
            step += 1

    sender = threading.Thread(target=send)
    sender.start()
    time.sleep(35)  # the first reports are news in any case
    cpu, writes, began = sum(process.cpu_times()[:2]), operator.num_writes(), time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - began
    result = (sum(process.cpu_times()[:2]) - cpu) / passed, operator.num_writes() - writes
    ended.set()
    sender.join()
    return result


@contextmanager
def control_plane(count: int) -> Iterator[tuple[Cluster, str, Path]]:
    """Give a fresh control plane with room for the pods of so many jobs, a proxy to it, and a folder."""
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(os.environ["KUBEUP"], Path(folder) / "cluster")
        try:
            cluster.start(max(4, count * PODS_PER_JOB // PODS_PER_NODE + 2))
            cluster.apply_crd(ROOT / "crds" / FILE_NAME)
            for namespace in dict.fromkeys(home_of(number) for number in range(count)):
                cluster.kubectl("create", "namespace", namespace)
                cluster.apply(*make_claim(namespace))
            with cluster.proxy() as url:
                yield cluster, url, Path(folder)
        finally:
            cluster.stop()


def measure_baseline(cluster: Cluster, jobs: Jobs, folder: Path, count: int) -> float:
    """Return seconds until the pods of the same objects run without an operator: what the cluster needs.

    Objects are those of a job that runs, made job by job as quickly as they are taken.
    """
    with running_operator(grant_rights(cluster, folder), folder):
        jobs.create("pattern", home_of(0))
        eventually("it runs", lambda: jobs.phases().get("Running", 0) == 1, 60)
        objects = children_of(cluster)
    began = time.monotonic()
    for number in range(count):
        for path, text in objects:
            body = json.loads(text.replace("pattern", f"base-{number}"))
            answer = jobs.http.post(path.replace(home_of(0), home_of(number)), json=body)
            assert answer.status_code in (201, 409), answer.text
    while _count_running(jobs) < (count + 1) * PODS_PER_JOB:
        assert time.monotonic() - began < 3600
        time.sleep(2)
    return time.monotonic() - began


def _count_running(jobs: Jobs) -> int:
    path, token, count = "/api/v1/pods", "", 0
    while True:
        query = {"fieldSelector": "status.phase=Running", "limit": "2000", "continue": token}
        page = jobs.http.get(path, params=query).json()
        count += len(page["items"])
        if not (token := page["metadata"].get("continue", "")):
            return count


def children_of(cluster: Cluster) -> list[tuple[str, str]]:
    """Return path and text of all objects of a job called `pattern` that runs, without its owner."""
    found = []
    kinds = {
        "serviceaccounts": "/api/v1",
        "configmaps": "/api/v1",
        "services": "/api/v1",
        "roles": "/apis/rbac.authorization.k8s.io/v1",
        "rolebindings": "/apis/rbac.authorization.k8s.io/v1",
        "poddisruptionbudgets": "/apis/policy/v1",
        "networkpolicies": "/apis/networking.k8s.io/v1",
        "statefulsets": "/apis/apps/v1",
        "jobs": "/apis/batch/v1",
    }
    for plural, root in kinds.items():
        path = f"{root}/namespaces/{home_of(0)}/{plural}"
        for item in cluster.list(home_of(0), plural, "asyncrl.dev/job=pattern"):
            meta = item["metadata"]
            item["metadata"] = {name: meta[name] for name in ("name", "labels") if name in meta}
            item["metadata"]["labels"]["asyncrl.dev/job-uid"] = "pattern"
            item.pop("status", None)
            spec = item.get("spec", {})
            for label in spec.get("selector", {}), spec.get("selector", {}).get("matchLabels", {}):
                if "asyncrl.dev/job-uid" in label:
                    label["asyncrl.dev/job-uid"] = "pattern"
            if "template" in spec:
                spec["template"]["metadata"]["labels"]["asyncrl.dev/job-uid"] = "pattern"
            if plural == "jobs":
                spec.pop("selector", None)
                labels = spec["template"]["metadata"]["labels"]
                for name in list(labels):
                    if name.startswith(("batch.kubernetes.io", "controller-uid", "job-name")):
                        del labels[name]
            found.append((path, json.dumps(item)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--latencies", type=int, default=100)
    parser.add_argument("--steady", type=float, default=120.0, help="Seconds of each steady state.")
    parser.add_argument("--baseline", action="store_true", help="Measure the control plane alone first.")
    options = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)
    alone = 0.0
    if options.baseline:
        with control_plane(options.jobs) as (cluster, url, folder):
            alone = measure_baseline(cluster, Jobs(url), folder, options.jobs)
        print(f"control plane alone, {options.jobs} jobs: {alone:.0f} s", flush=True)
    with control_plane(options.jobs) as (cluster, url, folder):
        rights = grant_rights(cluster, folder)
        if options.latencies:
            with running_operator(rights, folder):
                show_latency(cluster, Jobs(url), options.latencies)
        show_many(Jobs(url), rights, folder, options, alone)


def show_latency(cluster: Cluster, jobs: Jobs, count: int) -> None:
    seconds = sorted(measure_latency(jobs, count))
    p99 = seconds[min(count - 1, round(0.99 * count) - 1)]
    print(
        f"apply to all groups present: median {statistics.median(seconds):.3f} s, p99 {p99:.3f} s", flush=True
    )
    delete_all(cluster, jobs)


def show_many(jobs: Jobs, rights: Path, folder: Path, options: argparse.Namespace, alone: float) -> None:
    count = options.jobs
    with running_operator(rights, folder) as operator:
        process, before = psutil.Process(operator.pid), operator.num_calls()
        idle = sum(process.cpu_times()[:2])
        took = bring_up(jobs, count)
        busy = sum(process.cpu_times()[:2]) - idle
        ratio = f", {took / alone:.2f} x the control plane alone" if alone else ""
        print(f"{count} jobs applied at once: all Running after {took:.0f} s{ratio}")
        per_job = (operator.num_calls() - before) / count
        print(
            f"  operator: {rss(process):.0f} MiB, {per_job:.1f} API calls per job, {busy:.0f} s of CPU",
            flush=True,
        )
        for changes in (True, False):
            share, writes = watch_steady(operator, process, jobs, count, options.steady, changes)
            what = "change" if changes else "do not change"
            text = f"reports every 30 s that {what}, for {options.steady:.0f} s: {share:.2f} core"
            print(f"{text}, {writes:.0f} writes, {rss(process):.0f} MiB", flush=True)
    with running_operator(rights, folder) as operator:
        process = psutil.Process(operator.pid)
        passes = "asyncrl_reconcile_duration_seconds_count"
        eventually("all are reconciled", lambda: operator.metrics()[passes] >= count, 300)
        took, writes = time.time() - process.create_time(), operator.num_writes()
        print(
            f"fresh operator, {count} unchanged jobs: all reconciled after {took:.1f} s, {writes:.0f} writes"
        )
        print(f"  operator: {rss(process):.0f} MiB")


if __name__ == "__main__":
    main()
