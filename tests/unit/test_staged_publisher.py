"""The controller's part where weights are staged, in virtual time; receivers that take their time."""

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
    DrainEngine,
    Heartbeat,
    LoadStaged,
    PolicyVersion,
    StageWeights,
    decode_request,
    encode,
)
from asyncrl_runtime.contract.staging import FetchedStage, FetchStage
from asyncrl_runtime.rollout.engine_api import EngineRefused
from asyncrl_runtime.rollout.receiver_client import ReceiverFailed
from asyncrl_runtime.rollout.staged_updates import StagedUpdates
from asyncrl_runtime.weights.bucket import PublishedWeights, describe
from asyncrl_runtime.weights.engines import (
    BASE_SECONDS,
    MIN_REFUSALS,
    REFUSED_SECONDS,
    Published,
    WeightsRefused,
)
from asyncrl_runtime.weights.fleet import Fleet
from asyncrl_runtime.weights.publisher import ChecksumMismatch
from asyncrl_runtime.weights.staged_publisher import StagedPublisher
from support.fakes import UpdatableEngine, run_in_virtual_time

V0, V1 = PolicyVersion(1, 0), PolicyVersion(1, 1)
NAMES = JobNames(job="team_gsm8k")
FETCH_SECONDS = 5.0
GB = 10**9


class StagedReplica:
    """An engine, its worker and its receiver."""

    def __init__(self) -> None:
        self.engine = UpdatableEngine()
        self.updates = StagedUpdates(self.engine, lambda: self.num_running, receiver=self)
        self.num_running = 0
        self.fetch_seconds = FETCH_SECONDS
        self.fault = ""
        self.asked: list[ControlRequest] = []

    async def fetch(self, asked: FetchStage) -> FetchedStage:
        await asyncio.sleep(self.fetch_seconds)
        if self.fault:
            raise ReceiverFailed(self.fault)
        return FetchedStage(folder="/staging", num_bytes=7, is_whole=True)


class StagedRig:
    """A publisher and two workers in one process."""

    def __init__(self, *, verify: bool = False, model_bytes: int = 0, timeout_seconds: float = 0) -> None:
        self.clock = asyncio.get_running_loop().time
        self.replicas = {name: StagedReplica() for name in ("a", "b")}
        self.fleet = Fleet(self.clock)
        self.num_gathered = 0
        layout = (describe([("w", torch.float32, (1,))]),)
        self.publisher = StagedPublisher(
            self,
            NAMES,
            self.fleet,
            PublishedWeights(layout, self._gather),
            "{}",
            attempt=1,
            host="127.0.0.1",
            secret=b"secret",
            model_bytes=model_bytes,
            timeout_seconds=timeout_seconds,
            verify=verify,
        )

    async def _gather(self, names: tuple[str, ...]) -> Tensor:
        self.num_gathered += 1
        return torch.zeros(4, dtype=torch.uint8)

    async def request(self, subject: str, payload: bytes, timeout_seconds: float) -> bytes | None:
        """Pass on a request as the broker does."""
        [(name, replica)] = [each for each in self.replicas.items() if NAMES.control(each[0]) == subject]
        request = decode_request(payload)
        replica.asked.append(request)
        return encode(msgspec.structs.replace(await replica.updates.handle(request), worker=name))

    @contextlib.asynccontextmanager
    async def request_all(
        self, subject: str, payload: bytes, heard: Callable[[bytes | None], None]
    ) -> AsyncIterator[None]:
        raise AssertionError("each engine is asked by itself")
        yield

    async def publish(self, version: PolicyVersion, interrupt: str = "Retract") -> Published:
        """Publish, while the workers speak."""
        speaking = asyncio.create_task(self.speak())
        await asyncio.sleep(0)
        try:
            return await self.publisher.publish(version, interrupt)
        finally:
            speaking.cancel()

    async def speak(self) -> None:
        while True:
            for name, replica in self.replicas.items():
                beat = Heartbeat(
                    worker=name,
                    incarnation="i",
                    engine="e",
                    engine_state=replica.updates.state,
                    version=replica.engine.weights.version,
                )
                self.fleet.heard(beat)
            await asyncio.sleep(1)


def virtually(check: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await check()

    run_in_virtual_time(run())


@pytest.fixture(autouse=True)
def in_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """In virtual time nothing waits for a thread."""

    async def here(function: Callable[..., object], *arguments: object) -> object:
        return function(*arguments)

    monkeypatch.setattr("asyncrl_runtime.weights.stage_image.asyncio.to_thread", here)


def test_all_fetch_at_the_same_time_and_only_the_load_is_a_pause() -> None:
    async def check() -> None:
        rig = StagedRig()
        rig.replicas["b"].fetch_seconds = 2 * FETCH_SECONDS
        published = await rig.publish(V0)
        assert set(published.engines) == {"a", "b"} and published.failed == ()
        assert rig.clock() == pytest.approx(2 * FETCH_SECONDS)
        assert published.seconds is not None
        assert published.seconds.transfer == pytest.approx(2 * FETCH_SECONDS)
        assert published.seconds.pause < 0.1
        assert rig.publisher.num_engines(V0) == 2
        assert await rig.publish(V0) == Published(), "nobody lacks it"
        assert rig.num_gathered == 1

    virtually(check)


def test_who_lost_his_receiver_is_left_out_and_asked_again_without_gathering_anew() -> None:
    async def check() -> None:
        rig = StagedRig()
        rig.replicas["b"].fault = "connection refused"
        published = await rig.publish(V0)
        assert published.engines == ("a",) and published.failed == ("b",)
        assert rig.replicas["b"].engine.made == [], "its engine is left alone"
        rig.replicas["b"].fault = ""
        assert (await rig.publish(V0)).engines == ("b",)
        assert rig.num_gathered == 1

    virtually(check)


def test_an_engine_that_does_not_load_is_asked_again() -> None:
    async def check() -> None:
        rig = StagedRig()
        rig.replicas["b"].engine.fails_at("load_folder", 1, EngineRefused("no memory"))
        published = await rig.publish(V0)
        assert published.engines == ("a",) and rig.replicas["b"].updates.state == "dirty"
        assert (await rig.publish(V0)).engines == ("b",) and rig.replicas["b"].updates.state == "ready"

    virtually(check)


def test_samples_that_may_finish_do_so_after_the_transfer() -> None:
    async def check() -> None:
        rig = StagedRig()
        await rig.publish(V0, "Drain")
        busy = rig.replicas["b"]
        busy.num_running = 1
        busy.asked.clear()
        assert (await rig.publish(V1, "Drain")).engines == ("a",)
        assert list(map(type, busy.asked)) == [StageWeights, DrainEngine]
        busy.num_running = 0
        assert (await rig.publish(V1, "Drain")).engines == ("b",)
        assert isinstance(busy.asked[-1], LoadStaged)

    virtually(check)


def test_if_all_engines_refuse_for_good_the_job_ends() -> None:
    async def check() -> None:
        rig = StagedRig()
        for replica in rig.replicas.values():
            replica.engine.faults["load_folder"] = EngineRefused("another shape")
        with pytest.raises(WeightsRefused, match="another shape"):
            for _ in range(MIN_REFUSALS + 1):
                await rig.publish(V0)
                await asyncio.sleep(REFUSED_SECONDS / MIN_REFUSALS)

    virtually(check)


def test_engines_that_hold_different_weights_are_noticed() -> None:
    async def check() -> None:
        rig = StagedRig(verify=True)
        rig.replicas["b"].engine.digest = "bad"
        with pytest.raises(ChecksumMismatch):
            await rig.publish(V0)

    virtually(check)


@pytest.mark.parametrize(("given", "seconds"), [(0.0, BASE_SECONDS + 20 * 100 * GB / 500e6), (77.0, 77.0)])
def test_receivers_share_what_the_trainer_can_send(given: float, seconds: float) -> None:
    """Unless the user says how long a transfer may take."""

    async def check() -> None:
        rig = StagedRig(model_bytes=100 * GB, timeout_seconds=given)
        rig.replicas = {f"w{number}": StagedReplica() for number in range(20)}
        await rig.publish(V0)
        request = rig.replicas["w0"].asked[0]
        assert isinstance(request, StageWeights) and request.timeout_seconds == pytest.approx(seconds)

    virtually(check)
