"""The objects of a job on a real API server, in a namespace at the restricted pod security level."""

import json
import time
from typing import Any

import pytest

from kube_fixture import Cluster
from rendered_jobs import SHAPES, job_of, render_all

pytestmark = pytest.mark.e2e


def apply_all(cluster: Cluster, namespace: str, objects: list[dict[str, Any]]) -> str:
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    how = ["apply", "--server-side", "--force-conflicts", "--field-manager=asyncrl-operator"]
    return cluster.kubectl("-n", namespace, *how, "-o", "json", "-f", "-", stdin=text)


def versions(applied: str) -> dict[str, str]:
    items = json.loads(applied)["items"]
    return {f"{each['kind']}/{each['metadata']['name']}": each["metadata"]["uid"] for each in items} | {
        f"{each['kind']}/{each['metadata']['name']} generation": str(each["metadata"].get("generation"))
        for each in items
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_all_are_accepted_twice_and_their_pods_made(cluster: Cluster, namespace: str, shape: str) -> None:
    owner = job_of("cpu", namespace=namespace).model_dump(by_alias=True, exclude_none=True)
    del owner["metadata"]["uid"]
    cluster.apply(owner, namespace=namespace)
    uid = cluster.get(namespace, "arl", "gsm8k")["metadata"]["uid"]
    objects = render_all(job_of(shape, namespace=namespace, uid=uid))
    first = apply_all(cluster, namespace, objects)
    assert versions(apply_all(cluster, namespace, objects)) == versions(first)
    wanted = 2 + (shape != "shared-nats") + (2 if shape == "two-nodes" else 1)
    deadline = time.monotonic() + 60
    pods: list[dict[str, Any]] = []
    while time.monotonic() < deadline:
        pods = cluster.list(namespace, "pods", "app.kubernetes.io/managed-by=asyncrl-operator")
        if len(pods) == wanted:
            break
        time.sleep(0.2)
    events = cluster.kubectl("-n", namespace, "get", "events", "--field-selector=reason=FailedCreate")
    assert len(pods) == wanted, events
