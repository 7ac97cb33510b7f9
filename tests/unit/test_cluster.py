"""What the operator writes is in its caches at once, and each write is of the object that was meant."""

from typing import Any

import pytest

from asyncrl_operator.api_server.api import Api, ApiError
from asyncrl_operator.api_server.cluster import Cluster
from asyncrl_operator.api_server.refusals import Gone, Obstacle
from asyncrl_operator.resources import (
    ASYNCRL_JOBS,
    CONFIG_MAPS,
    EVENTS,
    JOB_LABEL,
    JOB_UID_LABEL,
    SECRETS,
    SERVICES,
    STATEFUL_SETS,
    Json,
    Resource,
)
from asyncrl_operator.workqueue import Key
from support.cluster.api_calls import Request
from support.cluster.memory_api_client import MemoryApiClient
from support.cluster.memory_api_server import NAMESPACES, MemoryApiServer
from support.cluster.operator_process import make_job
from support.cluster.whole_operator import CRD

KEY = Key("team", "gsm8k")


class Scene:
    """The cluster as an operator sees it, and the server; no watch runs."""

    def __init__(self) -> None:
        self.woken: list[Key] = []
        self.calls: list[str] = []
        self.server = MemoryApiServer(CRD, lambda: 1_800_000_000.0)
        self.server.store(NAMESPACES, {"metadata": {"name": "team", "uid": "n1"}})
        self.api = Api(MemoryApiClient(self.server), lambda verb, what, status: self.calls.append(verb))
        self.cluster = Cluster(self.api, (), self._wake, lambda: 0.0)
        self.job = self.ask("POST", ASYNCRL_JOBS.path("team"), make_job("gsm8k"))
        self.uid: str = self.job["metadata"]["uid"]
        self.cluster.take_job("ADDED", self.job)
        self.woken.clear()

    def _wake(self, key: Key, *, at_once: bool = False) -> None:
        self.woken.append(key)

    def ask(self, verb: str, path: str, body: Json | None = None, kind: str = "application/json") -> Json:
        """Make a call as somebody else."""
        status, answer = self.server.answer(Request(verb, path, {"fieldManager": "user"}, body or {}, kind))
        assert status < 400, answer
        return answer

    def manifest(self, resource: Resource, name: str = "gsm8k-x", **more: Any) -> Json:
        """Return an object as the operator renders it."""
        owner = {"apiVersion": ASYNCRL_JOBS.api_version, "kind": ASYNCRL_JOBS.kind, "name": "gsm8k"}
        metadata = {
            "namespace": "team",
            "name": name,
            "labels": {JOB_LABEL: "gsm8k", JOB_UID_LABEL: self.uid},
            "ownerReferences": [owner | {"uid": self.uid, "controller": True}],
        }
        kind = {"apiVersion": resource.api_version, "kind": resource.kind}
        return kind | {"metadata": metadata} | more

    def live(self, resource: Resource, name: str = "gsm8k-x") -> Json:
        return self.ask("GET", resource.path("team", name))


async def test_a_job_is_looked_at_again_after_a_write_for_it() -> None:
    """The watch brings no news of the write then; without this an update would stop after its first write."""
    scene = Scene()
    wanted = scene.manifest(STATEFUL_SETS, spec={"replicas": 2})
    assert await scene.cluster.make(wanted, scene.uid)
    assert scene.woken == [KEY]
    entry = scene.cluster.child(STATEFUL_SETS, "team", "gsm8k-x")
    assert entry is not None
    await scene.cluster.correct(wanted, entry.uid)
    assert len(scene.woken) == 1, "the same again is no news"
    await scene.cluster.scale("team", "gsm8k-x", 3)
    assert len(scene.woken) == 2 and scene.live(STATEFUL_SETS)["spec"]["replicas"] == 3


async def test_what_is_not_watched_is_not_kept() -> None:
    """Without a watch nothing would tell of the object's end."""
    scene = Scene()
    wanted = scene.manifest(STATEFUL_SETS, spec={"replicas": 2})
    del wanted["metadata"]["labels"]
    await scene.cluster.make(wanted, scene.uid)
    assert scene.cluster.child(STATEFUL_SETS, "team", "gsm8k-x") is None


@pytest.mark.parametrize("immutable", [False, True])
async def test_one_of_ours_that_has_lost_its_labels_gets_them_back(immutable: bool) -> None:
    scene = Scene()
    fields: dict[str, Any] = {"immutable": True} if immutable else {}
    wanted = scene.manifest(CONFIG_MAPS, data={"a": "1"}, **fields)
    older = wanted | {"data": {"a": "0"}, "metadata": {**wanted["metadata"], "labels": {}}}
    made = scene.ask("POST", CONFIG_MAPS.path("team"), older)
    assert not await scene.cluster.make(wanted, scene.uid), "it was there"
    live = scene.live(CONFIG_MAPS)
    assert live["metadata"]["labels"] == wanted["metadata"]["labels"]
    assert live["data"] == {"a": "0" if immutable else "1"}, "what is made once stays as it was made"
    assert live["metadata"]["uid"] == made["metadata"]["uid"]
    assert scene.cluster.child(CONFIG_MAPS, "team", "gsm8k-x") is not None


async def test_one_that_is_not_ours_is_not_taken_over() -> None:
    scene = Scene()
    theirs = scene.ask("POST", SERVICES.path("team"), {"metadata": {"name": "gsm8k-x"}, "spec": {"a": 1}})
    with pytest.raises(Obstacle) as obstacle:
        await scene.cluster.make(scene.manifest(SERVICES, spec={"a": 2}), scene.uid)
    assert obstacle.value.problem.reason == "NameConflict" and obstacle.value.needs_user
    assert scene.live(SERVICES) == theirs


async def test_one_of_an_earlier_job_of_the_name_is_waited_for() -> None:
    scene = Scene()
    theirs = scene.manifest(SERVICES)
    theirs["metadata"]["ownerReferences"][0]["uid"] = "earlier"
    scene.ask("POST", SERVICES.path("team"), theirs)
    with pytest.raises(Obstacle) as obstacle:
        await scene.cluster.make(scene.manifest(SERVICES), scene.uid)
    assert obstacle.value.problem.reason == "WaitingForPredecessor" and not obstacle.value.needs_user


async def test_a_secret_is_made_and_never_read() -> None:
    scene = Scene()
    secret = scene.manifest(SECRETS, stringData={"p": "1"})
    assert await scene.cluster.make(secret, scene.uid)
    assert not await scene.cluster.make(secret | {"stringData": {"p": "2"}}, scene.uid)
    assert scene.live(SECRETS)["stringData"] == {"p": "1"} and scene.calls == ["create", "create"]


async def test_a_correction_of_one_that_was_replaced_touches_the_other_not() -> None:
    scene = Scene()
    wanted = scene.manifest(CONFIG_MAPS, data={"a": "1"})
    await scene.cluster.make(wanted, scene.uid)
    entry = scene.cluster.child(CONFIG_MAPS, "team", "gsm8k-x")
    assert entry is not None
    scene.ask("DELETE", CONFIG_MAPS.path("team", "gsm8k-x"))
    with pytest.raises(ApiError) as error:
        await scene.cluster.correct(wanted, entry.uid)
    assert error.value.status == 409, "gone"
    theirs = scene.ask("POST", CONFIG_MAPS.path("team"), {"metadata": {"name": "gsm8k-x"}})
    with pytest.raises(ApiError) as error:
        await scene.cluster.correct(wanted, entry.uid)
    assert error.value.status == 422, "replaced"
    await scene.cluster.delete(CONFIG_MAPS, "team", "gsm8k-x", entry.uid)
    assert scene.live(CONFIG_MAPS) == theirs, "nor is it deleted"


async def test_nothing_is_made_for_a_job_that_is_gone_or_was_made_anew() -> None:
    scene = Scene()
    await scene.cluster.verify(KEY, scene.uid)
    with pytest.raises(Gone):
        await scene.cluster.verify(KEY, "earlier")
    scene.ask("DELETE", ASYNCRL_JOBS.path("team", "gsm8k"))
    with pytest.raises(Gone):
        await scene.cluster.verify(KEY, scene.uid)
    assert scene.cluster.jobs.get(*KEY) is None and scene.woken[-1] == KEY


async def test_a_status_is_written_against_the_job_as_it_was_read() -> None:
    scene = Scene()
    entry = scene.cluster.jobs.get(*KEY)
    assert entry is not None
    written = await scene.cluster.write_status(entry, {"phase": "Pending"})
    assert written.version > entry.version and scene.cluster.jobs.get(*KEY) == written
    patch = {"spec": {"suspend": True}}
    scene.ask("PATCH", ASYNCRL_JOBS.path("team", "gsm8k"), patch, "application/merge-patch+json")
    with pytest.raises(ApiError) as error:
        await scene.cluster.write_status(written, {"phase": "Starting"})
    assert error.value.status == 409
    fresh = scene.cluster.jobs.get(*KEY)
    assert fresh is not None and b'"suspend":true' in fresh.value, "it is read anew for the next pass"
    await scene.cluster.write_status(fresh, {"phase": "Starting"})
    scene.ask("DELETE", ASYNCRL_JOBS.path("team", "gsm8k"))
    with pytest.raises(Gone):
        await scene.cluster.write_status(fresh, {"phase": "Running"})
    assert scene.cluster.jobs.get(*KEY) is None


async def test_the_uid_of_a_child_is_asked_for_where_no_cache_has_it() -> None:
    scene = Scene()
    assert await scene.cluster.uid_of(SERVICES, "team", "gsm8k-x", owner=scene.uid) == ""
    made = scene.ask("POST", SERVICES.path("team"), scene.manifest(SERVICES))
    assert await scene.cluster.uid_of(SERVICES, "team", "gsm8k-x", owner=scene.uid) == made["metadata"]["uid"]
    assert await scene.cluster.uid_of(SERVICES, "team", "gsm8k-x", owner="another") == ""


async def test_the_newest_event_counts_and_all_pages_are_read() -> None:
    scene = Scene()
    for number in range(501):
        about = {"kind": "Job", "name": "x" if number % 2 else "y"}
        body: Json = {
            "metadata": {"name": f"e{number:03}"},
            "involvedObject": about,
            "reason": "FailedCreate",
        }
        at = {"lastTimestamp": f"2026-01-01T00:00:{number % 60:02}Z"}
        scene.ask("POST", EVENTS.path("team"), body | at | {"message": f"m{number}"})
    scene.ask("POST", EVENTS.path("team"), body | {"metadata": {"name": "z"}, "reason": "Other"})
    found = await scene.cluster.last_events("team", "FailedCreate")
    assert found == {("Job", "x"): "m479", ("Job", "y"): "m478"}
    assert scene.calls == ["list", "list"]


async def test_whether_an_object_exists_is_asked() -> None:
    scene = Scene()
    assert not await scene.cluster.exists(CONFIG_MAPS, "team", "code")
    scene.ask("POST", CONFIG_MAPS.path("team"), {"metadata": {"name": "code"}})
    assert await scene.cluster.exists(CONFIG_MAPS, "team", "code")
