"""Poison in a report, a status or an object: passes do what can be done, and the status says what cannot."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from asyncrl_api.structural import status_schema
from asyncrl_operator.api_server.api import ApiError
from asyncrl_operator.decide.status import REPORT_SECONDS
from asyncrl_operator.resources import ASYNCRL_JOBS, CONFIG_MAPS, JOBS, NODES, PODS, SERVICES, Json
from asyncrl_operator.troubles import first_line, is_passing
from asyncrl_runtime.simulation.virtual_time import run_virtually
from support.cluster.api_calls import RefusalError, Request
from support.cluster.memory_api_client import MemoryResponse, Send
from support.cluster.structural_values import faults
from support.cluster.whole_operator import NAME, NAMESPACE, World, running_world

SCHEMA = status_schema()


def in_world(scenario: Callable[[World], Awaitable[None]]) -> None:
    """Play a scenario on a job that runs."""

    async def play() -> None:
        async with running_world() as world:
            world.create_job()
            await world.until(lambda: world.is_up)
            await world.until_quiet()
            await scenario(world)
            assert not list(faults(SCHEMA, world.status()))

    run_virtually(play())


def write_report(world: World, **values: Any) -> None:
    report = {"attempt": 1, "step": 7, "maxSteps": 200, "state": "Training", "time": "2027-01-15T08:00:00Z"}
    text = json.dumps(report | values)
    world.edit(CONFIG_MAPS, f"{NAME}-report", {"data": {"report": text}})


def has_reported(world: World, step: int) -> bool:
    return bool(world.status().get("progress", {}).get("step") == step)


CHECKPOINT = {"step": 4, "path": "/c", "time": "2027-01-15T08:00:00Z"}
EVALUATION = {"step": 1, "accuracy": 0.5, "numPrompts": 4, "lowestVersion": 0, "highestVersion": 1}
POISON: dict[str, Json] = {
    "a reward with many digits": {"reward": -1e30},
    "a reward beyond all bounds": {"reward": 1e300},
    "a reward that is none": {"reward": float("nan")},
    "a time that is none": {"time": "soon"},
    "a time of no calendar": {"time": "9999-12-31T23:59:59-12:00"},
    "a negative step": {"step": -5},
    "a step beyond all bounds": {"step": 3_000_000_000, "maxSteps": 4_000_000_000},
    "a step beyond the last": {"step": 2_000_000_000, "maxSteps": 1},
    "negative steps": {"maxSteps": -1},
    "a state without end": {"state": "x" * 300},
    "a negative queue": {"queueDepth": -1},
    "infinite speed": {"tokensPerSecond": "Infinity"},
    "speed that is no number": {"tokensPerSecond": float("nan")},
    "infinite time": {"remainingSeconds": float("inf")},
    "infinite wait": {"waitShare": float("inf")},
    "a negative age": {"stalenessP95": -1},
    "an age beyond all bounds": {"stalenessMax": 2**70},
    "a checkpoint at no time": {"lastCheckpoint": CHECKPOINT | {"time": "x"}},
    "a checkpoint on a path without end": {"lastCheckpoint": CHECKPOINT | {"path": "p" * 2000}},
    "a checkpoint at a negative step": {"lastCheckpoint": CHECKPOINT | {"step": -1}},
    "an accuracy beyond all bounds": {"lastEvaluation": EVALUATION | {"accuracy": 1e300}},
    "a number of another form": {"step": "seven"},
    "an unknown field": {"newField": 1},
}


def test_a_job_with_poison_in_its_reports_is_still_led(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(world: World) -> None:
        for number, (name, values) in enumerate(POISON.items(), start=1):
            write_report(world, **({"queueDepth": number, "state": f"Case{number}"} | values))
            await asyncio.sleep(REPORT_SECONDS + 5)
            world.check()
            assert not list(faults(SCHEMA, world.status())), name
            assert "failed" not in caplog.text, name
        assert world.condition("Ready").startswith("True/")
        assert sum(f"{NAME}-report" in record.getMessage() for record in caplog.records) <= len(POISON)
        write_report(world, reward=-1e30)
        world.edit_job(suspend=True)
        await world.until(lambda: world.condition("Suspended") == "True/Suspended")

    caplog.set_level(logging.WARNING)
    in_world(scenario)


def test_what_is_wrong_with_a_report_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(world: World) -> None:
        for step in range(8, 12):
            write_report(world, step=step, reward=float("inf"), time="soon")
            await world.until_quiet()
        assert world.status()["progress"]["summary"] == "11/200"
        assert world.status()["reward"] == {}

    in_world(scenario)
    [said] = [record.getMessage() for record in caplog.records if "report" in record.getMessage()]
    assert said.endswith("ConfigMap gsm8k-report: reward, time: out of bounds, and cut or left out")


class Odd:
    """An API server that answers some writes with what our code does not understand."""

    def __init__(self, part: str) -> None:
        self.is_odd = True
        self._part = part

    async def on_the_way(self, request: Request, send: Send) -> MemoryResponse:
        if self.is_odd and request.verb == "PATCH" and self._part in request.path:
            return MemoryResponse(200, b"{}")
        return await send(request)


def test_a_pass_that_fails_again_and_again_says_so_and_does_the_rest() -> None:
    odd = Odd("/services/")

    async def scenario(world: World) -> None:
        world.on_the_way = odd.on_the_way
        world.delete(SERVICES, f"{NAME}-nats")
        world.edit(SERVICES, f"{NAME}-rollout", {"spec": {"selector": {"mine": "too"}}})
        await world.until(lambda: world.condition("Degraded") == "True/OperatorError")
        assert world.condition("Ready") == "False/OperatorError"
        assert world.message("Ready") == world.message("Degraded") == "KeyError: 'metadata'"
        assert world.events()["OperatorError"] == 1
        write_report(world, step=9)
        await world.until(partial(has_reported, world, 9))
        before = world.status()
        await asyncio.sleep(120)
        assert world.status() == before, "each pass writes it anew"
        await world.restart()
        await asyncio.sleep(60)
        assert world.condition("Ready") == "False/OperatorError"
        world.edit_job(suspend=True)
        await world.until(lambda: world.condition("Suspended") == "True/Suspended")
        odd.is_odd = False
        world.edit_job(suspend=False)
        await world.until(lambda: world.condition("Ready") == "True/Running")
        assert world.condition("Degraded") == "False/AsExpected"

    in_world(scenario)


def test_a_status_that_the_api_server_refuses_is_written_without_the_report() -> None:
    """As by a CRD that takes less than this operator believes."""
    written: list[Json] = []

    async def on_the_way(request: Request, send: Send) -> MemoryResponse:
        if request.path.endswith("/status"):
            body = request.body or {}
            written.append(body)
            if "reward" in body["status"]:
                return MemoryResponse.of(RefusalError(422, "Invalid", "status.reward.mean: Too long"))
        return await send(request)

    async def scenario(world: World) -> None:
        world.on_the_way = on_the_way
        write_report(world, reward=0.5)
        await world.until(lambda: world.condition("Degraded") == "True/OperatorError")
        assert "status.reward.mean: Too long" in world.message("Degraded")
        world.edit_job(suspend=True)
        await world.until(lambda: world.condition("Suspended") == "True/Suspended")
        assert list(world.pods()) == []

    in_world(scenario)
    assert any("reward" in each["status"] for each in written)


def test_a_job_completes_whose_reports_are_poison() -> None:
    async def scenario(world: World) -> None:
        write_report(world, reward=-1e30, time="soon", step=-1)
        await world.until_quiet()
        done = [{"type": "Complete", "status": "True", "reason": "", "message": ""}]
        job = world.get(JOBS, f"{NAME}-trainer-1")
        world.server.store(JOBS, job | {"status": {"conditions": done}})
        await world.until(lambda: world.condition("Finished") == "True/Succeeded")

    in_world(scenario)


SPOILT: dict[str, Json] = {
    "a time that is none": {"startTime": "soon"},
    "a negative attempt": {"attempt": {"restarts": -1}},
    "half a clock": {"clocks": {"pendingSince": 7}},
    "an odd condition": {"conditions": [{"type": "Ready", "status": "Maybe"}]},
    "an odd split": {"split": {"trainer": "many"}},
    "a time of a report that is none": {"reportTime": 5},
}


def test_a_status_that_somebody_has_spoilt_is_mended() -> None:
    async def scenario(world: World) -> None:
        for name, values in SPOILT.items():
            world.ask("PATCH", ASYNCRL_JOBS.path(NAMESPACE, NAME, "status"), {"status": values})
            await asyncio.sleep(10)
            await world.until(lambda: world.condition("Ready") == "True/Running", name, 600)
            assert not list(faults(SCHEMA, world.status())), name
        assert world.status()["attempt"]["restarts"] == 0

    in_world(scenario)


ODD_OBJECTS: dict[str, Json] = {
    "no times": {"metadata": {"creationTimestamp": None}},
    "a time that is none": {"metadata": {"creationTimestamp": "soon"}},
    "GPUs without end": {"metadata": {"annotations": {"asyncrl.dev/gpus": "9" * 5000}}},
    "GPUs that are no number": {"metadata": {"annotations": {"asyncrl.dev/gpus": "²"}}},
    "conditions without a type": {"status": {"conditions": [{"status": "True"}, None]}},
    "containers without a name": {"status": {"containerStatuses": [{"state": {"terminated": {}}}, {}]}},
    "an end without a code": {
        "status": {"containerStatuses": [{"lastState": {"terminated": {"exitCode": "x"}}, "state": None}]}
    },
    "a deletion at no time": {"metadata": {"deletionTimestamp": "x"}},
}


ODD_CONDITIONS: list[Any] = [None, [], [{}], [{"type": "Ready", "lastTransitionTime": "x"}], "?"]


def test_pods_and_nodes_with_odd_fields_do_not_end_the_operator() -> None:
    """They would end it for all jobs, at each start."""

    async def play() -> None:
        async with running_world() as world:
            world.create_job()
            await world.until(lambda: world.is_up)
            world.are_controllers_away = True
            for number, patch in enumerate(ODD_OBJECTS.values()):
                labels = {"asyncrl.dev/job": NAME}
                pod: Json = {"metadata": {"name": f"odd-{number}", "uid": f"o{number}", "labels": labels}}
                world.server.store(PODS, pod | {name: pod.get(name, {}) | patch[name] for name in patch})
            for number, conditions in enumerate(ODD_CONDITIONS):
                node = {"metadata": {"name": f"odd-{number}", "uid": f"n{number}"}}
                world.server.store(NODES, node | {"status": {"conditions": conditions}})
            for step in (5, 6):
                write_report(world, step=step, state=f"Step{step}")
                await world.until(partial(has_reported, world, step))
                await world.restart()

    run_virtually(play())


@pytest.mark.parametrize("status", [0, 409, 429, 500, 503])
def test_an_api_server_that_is_away_is_no_fault_of_the_job(status: int) -> None:
    assert is_passing(ApiError(status, "", "later")) and not is_passing(ApiError(400, "BadRequest", "no"))


def test_an_error_is_told_in_one_line() -> None:
    assert first_line(ValueError("one\ntwo")) == "ValueError: one"
    assert first_line(KeyError()) == "KeyError"
    assert len(first_line(ValueError("x" * 5000))) == 1000
