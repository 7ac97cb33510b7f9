"""Engines get another image while training goes on."""

import json
import re

import pytest

from support.cluster.nodes import HOST_IMAGE, RUNTIME_IMAGE, USES_IMAGES, NodeCluster
from support.cluster.operator_process import eventually
from support.cluster.running_job import RunningJob

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600, func_only=True)]

OLD = RUNTIME_IMAGE if USES_IMAGES else HOST_IMAGE
NEW = f"{OLD.rpartition(':')[0]}:next"


def images(job: RunningJob) -> list[str]:
    """Return the images of the engines that are ready."""
    return [pod["spec"]["containers"][0]["image"] for pod in job.ready_pods("rollout").values()]


def test_engines_are_replaced_one_by_one_and_no_sample_is_lost(nodes: NodeCluster, job: RunningJob) -> None:
    nodes.tag_image(OLD, NEW)
    job.apply(
        training={"maxSteps": 5000},
        evaluation={"samples": 50, "everySteps": 5000},
        checkpoint={"everySteps": 100},
    )
    job.wait_for_step(3)
    eventually("both engines are ready", lambda: images(job) == [OLD, OLD])
    job.patch({"rollout": {"engine": {"image": NEW}}})

    fewest = 2

    def are_replaced() -> bool:
        nonlocal fewest
        found = images(job)
        fewest = min(fewest, len(found))
        return found == [NEW, NEW]

    eventually("both have the new image", are_replaced, 180)
    assert fewest == 1, "one at a time, so there was always one"
    job.wait_for_step(job.trained() + 3)
    assert job.names("jobs") == ["quickstart-trainer-1"], "the trainer took no pause"
    lines = (job.folder / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line)["staleness_max"] for line in lines) <= 4
    assert re.search(r"missing 0  twice 0", job.audit())
