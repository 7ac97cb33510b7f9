"""A worker's part in weight epochs: the state of the engine after whatever went wrong."""

import asyncio

import pytest

from asyncrl_runtime.contract.messages import (
    BucketLayout,
    CommitUpdate,
    ControlReply,
    ControlRequest,
    DrainEngine,
    JoinGroup,
    PolicyVersion,
    PrepareUpdate,
    ProbeEngine,
    ReceiveWeights,
)
from asyncrl_runtime.rollout.engine_api import CONTROL_SECONDS, EngineLost, EngineRefused
from asyncrl_runtime.rollout.weight_updates import WeightUpdates
from support.fakes import UpdatableEngine, run_in_virtual_time

V0, V1, V2 = (PolicyVersion(1, version) for version in range(3))
PHASE_SECONDS = 30.0
LAYOUT = tuple(BucketLayout((name,), ("float32",), ((2, 3),)) for name in ("v", "w"))

JOIN, LEAVE, PAUSE, BEGIN = "join_group", "leave_group", "pause", "begin_update"
RECEIVE, END, CHECK, CONTINUE = "receive_bucket", "end_update", "checksum", "resume"


class Controller:
    """Asks a receiver for the phases of an epoch, in order."""

    def __init__(self, num_running: int = 0) -> None:
        self.engine = UpdatableEngine()
        self.num_running = num_running
        self.updates = WeightUpdates(self.engine, lambda: self.num_running)

    async def ask(self, *requests: ControlRequest) -> list[ControlReply]:
        """Stop at the first no, as the controller does."""
        replies: list[ControlReply] = []
        for request in requests:
            replies.append(await self.updates.handle(request))
            if not replies[-1].ok:
                break
        return replies

    async def update(self, version: PolicyVersion, interrupt: str = "Retract") -> bool:
        """A whole epoch of two buckets; returns whether all was answered with yes."""
        return all(reply.ok for reply in await self.ask(*epoch(version, interrupt)))


def epoch(version: PolicyVersion, interrupt: str = "Retract", group: str = "") -> list[ControlRequest]:
    group = group or f"wu-{version}"
    return [
        JoinGroup(
            group=group,
            host="h",
            port=1,
            rank=2,
            world_size=3,
            backend="gloo",
            timeout_seconds=PHASE_SECONDS + 5,
            layout=LAYOUT,
        ),
        PrepareUpdate(
            groups=("another", group), version=version, interrupt=interrupt, timeout_seconds=PHASE_SECONDS
        ),
        ReceiveWeights(groups=("another", group), version=version, timeout_seconds=PHASE_SECONDS),
        CommitUpdate(groups=("another", group), version=version, checksum=True),
    ]


# -- a whole epoch


async def test_an_epoch_makes_these_calls_and_the_engine_samples_with_the_version() -> None:
    controller = Controller()
    updates, engine = controller.updates, controller.engine
    states = [updates.state]
    for request in epoch(V1):
        [reply] = await controller.ask(request)
        states.append(updates.state)
    assert states == ["empty", "empty", "updating", "updating", "ready"]
    assert engine.made == [JOIN, PAUSE, BEGIN, RECEIVE, RECEIVE, END, CHECK, CONTINUE]
    assert reply.checksum == "c0ffee" and engine.weights.version == V1 and engine.own_label == "1.1"
    assert not engine.is_paused and not engine.has_session
    assert (engine.weights.num_updates_begun, engine.weights.num_updates_completed) == (1, 1)
    assert engine.calls[0] == (JOIN, epoch(V1)[0])


@pytest.mark.parametrize(
    ("interrupt", "keeps_cache"), [("Retract", False), ("InPlace", True), ("Drain", False)]
)
async def test_the_cache_is_kept_where_samples_are_interrupted_in_place(
    interrupt: str, keeps_cache: bool
) -> None:
    controller = Controller()
    assert await controller.update(V1, interrupt)
    assert (PAUSE, interrupt) in controller.engine.calls
    assert [what for call, what in controller.engine.calls if call == RECEIVE] == [keeps_cache] * 2


async def test_a_group_is_used_again_and_left_for_another() -> None:
    controller = Controller()
    await controller.ask(*epoch(V0, group="first"))
    assert all(reply.ok for reply in await controller.ask(*epoch(V1, group="first")[1:]))
    assert await controller.update(V1)
    assert controller.engine.groups == {"wu-1.1"}


# -- something fails


@pytest.mark.parametrize(
    ("path", "bucket", "state", "is_paused"),
    [
        (JOIN, 0, "ready", False),
        (PAUSE, 0, "ready", False),
        (BEGIN, 0, "ready", False),
        (RECEIVE, 1, "dirty", True),
        (RECEIVE, 2, "dirty", True),
        (END, 2, "dirty", True),
        (CHECK, 2, "dirty", True),
        (CONTINUE, 2, "dirty", True),
    ],
)
async def test_after_a_refusal_it_goes_on_at_the_old_version_or_waits_for_everything(
    path: str, bucket: int, state: str, is_paused: bool
) -> None:
    """It goes on if no bucket had begun; otherwise it is paused, and clean again after the next epoch."""
    controller = Controller()
    engine = controller.engine
    assert await controller.update(V0)
    if (path, bucket) == (RECEIVE, 2):
        engine.fails_at(RECEIVE, 2, EngineRefused("told to"))
    else:
        engine.faults[path] = EngineRefused("told to")
    replies = await controller.ask(*epoch(V1))
    assert not replies[-1].ok and (replies[-1].message, replies[-1].bucket) == ("told to", bucket)
    assert (controller.updates.state, engine.is_paused) == (state, is_paused)
    assert engine.groups == set() and engine.has_session == (path == END)
    assert not controller.updates.has_missed_deadline

    engine.faults.clear()
    engine.has_session = False
    assert await controller.update(V1)
    assert controller.updates.state == "ready" and engine.own_label == "1.1" and not engine.is_paused


async def test_an_epoch_that_was_given_up_elsewhere_is_followed_by_another() -> None:
    """This engine was ready, or had a bucket, when another one failed; it hears only of the next epoch."""
    for done in (2, 3):
        controller = Controller()
        await controller.ask(*epoch(V1, group="given-up")[:done])
        assert await controller.update(V1)
        assert controller.updates.state == "ready" and controller.engine.groups == {"wu-1.1"}


@pytest.mark.parametrize("place", [1, 2, 3])
async def test_a_phase_of_another_group_changes_nothing(place: int) -> None:
    """It came to all, and others are meant: what is under way here goes on."""
    controller = Controller()
    await controller.ask(*epoch(V1)[:place])
    num_calls, state = len(controller.engine.calls), controller.updates.state
    [reply] = await controller.ask(epoch(V1, group="wu-9-9")[place])
    assert reply.message == "asked for group another, wu-9-9, but this engine is in wu-1.1"
    assert (len(controller.engine.calls), controller.updates.state) == (num_calls, state)
    assert all(reply.ok for reply in await controller.ask(*epoch(V1)[place:]))


async def test_buckets_and_commits_without_an_update_are_refused() -> None:
    controller = Controller()
    join, prepare, receive, commit = epoch(V1)
    assert (await controller.ask(join, receive))[-1].message == "no update is open"
    assert (await controller.ask(join, prepare, commit))[-1].message == "nothing was received"
    assert controller.updates.state == "empty" and controller.engine.weights.version is None


async def test_a_dead_engine_is_known_by_the_answer_and_by_the_probe() -> None:
    controller = Controller()
    assert [reply.ok for reply in await controller.ask(ProbeEngine())] == [True]
    for path in ("label", JOIN):
        controller.engine.faults[path] = EngineLost("connection refused")
    assert (await controller.ask(ProbeEngine()))[0].message == "connection refused"
    assert (await controller.ask(epoch(V1)[0]))[0].message == "connection refused"


async def test_the_probe_says_how_many_ranks_the_engine_takes() -> None:
    controller = Controller()
    controller.engine.tp_size = 4
    assert (await controller.ask(ProbeEngine()))[0].num_ranks == 4
    controller.engine.tp_size = 2
    controller.updates.engine_restarted()
    assert (await controller.ask(ProbeEngine()))[0].num_ranks == 2


# -- time


@pytest.mark.parametrize(
    ("place", "seconds"),
    [(0, PHASE_SECONDS + 5), (1, CONTROL_SECONDS), (2, PHASE_SECONDS), (3, CONTROL_SECONDS)],
)
def test_an_engine_that_hangs_costs_one_deadline_and_is_to_be_restarted(place: int, seconds: float) -> None:
    """No call follows the one that was not answered, because each would take as long."""

    async def check() -> None:
        controller = Controller()
        updates, engine = controller.updates, controller.engine
        await controller.ask(*epoch(V1)[:place])
        engine.hangs = True
        num_calls, now = len(engine.calls), asyncio.get_running_loop().time()
        [reply] = await controller.ask(epoch(V1)[place])
        assert not reply.ok and "no answer in" in reply.message
        assert len(engine.calls) == num_calls + 1
        assert asyncio.get_running_loop().time() - now == pytest.approx(seconds)
        assert updates.has_missed_deadline
        [reply] = await controller.ask(ProbeEngine())
        assert not reply.ok and "waits to be restarted" in reply.message
        await updates.leave()
        assert len(engine.calls) == num_calls + 1

        engine.hangs = False
        engine.start()
        updates.engine_restarted()
        assert updates.state == "empty" and not updates.has_missed_deadline
        assert await controller.update(V1) and updates.state == "ready"

    run_in_virtual_time(check())


@pytest.mark.parametrize(("place", "state", "is_paused"), [(1, "ready", False), (2, "dirty", True)])
def test_a_silent_controller_is_left_after_the_deadline_of_a_phase(
    place: int, state: str, is_paused: bool
) -> None:
    async def check() -> None:
        controller = Controller()
        updates, engine = controller.updates, controller.engine
        assert await controller.update(V0)
        for request in epoch(V1)[: place + 1]:
            await controller.ask(request)
            await asyncio.sleep(PHASE_SECONDS - 1)  # each phase has all its time
        assert updates.state == "updating" and engine.has_session
        await asyncio.sleep(2)
        assert (updates.state, engine.is_paused) == (state, is_paused)
        assert not engine.has_session and not engine.groups
        [reply] = await controller.ask(epoch(V1)[place + 1])
        assert not reply.ok

    run_in_virtual_time(check())


def test_outside_an_update_nobody_waits_for_the_controller() -> None:
    async def check() -> None:
        controller = Controller()
        await controller.ask(epoch(V1)[0])
        await asyncio.sleep(10 * PHASE_SECONDS)
        assert all(reply.ok for reply in await controller.ask(*epoch(V1)[1:]))
        num_calls = len(controller.engine.calls)
        await asyncio.sleep(10 * PHASE_SECONDS)
        assert controller.updates.state == "ready" and len(controller.engine.calls) == num_calls

    run_in_virtual_time(check())


# -- draining, leaving


async def test_draining_ends_with_the_last_sample_and_is_over_with_the_update() -> None:
    controller = Controller(num_running=2)
    assert await controller.update(V0)
    assert (await controller.ask(DrainEngine()))[0].ok is False
    assert controller.updates.state == "draining"
    controller.num_running = 0
    assert controller.updates.state == "drained"
    assert (await controller.ask(DrainEngine()))[0].ok is True
    assert await controller.update(V1, "Drain")
    assert controller.updates.state == "ready"


async def test_an_engine_without_weights_stays_empty_when_it_is_to_drain() -> None:
    """Its monitor would take an engine that is drained, and has no label of ours, for another process."""
    controller = Controller()
    assert (await controller.ask(DrainEngine(version=V0)))[0].ok is True
    assert controller.updates.state == "empty"


async def test_an_engine_that_has_the_version_does_not_drain_for_it() -> None:
    """Nobody brings it weights, so nobody would ever end its wait."""
    controller = Controller()
    assert await controller.update(V0)
    assert (await controller.ask(DrainEngine(version=V0)))[0].ok is False
    assert controller.updates.state == "ready"
    assert (await controller.ask(DrainEngine(version=V1)))[0].ok is True
    assert controller.updates.state == "drained"


@pytest.mark.parametrize("num_phases", range(5))
async def test_a_worker_that_ends_leaves_the_group_and_the_update(num_phases: int) -> None:
    controller = Controller()
    await controller.ask(*epoch(V1)[:num_phases])
    await controller.updates.leave()
    assert not controller.engine.groups and not controller.engine.has_session
    assert controller.engine.is_paused == (num_phases == 3)  # weights of two versions must not sample
