"""Weight epochs in virtual time: publisher, workers' updates, engines without models, a group that sleeps."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import pytest
import torch
from torch import Tensor

from asyncrl_api.names import JobNames
from asyncrl_runtime.contract.messages import (
    ControlRequest,
    Heartbeat,
    JoinGroup,
    PolicyVersion,
    decode_request,
    encode,
)
from asyncrl_runtime.rollout.adapter_updates import AdapterUpdates
from asyncrl_runtime.rollout.engine_api import EngineRefused
from asyncrl_runtime.rollout.engine_updates import EngineUpdates
from asyncrl_runtime.rollout.weight_updates import WeightUpdates
from asyncrl_runtime.weights.adapter_publisher import Adapter, AdapterPublisher
from asyncrl_runtime.weights.bucket import PublishedWeights, describe
from asyncrl_runtime.weights.engines import MIN_REFUSALS, REFUSED_SECONDS, Publisher, WeightsRefused
from asyncrl_runtime.weights.fleet import Fleet
from asyncrl_runtime.weights.publisher import ChecksumMismatch, WeightPublisher
from support.fakes import UpdatableEngine, run_in_virtual_time

V0, V1 = PolicyVersion(1, 0), PolicyVersion(1, 1)
NAMES = JobNames(job="team_gsm8k")
NUM_BUCKETS = 3
JOIN_SECONDS, BROADCAST_SECONDS, PHASE_SECONDS = 2.0, 5.0, 20.0
LAYOUT = tuple(describe([(f"w{number}", torch.float32, (1,))]) for number in range(NUM_BUCKETS))


class Replica:
    """An engine and what its worker has of it."""

    def __init__(self) -> None:
        self.engine = UpdatableEngine()
        self.updates: EngineUpdates = WeightUpdates(self.engine, lambda: self.num_running)
        self.num_running = 0
        self.is_silent = False
        """Whether its worker does not answer."""
        self.is_dead = False
        """Whether its worker gives no sign of life."""
        self.asked: list[ControlRequest] = []

    @property
    def joins(self) -> list[JoinGroup]:
        return [request for request in self.asked if isinstance(request, JoinGroup)]


class SleepingGroups:
    """Weight groups, and the place where they meet; broadcasts take as long as a test says."""

    port = 1

    def __init__(self) -> None:
        self.num_broadcasts = 0
        self.breaks_at: int | None = None
        """The number of the broadcast that fails, counted over all groups."""
        self.formed: list[tuple[str, int]] = []
        self.num_left = 0
        self.on_leave: Callable[[], None] = lambda: None
        self.wires: dict[str, list[asyncio.Future[None]]] = {}
        """Who waits for the data of a broadcast, by group."""

    def open_place(self, host: str) -> "SleepingGroups":
        return self

    async def form(self, world_size: int, name: str, backend: str, timeout_seconds: float) -> "SleepingGroup":
        await asyncio.sleep(JOIN_SECONDS)
        self.formed.append((name, world_size))
        return SleepingGroup(self, name)

    async def data_comes(self, group: str) -> None:
        waiting = asyncio.get_running_loop().create_future()
        self.wires.setdefault(group, []).append(waiting)
        await waiting

    def close(self) -> None:
        pass


class SleepingGroup:
    def __init__(self, groups: SleepingGroups, name: str) -> None:
        self._groups = groups
        self._name = name

    async def broadcast(self, data: Tensor) -> None:
        groups = self._groups
        groups.num_broadcasts += 1
        await asyncio.sleep(BROADCAST_SECONDS)
        if groups.num_broadcasts == groups.breaks_at:
            raise RuntimeError("connection reset by peer")
        for waiting in groups.wires.pop(self._name, []):
            waiting.set_result(None)

    async def leave(self) -> None:
        self._groups.num_left += 1
        self._groups.on_leave()
        for waiting in self._groups.wires.pop(self._name, []):
            waiting.set_exception(EngineRefused("connection closed"))


class Rig:
    """A publisher and three workers in one process."""

    def __init__(self, *, verify: bool = False) -> None:
        self.clock = asyncio.get_running_loop().time
        self.replicas = {name: Replica() for name in ("a", "b", "c")}
        self.fleet = Fleet(self.clock)
        self.group = SleepingGroups()
        for replica in self.replicas.values():
            replica.engine.data_comes = self.group.data_comes
        self.gather_seconds = 0.0
        self.gathered: list[tuple[str, float]] = []
        """The buckets that were gathered, and when that began."""
        self.num_messages = 0
        """The messages that the trainer sent."""
        self.num_replies = 0
        self.publisher: Publisher = WeightPublisher(
            self,
            NAMES,
            self.fleet,
            PublishedWeights(LAYOUT, self._gather),
            self.group,
            attempt=7,
            host="trainer",
            backend="gloo",
            model_bytes=0,
            timeout_seconds=PHASE_SECONDS,
            verify=verify,
        )

    async def request(self, subject: str, payload: bytes, timeout_seconds: float) -> bytes | None:
        """Pass on a request as the broker does."""
        self.num_messages += 1
        [name] = [name for name in self.replicas if NAMES.control(name) == subject]
        if self.replicas[name].is_silent:
            self.replicas[name].asked.append(decode_request(payload))
            await asyncio.sleep(timeout_seconds)
            return None
        return await self._answer(name, payload)

    @contextlib.asynccontextmanager
    async def request_all(
        self, subject: str, payload: bytes, heard: Callable[[bytes | None], None]
    ) -> AsyncIterator[None]:
        """Pass on a request to all, as the broker does."""
        assert subject == NAMES.control_all
        self.num_messages += 1

        async def ask(name: str) -> None:
            heard(await self._answer(name, payload))

        listening = [name for name, each in self.replicas.items() if not each.is_silent]
        asked = [asyncio.create_task(ask(name)) for name in listening]
        yield
        del asked

    async def _answer(self, name: str, payload: bytes) -> bytes:
        replica, request = self.replicas[name], decode_request(payload)
        replica.asked.append(request)
        reply = await replica.updates.handle(request)
        self.num_replies += 1
        return encode(msgspec.structs.replace(reply, worker=name))

    async def publish(self, version: PolicyVersion, interrupt: str = "Retract") -> tuple[set[str], int]:
        """Return which engines got the version, in how many epochs; workers speak meanwhile."""
        speaking = asyncio.create_task(self.speak())
        await asyncio.sleep(0)
        try:
            published = await self.publisher.publish(version, interrupt)
        finally:
            speaking.cancel()
        return set(published.engines), published.num_epochs

    async def speak(self) -> None:
        while True:
            for name, replica in self.replicas.items():
                if replica.is_dead:
                    continue
                beat = Heartbeat(
                    worker=name,
                    incarnation="i",
                    engine="e",
                    engine_state=replica.updates.state,
                    version=replica.engine.weights.version,
                )
                self.fleet.heard(beat)
            await asyncio.sleep(1)

    def versions(self) -> dict[str, str]:
        """Return the version that each engine reports."""
        return {name: replica.engine.own_label for name, replica in self.replicas.items()}

    async def _gather(self, names: tuple[str, ...]) -> Tensor:
        self.gathered.append((names[0], self.clock()))
        await asyncio.sleep(self.gather_seconds)
        return torch.zeros(4, dtype=torch.uint8)


def virtually(check: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await check()

    run_in_virtual_time(run())


def test_an_epoch_takes_as_long_as_its_join_and_its_broadcasts() -> None:
    async def check() -> None:
        rig = Rig()
        rig.replicas["b"].engine.tp_size = 4
        assert await rig.publish(V0) == ({"a", "b", "c"}, 1)
        assert rig.clock() == pytest.approx(JOIN_SECONDS + NUM_BUCKETS * BROADCAST_SECONDS)
        assert rig.versions() == {"a": "1.0", "b": "1.0", "c": "1.0"}
        assert {name: each.joins[0].rank for name, each in rig.replicas.items()} == {"a": 1, "b": 2, "c": 6}
        assert rig.group.formed == [("wu-7-1", 7)]

    virtually(check)


def test_a_group_is_used_again_for_the_same_engines() -> None:
    async def check() -> None:
        rig = Rig()
        await rig.publish(V0)
        began = rig.clock()
        assert await rig.publish(V1) == ({"a", "b", "c"}, 1)
        assert rig.clock() - began == pytest.approx(NUM_BUCKETS * BROADCAST_SECONDS)
        assert len(rig.group.formed) == 1 and rig.versions()["a"] == "1.1"
        assert await rig.publish(V1) == (set(), 0), "nobody lacks it"

    virtually(check)


def test_who_refuses_a_bucket_is_left_out_of_the_publication_and_tried_in_the_next() -> None:
    async def check() -> None:
        rig = Rig()
        await rig.publish(V0)
        broken = rig.replicas["b"]
        broken.engine.faults["load_bucket"] = EngineRefused("no memory")
        assert await rig.publish(V1) == ({"a", "c"}, 2)
        assert rig.group.formed == [("wu-7-1", 4), ("wu-7-2", 3)] and rig.group.num_left == 1
        assert broken.updates.state == "dirty" and rig.versions() == {"a": "1.1", "b": "1.0", "c": "1.1"}
        broken.engine.faults.clear()
        assert await rig.publish(V1) == ({"b"}, 1)
        assert broken.updates.state == "ready"

    virtually(check)


def test_after_a_broken_broadcast_all_who_still_answer_are_tried_again() -> None:
    async def check() -> None:
        rig = Rig()
        rig.group.breaks_at = 2
        assert await rig.publish(V0) == ({"a", "b", "c"}, 2)
        assert rig.group.formed == [("wu-7-1", 4), ("wu-7-2", 4)]

    virtually(check)


def test_who_refused_a_broadcast_that_broke_is_suspected_alone_and_tried_again() -> None:
    """It may have had its data from an engine that is gone."""

    async def check() -> None:
        rig = Rig()
        rig.group.breaks_at = 1
        rig.replicas["b"].engine.faults["receive_bucket"] = EngineRefused("connection reset")
        rig.group.on_leave = rig.replicas["b"].engine.faults.clear
        assert await rig.publish(V0) == ({"a", "b", "c"}, 2)

    virtually(check)


@pytest.mark.parametrize("num_buckets", [1, 10])
def test_messages_do_not_grow_with_buckets(num_buckets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three messages to all, and an answer of each engine to each."""
    layout = tuple(describe([(f"w{number}", torch.float32, (1,))]) for number in range(num_buckets))
    monkeypatch.setitem(globals(), "LAYOUT", layout)

    async def check() -> None:
        rig = Rig()
        await rig.publish(V0)
        rig.num_messages = rig.num_replies = 0
        assert await rig.publish(V1) == ({"a", "b", "c"}, 1)
        assert rig.group.num_broadcasts == 2 * num_buckets
        assert (rig.num_messages, rig.num_replies) == (3, 9)

    virtually(check)


def test_who_comes_late_joins_once_and_nobody_joins_again() -> None:
    async def check() -> None:
        rig = Rig()
        late = rig.replicas.pop("c")
        await rig.publish(V0)
        rig.replicas["c"] = late
        assert await rig.publish(V0) == ({"c"}, 1)
        for version in (V1, PolicyVersion(1, 2)):
            assert await rig.publish(version) == ({"a", "b", "c"}, 1)
        assert {name: len(each.joins) for name, each in rig.replicas.items()} == {"a": 1, "b": 1, "c": 1}
        assert rig.group.formed == [("wu-7-1", 3), ("wu-7-2", 2)] and rig.group.num_left == 0

    virtually(check)


def test_at_the_next_change_all_join_one_group() -> None:
    async def check() -> None:
        rig = Rig()
        late = rig.replicas.pop("c")
        await rig.publish(V0)
        rig.replicas["c"] = late
        await rig.publish(V0)
        rig.replicas["b"].engine.faults["load_bucket"] = EngineRefused("no memory")
        assert await rig.publish(V1) == ({"a", "c"}, 2)
        assert rig.group.formed[2:] == [("wu-7-3", 3)]

    virtually(check)


def test_groups_of_many_who_came_late_are_merged_with_the_next_version() -> None:
    async def check() -> None:
        rig = Rig()
        late = [(name, rig.replicas.pop(name)) for name in ("b", "c")]
        await rig.publish(V0)
        for name, replica in late:
            rig.replicas[name] = replica
            assert await rig.publish(V0) == ({name}, 1)
        assert [size for _, size in rig.group.formed] == [2, 2, 2]
        for version in (V1, PolicyVersion(1, 2)):
            assert await rig.publish(version) == ({"a", "b", "c"}, 1)
        assert [size for _, size in rig.group.formed] == [2, 2, 2, 4]

    virtually(check)


def test_a_bucket_is_gathered_while_the_one_before_travels_and_the_first_before_the_pause() -> None:
    async def check() -> None:
        rig = Rig()
        await rig.publish(V0)
        rig.gather_seconds, began = BROADCAST_SECONDS - 1, rig.clock()
        rig.gathered.clear()
        assert await rig.publish(V1) == ({"a", "b", "c"}, 1)
        assert rig.clock() - began == pytest.approx(rig.gather_seconds + NUM_BUCKETS * BROADCAST_SECONDS)
        starts = [at - began for _, at in rig.gathered]
        assert starts == pytest.approx([0, rig.gather_seconds, rig.gather_seconds + BROADCAST_SECONDS])

    virtually(check)


def test_the_time_of_a_publication_is_told_by_what_it_went_into() -> None:
    async def check() -> None:
        rig = Rig()
        rig.gather_seconds = 3.0
        speaking = asyncio.create_task(rig.speak())
        await asyncio.sleep(0)
        seconds = (await rig.publisher.publish(V0, "Retract")).seconds
        speaking.cancel()
        assert seconds is not None
        assert seconds.gather == pytest.approx(3) and seconds.load == pytest.approx(0)
        assert seconds.transfer == pytest.approx(NUM_BUCKETS * BROADCAST_SECONDS)
        assert seconds.pause == pytest.approx(3 + NUM_BUCKETS * BROADCAST_SECONDS)

    virtually(check)


def test_who_falls_silent_in_a_phase_is_not_waited_for_to_its_deadline() -> None:
    async def check() -> None:
        rig = Rig()
        await rig.publish(V0)
        dead = rig.replicas["b"]
        dead.is_silent = dead.is_dead = True
        began = rig.clock()
        engines, _ = await rig.publish(V1)
        assert engines == {"a", "c"}
        assert rig.clock() - began < PHASE_SECONDS + JOIN_SECONDS + NUM_BUCKETS * BROADCAST_SECONDS

    virtually(check)


def test_a_publication_that_is_broken_off_sets_the_engines_free() -> None:
    async def check() -> None:
        rig = Rig()
        publication = asyncio.create_task(rig.publish(V0))
        await asyncio.sleep(JOIN_SECONDS + 1.5 * BROADCAST_SECONDS)
        publication.cancel()
        await asyncio.wait({publication})
        await asyncio.sleep(1)
        assert {each.updates.state for each in rig.replicas.values()} == {"dirty"}
        assert await rig.publish(V1) == ({"a", "b", "c"}, 1)

    virtually(check)


def test_a_silent_worker_costs_one_probe() -> None:
    async def check() -> None:
        rig = Rig()
        rig.replicas["c"].is_silent = True
        assert await rig.publish(V0) == ({"a", "b"}, 2)
        assert [type(request).__name__ for request in rig.replicas["c"].asked] == ["ProbeEngine"]

    virtually(check)


def test_only_engines_that_have_let_their_samples_finish_are_updated() -> None:
    async def check() -> None:
        rig = Rig()
        rig.replicas["a"].num_running = 2
        assert await rig.publish(V0, "Drain") == ({"b", "c"}, 1)
        rig.replicas["a"].num_running = 0
        assert await rig.publish(V0, "Drain") == ({"a"}, 1)

    virtually(check)


def test_engines_are_asked_once_to_drain_and_then_tell_how_far_they_are() -> None:
    """The trainer looks whenever a worker speaks, so one question at each look grows with their square."""

    async def check() -> None:
        rig = Rig()
        await rig.publish(V0)
        for replica in rig.replicas.values():
            replica.num_running = 2
        speaking = asyncio.create_task(rig.speak())
        await asyncio.sleep(0.1)
        for _ in range(20):
            assert (await rig.publisher.publish(V1, "Drain")).num_epochs == 0
            await asyncio.sleep(0.3)
        questions = [type(each).__name__ for replica in rig.replicas.values() for each in replica.asked]
        assert questions.count("DrainEngine") == 3
        rig.replicas["a"].num_running = 0
        await asyncio.sleep(1)
        assert (await rig.publisher.publish(V1, "Drain")).engines == ("a",)
        speaking.cancel()

    virtually(check)


def test_an_engine_that_has_forgotten_that_it_was_to_drain_is_asked_again() -> None:
    async def check() -> None:
        rig = Rig()
        await rig.publish(V0)
        forgetful = rig.replicas["a"]
        forgetful.num_running = 2
        assert await rig.publish(V1, "Drain") == ({"b", "c"}, 1)
        forgetful.updates.engine_restarted()
        forgetful.engine.weights.version = V0
        await rig.publish(V1, "Drain")
        assert forgetful.updates.state == "draining"

    virtually(check)


def test_what_an_engine_said_before_its_update_does_not_count_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(globals(), "BROADCAST_SECONDS", 0.01)
    monkeypatch.setitem(globals(), "JOIN_SECONDS", 0.01)

    async def check() -> None:
        rig = Rig()
        await rig.publish(V0)
        rig.replicas["a"].num_running = 1
        assert await rig.publish(V1, "Drain") == ({"b", "c"}, 1)
        rig.replicas["a"].num_running = 0
        await rig.publisher.leave()
        speaking = asyncio.create_task(rig.speak())
        await asyncio.sleep(1.1)
        speaking.cancel()
        assert (await rig.publisher.publish(V1, "Drain")).engines == ("a",)
        rig.replicas["a"].num_running = 2  # its last word is that it is drained
        assert (await rig.publisher.publish(PolicyVersion(1, 2), "Drain")).engines == ("b", "c")

    virtually(check)


def test_engines_that_were_sent_the_same_and_hold_something_else_are_told() -> None:
    async def check() -> None:
        rig = Rig(verify=True)
        rig.replicas["c"].engine.digest = "decaf"
        with pytest.raises(ChecksumMismatch, match="decaf"):
            await rig.publish(V0)

    virtually(check)


@pytest.mark.parametrize("call", ["join_group", "begin_update", "receive_bucket", "end_update", "resume"])
def test_a_refusal_that_every_engine_repeats_for_long_is_final(call: str) -> None:
    """They are alive, so nobody restarts them, and the trainer would wait for them for ever."""

    async def check() -> None:
        rig = Rig()
        for replica in rig.replicas.values():
            replica.engine.faults[call] = EngineRefused(f"/{call}: no such weight: model.layers.3")
        began = rig.clock()
        for step in range(1, 1000):
            try:
                await rig.publish(PolicyVersion(1, step))
            except WeightsRefused as error:
                assert "a: " in str(error) and "spec.rollout.engine.image" in str(error)
                assert step >= MIN_REFUSALS and rig.clock() - began >= REFUSED_SECONDS
                return
            await asyncio.sleep(2)
        raise AssertionError("the trainer goes on with nobody")

    run_in_virtual_time(check())


@pytest.mark.parametrize("way_out", ["one takes it", "other words", "it passes", "not heard yet"])
def test_a_refusal_that_passes_is_not_final(way_out: str) -> None:
    async def check() -> None:
        rig = Rig()
        refusal = EngineRefused("/begin_update: a session is open")
        for name, replica in rig.replicas.items():
            if (name, way_out) != ("a", "one takes it"):
                replica.engine.faults["begin_update"] = refusal
        for step in range(1, 400):
            if step % 20 == 0 and way_out == "it passes":
                for replica in rig.replicas.values():
                    replica.engine.faults.clear()
            elif way_out == "it passes":
                for replica in rig.replicas.values():
                    replica.engine.faults["begin_update"] = refusal
            elif way_out == "other words":
                word = "busy" if step % 2 else "updating"
                rig.replicas["a"].engine.faults["begin_update"] = EngineRefused(word)
            elif way_out == "not heard yet":  # a new pod, whose engine has not been asked
                beat = Heartbeat(
                    worker=f"new-{step}", incarnation="i", engine="e", engine_state="down", version=None
                )
                rig.fleet.heard(beat)
            await rig.publish(PolicyVersion(1, step))
            await asyncio.sleep(2)
        assert rig.clock() > 2 * REFUSED_SECONDS

    run_in_virtual_time(check())


def test_an_adapter_that_every_engine_refuses_for_long_is_final() -> None:
    async def adapter() -> Adapter:
        return Adapter("{}", b"1234")

    async def check() -> None:
        rig = Rig()
        publisher = AdapterPublisher(rig, NAMES, rig.fleet, adapter, attempt=7, num_bytes=4)
        for name, replica in rig.replicas.items():
            replica.updates = AdapterUpdates(replica.engine, lambda: 0)
            replica.engine.faults["load_adapter"] = EngineRefused(f"{name} has no LoRA support")
        rig.publisher = publisher
        with pytest.raises(WeightsRefused, match="a has no LoRA support; b: b has no LoRA support; c: c"):
            for step in range(1, 1000):
                await rig.publish(PolicyVersion(1, step))
                await asyncio.sleep(2)

    run_in_virtual_time(check())
