"""What the operator writes is in its caches at once, and is looked at as if a watch had told it."""

from typing import Any, cast

from asyncrl_operator.api_server.cluster import Cluster
from asyncrl_operator.resources import JOB_LABEL, JOB_UID_LABEL, STATEFUL_SETS
from asyncrl_operator.workqueue import Key


class Answers:
    """An API that answers every apply with one object."""

    def __init__(self, live: dict[str, Any]) -> None:
        self._live = live

    async def apply(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._live


async def test_a_job_is_looked_at_again_after_a_write_for_it() -> None:
    """The watch tells nothing new of it then; without this an update would stop after its first write."""
    woken: list[Key] = []

    def wake(key: Key, *, at_once: bool = False) -> None:
        woken.append(key)

    metadata = {
        "namespace": "team",
        "name": "gsm8k-rollout",
        "uid": "u1",
        "resourceVersion": "7",
        "labels": {JOB_LABEL: "gsm8k", JOB_UID_LABEL: "u0"},
    }
    live = {"kind": "StatefulSet", "metadata": metadata, "spec": {"replicas": 2}}
    cluster = Cluster(cast(Any, Answers(live)), (), wake, lambda: 0.0)
    await cluster.correct(live, "u1")
    assert woken == [Key("team", "gsm8k")]
    assert cluster.child(STATEFUL_SETS, "team", "gsm8k-rollout") is not None
    await cluster.correct(live, "u1")
    assert len(woken) == 1, "the same again is no news"


async def test_what_is_not_watched_is_not_kept() -> None:
    """Nothing would tell of its end."""
    live = {"kind": "StatefulSet", "metadata": {"namespace": "team", "name": "gsm8k-nats", "uid": "u1"}}
    cluster = Cluster(cast(Any, Answers(live)), (), lambda key, *, at_once=False: None, lambda: 0.0)
    await cluster.correct(live, "u1")
    assert cluster.child(STATEFUL_SETS, "team", "gsm8k-nats") is None
