"""The operator at work on a cluster in memory: what a user does, what others do, and what comes of it.

Everything but kopf is the product's; time is virtual. What a real control plane adds is in tests/cluster.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from asyncrl_operator.resources import (
    ASYNCRL_JOBS,
    CONFIG_MAPS,
    JOB_LABEL,
    JOB_UID_LABEL,
    JOBS,
    NETWORK_POLICIES,
    PODS,
    SECRETS,
    SERVICES,
    STATEFUL_SETS,
    Json,
    Resource,
)
from asyncrl_runtime.simulation.virtual_time import run_virtually
from support.cluster.api_calls import RefusalError, Request
from support.cluster.memory_api_client import MemoryResponse, Send
from support.cluster.memory_api_server import QUOTAS
from support.cluster.whole_operator import CRD, NAME, NAMESPACE, World, running_world

CPU = {"allocation": "None"}
ROLLOUT = f"{NAME}-rollout"


def in_world(scenario: Callable[[World], Awaitable[None]], **world: Any) -> None:
    """Play a scenario in a world of its own."""

    async def play() -> None:
        async with running_world(**world) as there:
            await scenario(there)

    run_virtually(play())


async def bring_up(world: World, **spec: Any) -> None:
    """Create the job, and return once it runs and nothing is left to do."""
    world.create_job(**spec)
    await world.until(lambda: world.is_up)
    await world.until_quiet()


def replicas(world: World) -> int:
    return int(world.get(STATEFUL_SETS, ROLLOUT)["spec"]["replicas"])


def has_label(world: World, resource: Resource, name: str, label: str) -> bool:
    return label in world.get(resource, name).get("metadata", {}).get("labels", {})


# -- what a user does


def test_a_job_that_is_created_runs_and_is_then_left_alone() -> None:
    async def scenario(world: World) -> None:
        await bring_up(world)
        status = world.status()
        assert (status["phase"], status["observedGeneration"]) == ("Running", 1)
        assert status["gpus"]["summary"] == "3/3"
        objects = {each["name"]: (each["kind"], each["resource"]) for each in status["groups"]}
        assert objects["trainer"] == ("Job", f"{NAME}-trainer-1")
        assert objects["rollout"] == ("StatefulSet", ROLLOUT)
        assert world.condition("Ready") == "True/Running" and world.condition("Reconciling") == "absent"
        assert world.events() == {"Started": 1, "Running": 1}
        assert "finalizers" not in world.get(ASYNCRL_JOBS, NAME)["metadata"]
        writes = len(world.writes)
        assert writes <= 40, "calls per job"
        world.edit(ASYNCRL_JOBS, NAME, {"metadata": {"annotations": {"team": "rl"}}})
        world.edit(SERVICES, f"{NAME}-nats", {"metadata": {"annotations": {"cost-center": "7"}}})
        await world.until_quiet()
        assert len(world.writes) == writes
        assert world.get(SERVICES, f"{NAME}-nats")["metadata"]["annotations"]["cost-center"] == "7"

    in_world(scenario)


def test_a_suspended_job_has_no_pods_and_resumes_with_the_next_attempt() -> None:
    async def scenario(world: World) -> None:
        await bring_up(world)
        world.edit_job(suspend=True)
        await world.until(lambda: world.condition("Suspended") == "True/Suspended")
        assert list(world.pods()) == [] and world.condition("Ready") == "True/Suspended"
        world.edit_job(suspend=False)
        await world.until(lambda: world.is_up)
        assert world.names(JOBS) == [f"{NAME}-trainer-2"]
        assert world.status()["attempt"]["restarts"] == 0
        assert {"Suspending", "Suspended", "Resumed"} <= world.events().keys()

    in_world(scenario)


def test_a_job_that_is_deleted_leaves_nothing_and_gets_nothing() -> None:
    async def scenario(world: World) -> None:
        await bring_up(world)
        world.delete(ASYNCRL_JOBS, NAME)
        everything = (JOBS, STATEFUL_SETS, CONFIG_MAPS, SERVICES, SECRETS, PODS, NETWORK_POLICIES)
        await world.until(lambda: not any(world.names(kind) for kind in everything))
        writes = len(world.writes)
        await world.until_quiet()
        assert not any("PATCH" in write or "POST" in write for write in world.writes[writes:])
        assert not any(world.names(kind) for kind in everything)

    in_world(scenario)


def test_engines_are_added_and_taken_away_while_the_trainer_goes_on() -> None:
    async def scenario(world: World) -> None:
        manual = CPU | {"mode": "Manual"}
        budget = {"total": 3, "split": {"trainer": 1, "rollout": 2}, **manual}
        await bring_up(world, gpuBudget=budget)
        world.edit_job(gpuBudget={"total": 5, "split": {"trainer": 1, "rollout": 4}})
        await world.until(lambda: world.groups().get("rollout") == "4/4")
        world.edit_job(gpuBudget={"total": 2, "split": {"trainer": 1, "rollout": 1}})
        await world.until(lambda: world.groups().get("rollout") == "1/1")
        await world.until(lambda: [n for n in world.pods() if n.startswith(ROLLOUT)] == [f"{ROLLOUT}-0"])
        assert world.names(JOBS) == [f"{NAME}-trainer-1"], "the trainer went on"
        assert world.events()["RolloutScaled"] == 2

    in_world(scenario)


def test_a_changed_engine_is_rolled_out_pod_by_pod() -> None:
    async def scenario(world: World) -> None:
        await bring_up(world)
        before = {pod["metadata"]["uid"] for pod in world.controllers.pods("rollout")}
        world.edit_job(rollout={"engine": {"args": ["--max-total-tokens", "4096"]}})
        await world.until(lambda: not before & {p["metadata"]["uid"] for p in world.server.all(PODS)})
        await world.until(lambda: world.is_up)
        await world.until_quiet()
        assert world.names(JOBS) == [f"{NAME}-trainer-1"]
        configs = [name for name in world.names(CONFIG_MAPS) if name.startswith(f"{ROLLOUT}-")]
        assert len(configs) == 1, "that of the engines before is gone"

    in_world(scenario)


def test_a_trainer_that_ends_well_ends_the_job_and_frees_its_pods() -> None:
    async def scenario(world: World) -> None:
        await bring_up(world, ttlSecondsAfterFinished=600)
        world.controllers.end_trainer(0)
        await world.until(lambda: world.condition("Finished") == "True/Succeeded")
        await world.until(lambda: not any("rollout" in name or "nats" in name for name in world.pods()))
        assert world.events()["Complete"] == 1
        await world.until(lambda: not world.names(STATEFUL_SETS), "its time is over", 700)
        await world.until_quiet()
        assert world.condition("Finished") == "True/Succeeded" and world.events()["TTLExpired"] == 1

    in_world(scenario)


@pytest.mark.parametrize(
    ("code", "reason", "counts", "told"),
    [(1, "TrainerFailed", (1, 0), "TrainerRestart"), (143, "Killed", (0, 1), "Disrupted")],
)
def test_a_trainer_that_dies_is_started_again(
    code: int, reason: str, counts: tuple[int, int], told: str
) -> None:
    async def scenario(world: World) -> None:
        await bring_up(world)
        world.controllers.end_trainer(code)
        await world.until(lambda: world.is_up and world.status()["attempt"]["number"] == 2)
        attempt = world.status()["attempt"]
        assert (attempt["restarts"], attempt["disruptions"], attempt["lastReason"]) == (*counts, reason)
        assert world.events()[told] == 1
        assert world.get(JOBS, f"{NAME}-trainer-1"), "it stays for its logs"

    in_world(scenario)


def test_what_the_trainer_reports_is_shown() -> None:
    async def scenario(world: World) -> None:
        await bring_up(world)
        world.report(7, reward=0.25)
        await world.until(lambda: world.status().get("progress", {}).get("step") == 7)
        assert world.status()["reward"]["mean"] == "0.250"

    in_world(scenario)


# -- what others do


def test_a_child_that_is_deleted_or_edited_comes_back_as_it_was() -> None:
    async def scenario(world: World) -> None:
        await bring_up(world)
        world.delete(SERVICES, ROLLOUT)
        await world.until(lambda: world.get(SERVICES, ROLLOUT))
        world.edit(STATEFUL_SETS, ROLLOUT, {"spec": {"replicas": 5}})
        await world.until(lambda: replicas(world) == 2)
        world.edit(CONFIG_MAPS, f"{NAME}-live", {"metadata": {"labels": {JOB_LABEL: None}}})
        await world.until(lambda: has_label(world, CONFIG_MAPS, f"{NAME}-live", JOB_LABEL))
        await world.until_quiet()
        assert world.events()["ChildRecreated"] == 1 and world.events()["DriftCorrected"] >= 2
        assert world.is_up and world.names(JOBS) == [f"{NAME}-trainer-1"], "nothing was restarted for it"

    in_world(scenario)


def test_a_child_that_has_lost_the_label_it_is_watched_by_is_found_by_its_name() -> None:
    async def scenario(world: World) -> None:
        await bring_up(world)
        for resource, name in ((SERVICES, ROLLOUT), (CONFIG_MAPS, f"{NAME}-config-1")):
            uid = world.get(resource, name)["metadata"]["uid"]
            world.edit(resource, name, {"metadata": {"labels": {JOB_UID_LABEL: None}}})
            await world.until(partial(has_label, world, resource, name, JOB_UID_LABEL))
            assert world.get(resource, name)["metadata"]["uid"] == uid, "it is the same"

    in_world(scenario)


def test_an_object_that_is_not_ours_is_left_alone_and_named_until_it_is_gone() -> None:
    async def scenario(world: World) -> None:
        theirs = {"metadata": {"name": f"{NAME}-nats"}, "spec": {"ports": [{"port": 1}]}}
        world.ask("POST", SERVICES.path(NAMESPACE), theirs, "application/json")
        world.create_job()
        await world.until(lambda: world.condition("Stalled") == "True/NameConflict")
        assert world.message("Stalled").startswith(
            f"Service {NAME}-nats exists and was not made for this job"
        )
        assert world.get(SERVICES, f"{NAME}-nats")["spec"] == theirs["spec"]
        assert list(world.pods()) == []
        world.delete(SERVICES, f"{NAME}-nats")
        await world.until(lambda: world.is_up)

    in_world(scenario)


def test_an_object_that_is_replaced_under_a_pass_is_no_matter_of_the_spec() -> None:
    """The API server then calls the UID invalid, just as it would a field of the user's."""

    async def scenario(world: World) -> None:
        await bring_up(world)
        replaced: list[str] = []

        async def on_the_way(request: Request, send: Send) -> MemoryResponse:
            if not replaced and request.verb == "PATCH" and request.path.endswith(f"/services/{ROLLOUT}"):
                live = world.get(SERVICES, ROLLOUT)
                world.delete(SERVICES, ROLLOUT)
                body = {"metadata": {**live["metadata"], "uid": ""}, "spec": live["spec"]}
                del body["metadata"]["labels"]
                world.ask("POST", SERVICES.path(NAMESPACE), body, "application/json")
                replaced.append(request.path)
            return await send(request)

        world.on_the_way = on_the_way
        world.edit(SERVICES, ROLLOUT, {"spec": {"ports": []}})
        await world.until(lambda: replaced and has_label(world, SERVICES, ROLLOUT, JOB_UID_LABEL))
        assert "InvalidSpec" not in world.events()

    in_world(scenario)


# -- what is refused


def test_a_quota_is_told_of_and_tried_again_until_it_is_raised() -> None:
    async def scenario(world: World) -> None:
        quota: Json = {"metadata": {"name": "few"}, "spec": {"hard": {"count/statefulsets.apps": "1"}}}
        world.ask("POST", QUOTAS.path(NAMESPACE), quota, "application/json")
        world.create_job()
        await world.until(lambda: world.condition("Reconciling") == "True/QuotaExceeded")
        assert "exceeded quota: few" in world.message("Reconciling")
        world.edit(QUOTAS, "few", {"spec": {"hard": {"count/statefulsets.apps": "2"}}})
        await world.until(lambda: world.is_up)

    in_world(scenario)


def test_pods_that_are_refused_are_told_of_in_the_words_of_who_was_refused() -> None:
    async def scenario(world: World) -> None:
        quota: Json = {"metadata": {"name": "few"}, "spec": {"hard": {"count/pods": "1"}}}
        world.ask("POST", QUOTAS.path(NAMESPACE), quota, "application/json")
        world.create_job()
        await world.until(lambda: world.condition("Reconciling") == "True/QuotaExceeded")
        assert "exceeded quota: few" in world.message("Reconciling")
        world.edit(QUOTAS, "few", {"spec": {"hard": {"count/pods": "9"}}})
        await world.until(lambda: world.is_up)

    in_world(scenario)


def refuses(part: str, refusal: RefusalError) -> Callable[[Request, Send], Awaitable[MemoryResponse]]:
    """Return what refuses the writes whose path has `part` in it."""
    memory = MemoryResponse.of(refusal)

    async def on_the_way(request: Request, send: Send) -> MemoryResponse:
        return memory if request.verb != "GET" and part in request.path else await send(request)

    return on_the_way


@pytest.mark.parametrize(
    ("status", "message", "condition"),
    [
        (422, 'StatefulSet.apps "gsm8k-rollout" is invalid: spec.template: Required', "Stalled=InvalidSpec"),
        (403, 'admission webhook "policy.example" denied the request', "Reconciling=AdmissionDenied"),
        (403, 'statefulsets.apps is forbidden: User "op" cannot patch', "Reconciling=Forbidden"),
    ],
)
def test_a_refusal_is_told_and_gone_once_it_is_taken_back(status: int, message: str, condition: str) -> None:
    async def scenario(world: World) -> None:
        on_the_way = world.on_the_way
        world.on_the_way = refuses(f"/statefulsets/{ROLLOUT}", RefusalError(status, "Word", message))
        world.create_job()
        kind, reason = condition.split("=")
        await world.until(lambda: world.condition(kind) == f"True/{reason}")
        assert world.message(kind) == f"StatefulSet {ROLLOUT}: {message}"
        assert world.names(JOBS) == [f"{NAME}-trainer-1"], "the rest is there"
        world.on_the_way = on_the_way
        await world.until(lambda: world.is_up)

    in_world(scenario)


def test_a_pod_template_that_is_refused_is_told_before_anything_is_made() -> None:
    async def scenario(world: World) -> None:
        message = 'Job.batch "gsm8k-trainer-1" is invalid: spec.template.spec.priority: Invalid'
        world.on_the_way = refuses("/jobs/", RefusalError(422, "Invalid", message))
        world.create_job(trainer={"deepspeed": {"zeroStage": 0}, "podTemplate": {"spec": {"priority": 7}}})
        await world.until(lambda: world.condition("Stalled") == "True/InvalidSpec")
        assert world.names(CONFIG_MAPS) == [] and world.names(SECRETS) == []

    in_world(scenario)


def test_a_reference_that_is_missing_is_waited_for() -> None:
    async def scenario(world: World) -> None:
        world.create_job(
            reward={"type": "Function", "function": "code:score", "configMapRef": {"name": "code"}}
        )
        await world.until(lambda: world.condition("Stalled") == "True/MissingReference")
        assert world.message("Stalled") == "spec.reward.configMapRef: ConfigMap 'code' does not exist"
        code: Json = {"metadata": {"name": "code"}, "data": {"code.py": ""}}
        world.ask("POST", CONFIG_MAPS.path(NAMESPACE), code, "application/json")
        await world.until(lambda: world.is_up)

    in_world(scenario)


def test_nothing_is_done_under_a_crd_that_lacks_a_field() -> None:
    async def scenario(world: World) -> None:
        await world.operator.end()
        properties = world.server.crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
        staleness = properties["spec"]["properties"].pop("staleness")
        world.create_job()
        await world.start()
        await world.until(lambda: world.condition("Stalled") == "True/CRDTooOld")
        assert "lacks spec.staleness: apply the CRD" in world.message("Stalled") and not world.names(JOBS)
        properties["spec"]["properties"]["staleness"] = staleness
        await world.until(lambda: world.is_up)

    in_world(scenario)


def test_a_spec_that_this_version_cannot_read_is_told_and_what_runs_goes_on() -> None:
    async def scenario(world: World) -> None:
        await bring_up(world)
        live = world.get(ASYNCRL_JOBS, NAME)
        live["spec"]["sampling"]["temperature"] = "hot"
        world.server.store(ASYNCRL_JOBS, live)
        await world.until(lambda: world.condition("Stalled") == "True/InvalidSpec")
        assert "spec.sampling.temperature" in world.message("Stalled")
        assert len(list(world.pods())) == 4

    in_world(scenario)


def test_a_job_that_another_manages_is_left_alone() -> None:
    async def scenario(world: World) -> None:
        await world.operator.end()
        world.create_job()
        live = world.get(ASYNCRL_JOBS, NAME)
        live["spec"]["managedBy"] = "example.com/another"
        world.server.store(ASYNCRL_JOBS, live)
        await world.start()
        await world.until_quiet()
        assert world.writes == []

    in_world(scenario)


def test_the_crd_of_the_world_is_the_one_that_is_shipped() -> None:
    assert CRD["spec"]["names"]["plural"] == ASYNCRL_JOBS.plural
