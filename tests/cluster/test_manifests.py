"""The objects of a job on a real API server, in a namespace at the restricted pod security level."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from asyncrl_api.job import AsyncRLJob
from asyncrl_operator.compare import first_difference
from asyncrl_operator.render.quantities import canonical_quantity
from support.cluster.control_plane import Cluster
from support.manifests.rendered_jobs import SHAPES, SPELLINGS, job_of, render_all

pytestmark = pytest.mark.e2e

DEADLINE_SECONDS = 60

Objects = list[dict[str, Any]]


def make_owner(cluster: Cluster, namespace: str, shape: str) -> AsyncRLJob:
    """Return the job as it is in the cluster, with its UID."""
    owner = job_of(shape, namespace=namespace).model_dump(by_alias=True, exclude_none=True)
    del owner["metadata"]["uid"]
    cluster.apply(owner, namespace=namespace)
    return job_of(shape, namespace=namespace, uid=cluster.get(namespace, "arl", "gsm8k")["metadata"]["uid"])


def apply_all(cluster: Cluster, namespace: str, objects: Objects, *more: str) -> Objects:
    """Apply as the operator does; return what the API server has then."""
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    how = ["apply", "--server-side", "--force-conflicts", "--field-manager=asyncrl-operator", *more]
    done: Objects = json.loads(cluster.kubectl("-n", namespace, *how, "-o", "json", "-f", "-", stdin=text))[
        "items"
    ]
    return done


def wait_until(what: Callable[[], object]) -> bool:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (found := what()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return bool(found)


def resource_versions(objects: Objects) -> dict[str, str]:
    return {
        f"{each['kind']}/{each['metadata']['name']}": each["metadata"]["resourceVersion"] for each in objects
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_all_are_accepted_and_their_pods_made(cluster: Cluster, namespace: str, shape: str) -> None:
    """A dry run sees what an API server refuses; only pods show what the security level does."""
    objects = render_all(make_owner(cluster, namespace, shape))
    assert len(apply_all(cluster, namespace, objects, "--dry-run=server")) == len(objects)
    apply_all(cluster, namespace, objects)
    wanted = 2 + (shape != "shared-nats") + (2 if shape == "two-nodes" else 1)
    ours = "app.kubernetes.io/managed-by=asyncrl-operator"
    are_made = wait_until(lambda: len(cluster.list(namespace, "pods", ours)) == wanted)
    events = cluster.kubectl("-n", namespace, "get", "events", "--field-selector=reason=FailedCreate")
    assert are_made, events


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_there_is_what_was_rendered_and_a_second_apply_changes_nothing(
    cluster: Cluster, namespace: str, shape: str
) -> None:
    """Controllers write status meanwhile, so two applies in a row must come that find nothing to do."""
    objects = render_all(make_owner(cluster, namespace, shape))
    live = apply_all(cluster, namespace, objects)
    for wanted, found in zip(objects, live, strict=True):
        if wanted["kind"] != "Secret":  # the operator does not read it
            body = {name: value for name, value in wanted.items() if name not in ("apiVersion", "kind")}
            assert first_difference(body, found) == "", f"{wanted['kind']} {wanted['metadata']['name']}"

    def changes_nothing() -> bool:
        first, second = (resource_versions(apply_all(cluster, namespace, objects)) for _ in range(2))
        return first == second

    assert wait_until(changes_nothing), "every apply writes"


def test_quantities_are_stored_as_they_are_sent(cluster: Cluster) -> None:
    sent = [canonical_quantity(written) for written in SPELLINGS]
    containers = [
        {"name": f"c{number}", "image": "none", "resources": {"limits": {"memory": memory}}}
        for number, memory in enumerate(sent)
    ]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "quantities", "namespace": "default"},  # only asked about, hence at no level
        "spec": {"containers": containers},
    }
    text = cluster.kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", stdin=json.dumps(pod))
    stored = [each["resources"]["limits"]["memory"] for each in json.loads(text)["spec"]["containers"]]
    assert stored == sent
