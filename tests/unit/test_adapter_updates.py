"""A worker's part where adapters are trained: what the engine was told, whatever came in which order."""

from collections.abc import Iterable

import pytest

from asyncrl_runtime.contract.messages import (
    AdapterChunk,
    ControlReply,
    ControlRequest,
    DrainEngine,
    LoadAdapter,
    PolicyVersion,
    PrepareUpdate,
)
from asyncrl_runtime.rollout.adapter_updates import AdapterUpdates
from asyncrl_runtime.rollout.engine_api import EngineLost, EngineRefused
from support.fakes import UpdatableEngine

V0, V1, V2 = (PolicyVersion(1, version) for version in range(3))
LOAD, LABEL, UNLOAD = "load_adapter", "set_label", "unload_adapter"


class Controller:
    """Sends adapters of six bytes in pieces."""

    def __init__(self, num_running: int = 0) -> None:
        self.engine = UpdatableEngine()
        self.updates = AdapterUpdates(self.engine, lambda: num_running)

    async def ask(self, requests: Iterable[ControlRequest]) -> list[ControlReply]:
        return [await self.updates.handle(request) for request in requests]

    async def send(self, version: PolicyVersion, interrupt: str = "Retract") -> ControlReply:
        return (await self.ask([*pieces(version), load(version, interrupt)]))[-1]

    def loaded(self) -> list[PolicyVersion]:
        """Return the adapters that the engine has, by what it was told."""
        loaded = []
        for call, version in self.engine.calls:
            if call == LOAD:
                loaded.append(version)
            elif call == UNLOAD and version in loaded:
                loaded.remove(version)
        return loaded


def pieces(version: PolicyVersion) -> list[ControlRequest]:
    return [AdapterChunk(version=version, offset=at, data=b"abcdef"[at : at + 3]) for at in (0, 3)]


def load(version: PolicyVersion, interrupt: str = "Retract") -> LoadAdapter:
    return LoadAdapter(version=version, num_bytes=6, config="{}", interrupt=interrupt, timeout_seconds=9)


async def test_an_adapter_is_loaded_under_its_version_and_what_ran_is_broken_off() -> None:
    controller = Controller()
    assert (await controller.send(V0)).ok and controller.updates.state == "ready"
    assert controller.engine.weights.version == V0
    assert controller.engine.calls[-1] == (LABEL, (V0, True))


async def test_the_adapter_before_the_newest_stays() -> None:
    controller = Controller()
    for version in (V0, V1, V2):
        assert (await controller.send(version)).ok
    assert controller.loaded() == [V1, V2]


async def test_where_samples_are_let_finish_nothing_is_broken_off() -> None:
    controller = Controller(num_running=2)
    await controller.send(V0)
    assert not (await controller.ask([DrainEngine()]))[0].ok and controller.updates.state == "draining"
    await controller.send(V1, "Drain")
    assert controller.engine.calls[-1] == (LABEL, (V1, False))
    assert controller.updates.state == "ready"


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([load(V0)], "adapter 1.0 of 6 bytes has not come whole"),
        ([pieces(V0)[0], load(V0)], "adapter 1.0 of 6 bytes has not come whole"),
        ([*pieces(V1), load(V0)], "adapter 1.0 of 6 bytes has not come whole"),
        ([pieces(V0)[1]], "a piece of adapter 1.0 came without those before it"),
        ([pieces(V1)[0], pieces(V0)[1]], "a piece of adapter 1.0 came without those before it"),
        ([pieces(V0)[0], pieces(V0)[1], pieces(V0)[1]], "a piece of adapter 1.0 begins at 3, not 6"),
        (
            [PrepareUpdate(groups=("wu-1-1",), version=V0, interrupt="Retract", timeout_seconds=9)],
            "this engine takes adapters, and no PrepareUpdate",
        ),
    ],
)
async def test_what_is_not_whole_is_not_loaded(requests: list[ControlRequest], message: str) -> None:
    controller = Controller()
    assert (await controller.ask(requests))[-1].message == message
    assert controller.loaded() == [] and controller.updates.state == "empty"


async def test_an_adapter_that_is_there_already_is_not_loaded_twice() -> None:
    controller = Controller()
    controller.engine.faults[LABEL] = EngineLost("connection reset")
    assert not (await controller.send(V0)).ok
    del controller.engine.faults[LABEL]
    assert (await controller.send(V0)).ok
    assert controller.engine.made.count(LOAD) == 1


async def test_a_new_process_of_the_engine_has_none() -> None:
    controller = Controller()
    await controller.send(V0)
    controller.updates.engine_restarted()
    assert controller.updates.state == "empty"
    await controller.send(V0)
    assert controller.engine.made.count(LOAD) == 2


async def test_an_adapter_that_the_engine_refuses_changes_nothing() -> None:
    controller = Controller()
    await controller.send(V0)
    controller.engine.faults[LOAD] = EngineRefused("of another rank")
    assert (await controller.send(V1)).message == "of another rank"
    assert controller.engine.weights.version == V0 and controller.updates.state == "ready"
