"""A worker's part where weights are staged: what its engine was told, its state after whatever went wrong."""

import asyncio
from pathlib import Path

import pytest

from asyncrl_runtime.contract.messages import (
    ControlReply,
    DrainEngine,
    LoadStaged,
    PolicyVersion,
    ProbeEngine,
    ReceiveWeights,
    StageWeights,
)
from asyncrl_runtime.contract.staging import FetchedStage, FetchStage
from asyncrl_runtime.rollout.engine_api import EngineLost, EngineRefused
from asyncrl_runtime.rollout.receiver_client import ReceiverFailed
from asyncrl_runtime.rollout.staged_updates import StagedUpdates
from support.fakes import UpdatableEngine, run_in_virtual_time

V0, V1 = PolicyVersion(1, 0), PolicyVersion(1, 1)
PAUSE, LOAD, CHECK, CONTINUE = "pause", "load_folder", "checksum", "resume"
FETCH_SECONDS = 30.0


class PosingReceiver:
    """Takes its time, and fails as a test says."""

    def __init__(self) -> None:
        self.fault = ""
        self.asked: list[FetchStage] = []

    async def fetch(self, asked: FetchStage) -> FetchedStage:
        self.asked.append(asked)
        await asyncio.sleep(FETCH_SECONDS)
        if self.fault:
            raise ReceiverFailed(self.fault)
        return FetchedStage(folder="/staging", num_bytes=7, is_whole=True)


class Scene:
    def __init__(self, num_running: int = 0) -> None:
        self.engine = UpdatableEngine()
        self.receiver = PosingReceiver()
        self.updates = StagedUpdates(self.engine, lambda: num_running, receiver=self.receiver)

    async def stage(self, version: PolicyVersion) -> ControlReply:
        return await self.updates.handle(
            StageWeights(version=version, host="t", port=1, secret=b"s", timeout_seconds=60)
        )

    async def load(self, version: PolicyVersion, interrupt: str = "Retract", **more: bool) -> ControlReply:
        return await self.updates.handle(
            LoadStaged(version=version, interrupt=interrupt, timeout_seconds=9, **more)
        )

    async def bring(self, version: PolicyVersion, interrupt: str = "Retract") -> ControlReply:
        staged = await self.stage(version)
        return await self.load(version, interrupt) if staged.ok else staged


def test_the_engine_samples_while_weights_are_fetched_and_pauses_for_the_load() -> None:
    async def check() -> None:
        scene = Scene()
        await scene.bring(V0)
        fetching = asyncio.create_task(scene.stage(V1))
        await asyncio.sleep(FETCH_SECONDS / 2)
        assert scene.updates.state == "ready" and not scene.engine.is_paused
        assert (await fetching).ok and scene.engine.weights.version == V0
        scene.engine.calls.clear()
        assert (await scene.load(V1)).ok
        assert scene.engine.made == [PAUSE, LOAD, CONTINUE]
        assert scene.engine.calls[1] == (LOAD, (Path("/staging"), V1, False))
        assert scene.updates.state == "ready" and scene.engine.weights.version == V1

    run_in_virtual_time(check())


async def bring_without_waiting(interrupt: str) -> UpdatableEngine:
    scene = Scene()
    assert (await scene.bring(V0, interrupt)).ok
    return scene.engine


@pytest.mark.parametrize(("interrupt", "keeps"), [("Retract", False), ("InPlace", True), ("Drain", False)])
def test_the_cache_is_kept_where_samples_go_on_with_it(interrupt: str, keeps: bool) -> None:
    engine = run_in_virtual_time(bring_without_waiting(interrupt))
    assert engine.calls[0] == (PAUSE, interrupt) and engine.calls[1][1][2] is keeps


def test_a_lost_receiver_leaves_the_engine_sampling() -> None:
    async def check() -> None:
        scene = Scene()
        await scene.bring(V0)
        scene.receiver.fault = "connection refused"
        reply = await scene.stage(V1)
        assert not reply.ok and not reply.is_refusal and reply.message == "receiver: connection refused"
        assert scene.updates.state == "ready" and scene.engine.made.count(PAUSE) == 1
        assert (await scene.load(V1)).message == "1.1 is not staged here"
        assert scene.engine.made.count(PAUSE) == 1, "nothing is paused for what is not here"
        assert not (await scene.stage(V0)).ok
        assert (await scene.load(V0)).message == "1.0 is not staged here", "it may be half of it by now"
        scene.receiver.fault = ""
        assert (await scene.bring(V1)).ok

    run_in_virtual_time(check())


@pytest.mark.parametrize(
    ("call", "fault", "state"),
    [
        (PAUSE, EngineLost("reset"), "ready"),
        (LOAD, EngineLost("reset"), "dirty"),
        (LOAD, EngineRefused("no such shape"), "dirty"),
        (CHECK, EngineLost("reset"), "dirty"),
        (CONTINUE, EngineLost("reset"), "dirty"),
    ],
)
def test_a_call_that_fails_leaves_the_engine_in_a_known_state(
    call: str, fault: Exception, state: str
) -> None:
    async def check() -> None:
        scene = Scene()
        await scene.bring(V0)
        await scene.stage(V1)
        scene.engine.fails_at(call, 1, fault)
        reply = await scene.load(V1, checksum=True)
        assert not reply.ok and reply.is_refusal == isinstance(fault, EngineRefused)
        assert scene.updates.state == state
        assert scene.engine.is_paused == (state == "dirty")
        assert (await scene.load(V1, checksum=True)).checksum == "c0ffee"
        assert scene.updates.state == "ready" and not scene.engine.is_paused

    run_in_virtual_time(check())


def test_an_engine_that_hangs_in_its_load_must_be_restarted() -> None:
    async def check() -> None:
        scene = Scene()
        await scene.bring(V0)
        await scene.stage(V1)
        scene.engine.hangs = True
        assert not (await scene.load(V1)).ok and scene.updates.has_missed_deadline
        scene.engine.hangs = False
        scene.engine.start()
        scene.updates.engine_restarted()
        assert scene.updates.state == "empty"
        assert (await scene.load(V1)).ok, "its receiver still has it"

    run_in_virtual_time(check())


def test_samples_may_finish_first() -> None:
    async def check() -> None:
        scene = Scene(num_running=2)
        await scene.bring(V0)
        await scene.stage(V1)
        assert not (await scene.updates.handle(DrainEngine(version=V1))).ok
        assert scene.updates.state == "draining"
        assert (await scene.load(V1, "Drain")).ok and scene.updates.state == "ready"

    run_in_virtual_time(check())


def test_a_worker_that_ends_does_not_wait_for_the_receiver() -> None:
    async def check() -> None:
        scene = Scene()
        fetching = asyncio.create_task(scene.stage(V0))
        await asyncio.sleep(1)
        await scene.updates.leave()
        assert (await fetching).message == "the worker ends"
        assert asyncio.get_running_loop().time() < FETCH_SECONDS

    run_in_virtual_time(check())


def test_it_takes_no_other_kind_of_weights() -> None:
    async def check() -> None:
        scene = Scene()
        assert (await scene.updates.handle(ProbeEngine())).ok
        request = ReceiveWeights(groups=("g",), version=V0, timeout_seconds=1)
        reply = await scene.updates.handle(request)
        assert reply.message == "this engine takes staged weights, and no ReceiveWeights"

    run_in_virtual_time(check())
