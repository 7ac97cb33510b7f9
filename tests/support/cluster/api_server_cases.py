"""What the operator relies on in an API server, asked through its own client.

The same cases run against the API server in memory, which unit tests use, and against a real one, by which it
is judged.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from asyncrl_operator.api_server.api import Api, ApiError
from asyncrl_operator.api_server.cluster import NO_OBJECT
from asyncrl_operator.api_server.refusals import is_namespace_ending, obstacle_from
from asyncrl_operator.api_server.schema import OPENAPI_PATH, schema_problem
from asyncrl_operator.resources import (
    ASYNCRL_JOBS,
    CONFIG_MAPS,
    EVENTS,
    JOBS,
    PODS,
    SECRETS,
    STATEFUL_SETS,
    Json,
)
from support.cluster.memory_api_server import NAMESPACES, QUOTAS
from support.cluster.operator_process import make_job

Case = Callable[[Api, str], Coroutine[Any, Any, None]]
LABEL = "asyncrl.dev/job-uid"
CASES: list[Case] = []
QUOTA_TRIES = 100


def case(function: Case) -> Case:
    """Register a case; it gets a client, and a namespace of its own."""
    CASES.append(function)
    return function


def config_map(name: str = "one", **more: Any) -> Json:
    metadata = {"name": name} | more.pop("metadata", {})
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"a": "1"}} | more


def stateful_set(**spec: Any) -> Json:
    labels = {"app": "set"}
    container = {"name": "main", "image": "none:1"}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [container]}}
    base = {"serviceName": "set", "replicas": 0, "selector": {"matchLabels": labels}, "template": template}
    return {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "set"}, "spec": base | spec}


def pod(**spec: Any) -> Json:
    base = {
        "containers": [{"name": "main", "image": "none:1", "securityContext": CONFINED}],
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "schedulerName": "nobody",
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": base | spec}


CONFINED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


async def refused(call: Awaitable[Any]) -> ApiError:
    """Return the error with which a call is refused."""
    with pytest.raises(ApiError) as error:
        await call
    return error.value


def version(body: Json) -> str:
    return str(body["metadata"]["resourceVersion"])


# -- making and applying


@case
async def an_apply_makes_changes_and_leaves_alone(api: Api, ns: str) -> None:
    path = CONFIG_MAPS.path(ns, "one")
    made = await api.apply(path, config_map())
    assert made["metadata"]["uid"] and made["metadata"]["creationTimestamp"]
    assert version(await api.apply(path, config_map())) == version(made), "nothing has changed"
    changed = await api.apply(path, config_map(data={"a": "2"}))
    assert int(version(changed)) > int(version(made)) and changed["data"] == {"a": "2"}
    assert (await api.get(path))["data"] == {"a": "2"}
    assert changed["metadata"]["uid"] == made["metadata"]["uid"]


@case
async def what_is_applied_no_longer_goes_and_what_others_set_stays(api: Api, ns: str) -> None:
    path = CONFIG_MAPS.path(ns, "one")
    await api.apply(path, config_map(data={"a": "1", "b": "1"}, metadata={"labels": {"x": "1", "y": "1"}}))
    await as_somebody(api, path, {"data": {"c": "1"}, "metadata": {"annotations": {"z": "1"}}})
    live = await api.apply(path, config_map(data={"a": "1"}, metadata={"labels": {"x": "1"}}))
    assert live["data"] == {"a": "1", "c": "1"}
    assert live["metadata"]["labels"] == {"x": "1"} and live["metadata"]["annotations"] == {"z": "1"}


@case
async def what_another_has_changed_is_taken_back_and_then_left_out(api: Api, ns: str) -> None:
    path = CONFIG_MAPS.path(ns, "one")
    await api.apply(path, config_map())
    assert (await as_somebody(api, path, {"data": {"a": "2"}}))["data"] == {"a": "2"}
    assert (await api.apply(path, config_map()))["data"] == {"a": "1"}, "by force"
    live = await api.apply(path, config_map(data={"b": "1"}))
    assert live["data"] == {"b": "1"}, "it was ours alone again"


@case
async def what_another_has_changed_stays_when_it_is_no_longer_applied(api: Api, ns: str) -> None:
    path = CONFIG_MAPS.path(ns, "one")
    await api.apply(path, config_map())
    await as_somebody(api, path, {"data": {"a": "2"}})
    assert (await api.apply(path, config_map(data={"b": "1"})))["data"] == {"a": "2", "b": "1"}


@case
async def lists_are_merged_by_their_keys(api: Api, ns: str) -> None:
    path = STATEFUL_SETS.path(ns, "set")
    body = stateful_set()
    [container] = body["spec"]["template"]["spec"]["containers"]
    container |= {"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "1"}]}
    await api.apply(path, body)
    extra = {"name": "side", "image": "none:2"}
    live = await api.get(path)
    await as_somebody(api, path, {"spec": {"template": {"spec": {"containers": [*containers(live), extra]}}}})
    container["env"] = [{"name": "A", "value": "2"}]
    live = await api.apply(path, body)
    assert [each["name"] for each in containers(live)] == ["main", "side"]
    assert containers(live)[0]["env"] == [{"name": "A", "value": "2"}]


@case
async def owners_that_others_add_stay(api: Api, ns: str) -> None:
    path = CONFIG_MAPS.path(ns, "one")
    owners = [await api.apply(CONFIG_MAPS.path(ns, name), config_map(name)) for name in ("o1", "o2")]
    ours, theirs = ({"apiVersion": "v1", "kind": "ConfigMap", **_named(each)} for each in owners)
    await api.apply(path, config_map(metadata={"ownerReferences": [ours]}))
    await as_somebody(api, path, {"metadata": {"ownerReferences": [theirs, ours]}})
    live = await api.apply(path, config_map(data={"a": "2"}, metadata={"ownerReferences": [ours]}))
    uids = {each["uid"] for each in live["metadata"]["ownerReferences"]}
    assert uids == {ours["uid"], theirs["uid"]}


@case
async def an_apply_with_a_version_that_no_object_has_makes_and_never_takes_over(api: Api, ns: str) -> None:
    path = CONFIG_MAPS.path(ns, "one")
    body = config_map(metadata={"resourceVersion": NO_OBJECT})
    made = await api.apply(path, body)
    error = await refused(api.apply(path, body))
    assert (error.status, error.reason) == (409, "Conflict")
    assert version(await api.get(path)) == version(made)


@case
async def an_apply_to_an_object_that_has_been_replaced_is_refused(api: Api, ns: str) -> None:
    path = CONFIG_MAPS.path(ns, "one")
    old = await api.apply(path, config_map())
    await api.delete(path, uid=old["metadata"]["uid"], propagation="Background")
    body = config_map(data={"a": "2"}, metadata={"uid": old["metadata"]["uid"]})
    error = await refused(api.apply(path, body))
    assert (error.status, error.reason) == (409, "Conflict"), "it is gone"
    await api.apply(path, config_map())
    error = await refused(api.apply(path, body))
    assert (error.status, error.reason) == (422, "Invalid"), "another has its name"
    assert obstacle_from(error) is None, "no matter of the spec"
    assert (await api.get(path))["data"] == {"a": "1"}


@case
async def a_dry_run_keeps_nothing(api: Api, ns: str) -> None:
    path = CONFIG_MAPS.path(ns, "one")
    assert (await api.apply(path, config_map(), is_dry_run=True))["metadata"]["name"] == "one"
    assert (await refused(api.get(path))).status == 404
    made = await api.apply(path, config_map())
    dry = await api.apply(path, config_map(data={"a": "2"}), is_dry_run=True)
    assert dry["data"] == {"a": "2"}
    live = await api.get(path)
    assert live["data"] == {"a": "1"} and version(live) == version(made)


@case
async def a_create_makes_once(api: Api, ns: str) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "one"}, "data": {"p": "c2VjcmV0"}}
    made = await api.create(SECRETS.path(ns), secret)
    assert made["metadata"]["namespace"] == ns
    error = await refused(api.create(SECRETS.path(ns), secret))
    assert (error.status, error.reason) == (409, "AlreadyExists")
    assert error.message == 'secrets "one" already exists'


@case
async def a_merge_changes_what_it_names(api: Api, ns: str) -> None:
    path = CONFIG_MAPS.path(ns, "one")
    made = await api.apply(path, config_map(data={"a": "1", "b": "1"}))
    uid = made["metadata"]["uid"]
    live = await api.merge(path, {"metadata": {"uid": uid}, "data": {"a": None, "c": "1"}})
    assert live["data"] == {"b": "1", "c": "1"}
    assert version(await api.merge(path, {"data": {"c": "1"}})) == version(live), "nothing has changed"
    error = await refused(api.merge(path, {"metadata": {"uid": str(uuid.uuid4())}, "data": {"a": "1"}}))
    assert (error.status, error.reason) == (422, "Invalid") and obstacle_from(error) is None
    old = {"metadata": {"resourceVersion": version(made)}, "data": {"a": "1"}}
    error = await refused(api.merge(path, old))
    assert (error.status, error.reason) == (409, "Conflict")
    assert "the object has been modified" in error.message
    assert (await refused(api.merge(CONFIG_MAPS.path(ns, "none"), {}))).status == 404


@case
async def what_may_not_change_is_refused(api: Api, ns: str) -> None:
    await api.apply(STATEFUL_SETS.path(ns, "set"), stateful_set())
    changed = stateful_set(podManagementPolicy="Parallel")
    error = await refused(api.apply(STATEFUL_SETS.path(ns, "set"), changed))
    assert (error.status, error.reason) == (422, "Invalid")
    obstacle = obstacle_from(error)
    assert obstacle is not None and obstacle.problem.reason == "InvalidSpec" and obstacle.needs_user
    frozen = config_map(immutable=True)
    await api.apply(CONFIG_MAPS.path(ns, "one"), frozen)
    error = await refused(api.apply(CONFIG_MAPS.path(ns, "one"), frozen | {"data": {"a": "2"}}))
    assert (error.status, error.reason) == (422, "Invalid")
    relabeled = await api.merge(CONFIG_MAPS.path(ns, "one"), {"metadata": {"labels": {"a": "1"}}})
    assert relabeled["metadata"]["labels"] == {"a": "1"}


# -- AsyncRLJobs


@case
async def a_job_has_its_defaults_and_no_field_that_is_not_known(api: Api, ns: str) -> None:
    body = make_job("one")
    body["spec"]["unknown"] = 1
    body["status"] = {"phase": "Running"}
    made = await api.create(ASYNCRL_JOBS.path(ns), body)
    spec = made["spec"]
    assert "unknown" not in spec and made["status"] == {"observedGeneration": -1}
    assert spec["staleness"]["maxVersions"] == 4 and spec["rollout"]["update"] == {
        "maxUnavailablePercent": 25
    }
    assert made["metadata"]["generation"] == 1


@case
async def a_job_that_breaks_a_rule_is_refused(api: Api, ns: str) -> None:
    body = make_job("one", gpuBudget={"total": 4, "mode": "Manual"})
    error = await refused(api.create(ASYNCRL_JOBS.path(ns), body))
    assert (error.status, error.reason) == (422, "Invalid") and "split" in error.message


@case
async def status_and_spec_are_written_apart(api: Api, ns: str) -> None:
    made = await api.create(ASYNCRL_JOBS.path(ns), make_job("one"))
    path, status_path = ASYNCRL_JOBS.path(ns, "one"), ASYNCRL_JOBS.path(ns, "one", "status")
    both: dict[str, Json] = {"spec": {"suspend": True}, "status": {"phase": "Pending", "message": "m"}}
    live = await api.merge(status_path, both)
    assert live["status"] == {"observedGeneration": -1, **both["status"]}
    assert live["spec"] == made["spec"]
    assert live["metadata"]["generation"] == 1 and int(version(live)) > int(version(made))
    assert version(await api.merge(status_path, both)) == version(live), "nothing has changed"
    live = await api.merge(path, {"spec": {"suspend": True}, "status": {"phase": "Failed"}})
    assert live["spec"]["suspend"] is True and live["status"]["phase"] == "Pending"
    assert live["metadata"]["generation"] == 2
    live = await api.merge(path, {"metadata": {"labels": {"a": "1"}}})
    assert live["metadata"]["generation"] == 2
    old = {"metadata": {"resourceVersion": version(made), "uid": made["metadata"]["uid"]}}
    error = await refused(api.merge(status_path, old | {"status": {"phase": "Running"}}))
    assert (error.status, error.reason) == (409, "Conflict")
    live = await api.merge(status_path, {"status": {"message": None}})
    assert live["status"] == {"observedGeneration": -1, "phase": "Pending"}


@case
async def the_schema_that_is_served_is_ours(api: Api, ns: str) -> None:
    assert schema_problem(await api.get(OPENAPI_PATH)) is None


# -- deleting


@case
async def a_delete_is_of_one_object_and_no_other_of_its_name(api: Api, ns: str) -> None:
    path = CONFIG_MAPS.path(ns, "one")
    made = await api.apply(path, config_map())
    error = await refused(api.delete(path, uid=str(uuid.uuid4()), propagation="Background"))
    assert (error.status, error.reason) == (409, "Conflict")
    answer = await api.delete(path, uid=made["metadata"]["uid"], propagation="Background")
    assert "deletionTimestamp" not in answer.get("metadata", {})
    error = await refused(api.delete(path, uid=made["metadata"]["uid"], propagation="Background"))
    assert (error.status, error.reason) == (404, "NotFound")
    assert error.message == 'configmaps "one" not found'


@case
async def an_object_with_a_finalizer_stays_until_that_is_gone(api: Api, ns: str) -> None:
    path = CONFIG_MAPS.path(ns, "one")
    made = await api.apply(path, config_map(metadata={"finalizers": ["example.com/wait"]}))
    answer = await api.delete(path, uid=made["metadata"]["uid"], propagation="Background")
    assert "deletionTimestamp" in answer["metadata"]
    assert "deletionTimestamp" in (await api.get(path))["metadata"]
    await api.merge(path, {"metadata": {"finalizers": None}})
    assert (await refused(api.get(path))).status == 404


@case
async def a_delete_in_the_foreground_waits_for_the_dependents(api: Api, ns: str) -> None:
    template = pod()["spec"] | {"restartPolicy": "Never"}
    spec = {"template": {"spec": template}, "suspend": True}
    body = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "one"}, "spec": spec}
    made = await api.apply(JOBS.path(ns, "one"), body)
    answer = await api.delete(JOBS.path(ns, "one"), uid=made["metadata"]["uid"], propagation="Foreground")
    assert "deletionTimestamp" in answer["metadata"]
    assert "foregroundDeletion" in answer["metadata"]["finalizers"]


@case
async def a_pod_goes_at_once_without_a_node_or_by_force(api: Api, ns: str) -> None:
    path = PODS.path(ns, "one")
    made = await api.create(PODS.path(ns), pod())
    answer = await api.delete(path, uid=made["metadata"]["uid"], propagation="Background")
    assert (await refused(api.get(path))).status == 404
    assert "deletionTimestamp" in answer["metadata"], "though it is gone"
    made = await api.create(PODS.path(ns), pod(nodeName="nowhere", terminationGracePeriodSeconds=600))
    answer = await api.delete(path, uid=made["metadata"]["uid"], propagation="Background")
    assert (
        "deletionTimestamp" in answer["metadata"] and "deletionTimestamp" in (await api.get(path))["metadata"]
    )
    await api.delete(path, uid=made["metadata"]["uid"], propagation="Background", grace_seconds=0)
    assert (await refused(api.get(path))).status == 404


# -- namespaces and quotas


@case
async def nothing_is_made_in_a_namespace_that_is_not_there(api: Api, ns: str) -> None:
    error = await refused(api.apply(CONFIG_MAPS.path("nowhere", "one"), config_map()))
    assert (error.status, error.reason) == (404, "NotFound") and is_namespace_ending(error)


@case
async def nothing_is_made_in_a_namespace_that_ends(api: Api, ns: str) -> None:
    held = config_map(metadata={"finalizers": ["example.com/wait"]})
    await api.apply(CONFIG_MAPS.path(ns, "one"), held)
    space = await api.get(NAMESPACES.path(None, ns))
    await api.delete(NAMESPACES.path(None, ns), uid=space["metadata"]["uid"], propagation="Background")
    error = await refused(api.apply(CONFIG_MAPS.path(ns, "two"), config_map("two")))
    assert (error.status, error.reason) == (403, "Forbidden") and is_namespace_ending(error)
    await api.merge(CONFIG_MAPS.path(ns, "one"), {"metadata": {"finalizers": None}})


@case
async def a_quota_refuses_what_is_above_it(api: Api, ns: str) -> None:
    hard = {"count/statefulsets.apps": "0"}
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "few"}, "spec": {"hard": hard}}
    await api.create(QUOTAS.path(ns), quota)
    counted = {"status": {"hard": hard, "used": {"count/statefulsets.apps": "0"}}}  # as its controller does
    await api.merge(QUOTAS.path(ns, "few", "status"), counted)
    error = None
    for _ in range(QUOTA_TRIES):  # the server reads its quotas from a cache of its own
        try:
            await api.apply(STATEFUL_SETS.path(ns, "set"), stateful_set(), is_dry_run=True)
        except ApiError as refusal:
            error = refusal
            break
        await asyncio.sleep(0.1)
    assert error is not None, "it was not refused"
    obstacle = obstacle_from(error)
    assert error.status == 403 and obstacle is not None and obstacle.problem.reason == "QuotaExceeded"
    assert "exceeded quota: few" in error.message and not obstacle.needs_user


# -- lists and watches


@case
async def a_list_comes_in_pages_of_one_moment(api: Api, ns: str) -> None:
    for name in "abc":
        await api.apply(CONFIG_MAPS.path(ns, name), config_map(name, metadata={"labels": {LABEL: "1"}}))
    await api.apply(CONFIG_MAPS.path(ns, "d"), config_map("d"))
    query = {"labelSelector": LABEL, "limit": "2"}
    first = await api.list(CONFIG_MAPS.path(ns), **query)
    assert [each["metadata"]["name"] for each in first] == ["a", "b"] and first.token
    gone = await api.get(CONFIG_MAPS.path(ns, "c"))
    await api.delete(CONFIG_MAPS.path(ns, "c"), uid=gone["metadata"]["uid"], propagation="Background")
    second = await api.list(CONFIG_MAPS.path(ns), **query, **{"continue": first.token})
    assert [each["metadata"]["name"] for each in second] == ["c"] and not second.token
    assert second.metadata["resourceVersion"] == first.metadata["resourceVersion"]
    assert len(list(await api.list(CONFIG_MAPS.path(ns), labelSelector=f"{LABEL}=2"))) == 0


@case
async def events_are_found_by_their_reason(api: Api, ns: str) -> None:
    about = {"kind": "Job", "namespace": ns, "name": "x", "apiVersion": "batch/v1"}
    for name, reason in (("one", "FailedCreate"), ("two", "Started")):
        body = {"apiVersion": "v1", "kind": "Event", "metadata": {"name": name}, "involvedObject": about}
        await api.create(EVENTS.path(ns), body | {"reason": reason, "message": "m", "type": "Normal"})
    found = await api.list(EVENTS.path(ns), fieldSelector="reason=FailedCreate", limit="500")
    assert [each["metadata"]["name"] for each in found] == ["one"]


@case
async def a_watch_tells_in_order_what_happened_since_a_version(api: Api, ns: str) -> None:
    path = CONFIG_MAPS.path(ns, "one")
    labels: Json = {"metadata": {"labels": {LABEL: "1"}}}
    await api.apply(path, config_map(**labels))
    began = (await api.list(CONFIG_MAPS.path(ns), labelSelector=LABEL, limit="1")).metadata["resourceVersion"]
    await api.apply(path, config_map(data={"a": "2"}, **labels))
    await api.merge(path, {"metadata": {"labels": None}})
    await api.merge(path, labels)
    live = await api.get(path)
    await api.delete(path, uid=live["metadata"]["uid"], propagation="Background")
    await api.apply(CONFIG_MAPS.path(ns, "other"), config_map("other"))
    query = {"labelSelector": LABEL, "resourceVersion": began, "allowWatchBookmarks": "true"}
    events = [event async for event in api.watch(CONFIG_MAPS.path(ns), **query, timeoutSeconds="2")]
    told = [event for event in events if event["type"] != "BOOKMARK"]
    assert [each["type"] for each in told] == ["MODIFIED", "DELETED", "ADDED", "DELETED"]
    versions = [int(version(each["object"])) for each in events]
    assert versions == sorted(versions) and versions[0] > int(began)
    assert versions[-1] > int(version(live)), "an end has a version of its own"
    assert told[0]["object"]["data"] == {"a": "2"}


@case
async def a_watch_from_a_version_that_is_forgotten_is_expired(api: Api, ns: str) -> None:
    query = {"resourceVersion": "1", "timeoutSeconds": "2"}
    with pytest.raises(ApiError) as error:  # of a kind that the server has not always known
        async for _ in api.watch(ASYNCRL_JOBS.path(ns), **query):
            pass
    assert (error.value.status, error.value.reason) == (410, "Expired") and error.value.is_expired


# -- helpers


async def as_somebody(api: Api, path: str, patch: Json) -> Json:
    """Change an object as another client would."""
    body = await api._call("PATCH", path, {"fieldManager": "somebody"}, patch, "application/merge-patch+json")
    return body


def containers(live: Json) -> list[Json]:
    found: list[Json] = live["spec"]["template"]["spec"]["containers"]
    return found


def _named(live: Json) -> Json:
    return {"name": live["metadata"]["name"], "uid": live["metadata"]["uid"]}
