"""What is relied on of a broker (contract/broker.py), of NATS and of the one in memory alike."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from asyncrl_api.names import JobNames, NatsAddress
from asyncrl_runtime.contract.broker import (
    Delivery,
    DeliverySource,
    StreamMessage,
    TrainerBroker,
    TransportError,
    WorkerBroker,
    WrongLastSequence,
)
from asyncrl_runtime.contract.messages import Heartbeat, ResumePoint
from asyncrl_runtime.history.ledger_writer import Superseded
from asyncrl_runtime.simulation import memory_broker
from asyncrl_runtime.simulation.memory_broker import MemoryBroker
from asyncrl_runtime.transport import streams
from asyncrl_runtime.transport.trainer_end import TrainerEnd
from asyncrl_runtime.transport.worker_end import WorkerEnd

STORAGE_BYTES = 4 * 2**20
DEADLINE_SECONDS = 60.0
QUESTION_ACK_WAIT = 1.0


class Ends:
    """Makes ends of one job's broker."""

    def __init__(
        self,
        trainer: Callable[[], Awaitable[TrainerBroker]],
        worker: Callable[[str], Awaitable[WorkerBroker]],
    ) -> None:
        self.trainer = trainer
        self.worker = worker


@pytest.fixture(params=["NATS", "memory"])
async def ends(
    request: pytest.FixtureRequest, names: JobNames, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Ends]:
    """The streams are not made yet."""
    monkeypatch.setattr(streams, "QUESTION_ACK_WAIT_SECONDS", QUESTION_ACK_WAIT)
    monkeypatch.setattr(memory_broker, "QUESTION_ACK_WAIT_SECONDS", QUESTION_ACK_WAIT)
    async with AsyncExitStack() as stack:
        if request.param == "memory":
            broker = MemoryBroker(names, STORAGE_BYTES)

            async def memory_trainer() -> TrainerBroker:
                return broker.trainer_end()

            async def memory_worker(name: str) -> WorkerBroker:
                return broker.worker_end(name)

            yield Ends(memory_trainer, memory_worker)
            return
        address: NatsAddress = request.getfixturevalue("nats_address")

        async def nats_trainer() -> TrainerBroker:
            end = await TrainerEnd.connect(address, names, "trainer", STORAGE_BYTES)
            stack.push_async_callback(end.close)
            return end

        async def nats_worker(name: str) -> WorkerBroker:
            end = await WorkerEnd.connect(address, names, name)
            stack.push_async_callback(end.close)
            return end

        yield Ends(nats_trainer, nats_worker)


@pytest.fixture
async def trainer(ends: Ends) -> TrainerBroker:
    """A trainer's end whose streams are made."""
    end = await ends.trainer()
    await end.make_streams(None, None)
    return end


async def until(what: str, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)
    assert condition(), what


async def taken(source: DeliverySource) -> Delivery:
    """The next delivery, however often it must be waited for."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (delivery := await source.take()) is None:
            pass
    return delivery


async def read(trainer: TrainerBroker, start: int, count: int) -> list[StreamMessage]:
    """The next trajectories from a sequence on."""
    reader = trainer.read_trajectories(start)
    messages: list[StreamMessage] = []
    async with asyncio.timeout(DEADLINE_SECONDS):
        while len(messages) < count:
            messages.append(await anext(reader))
    await reader.aclose()
    return messages


# -- tickets


async def test_tickets_go_out_once_and_in_order(ends: Ends, trainer: TrainerBroker) -> None:
    assert await trainer.issue([b"a", b"b", b"c"], 0) == 3
    sources = [await (await ends.worker(name)).tickets() for name in ("one", "two")]
    got = [await taken(sources[number % 2]) for number in range(3)]
    assert [(each.sequence, each.data) for each in got] == [(1, b"a"), (2, b"b"), (3, b"c")]
    assert not any(each.is_redelivered for each in got)
    assert all(each.is_ticket for each in got)
    assert await trainer.last_delivered_ticket() == 3
    assert await trainer.queued_tickets() == {1, 2, 3}
    await got[1].acknowledge()
    assert await trainer.queued_tickets() == {1, 3}


async def test_a_worker_that_waits_is_woken(ends: Ends, trainer: TrainerBroker) -> None:
    source = await (await ends.worker("one")).tickets()
    waiting = asyncio.create_task(taken(source))
    await asyncio.sleep(0.1)
    await trainer.issue([b"a"], 0)
    assert (await waiting).data == b"a"


async def test_a_queue_whose_stream_is_made_later_is_waited_for(ends: Ends) -> None:
    end = await ends.trainer()
    await end.make_streams(None, None)
    source = await (await ends.worker("one")).tickets()
    await end.delete_prompts()
    assert await end.prompts() is None
    assert await source.take() is None
    await end.make_streams(7, None)
    assert await end.issue([b"later"], 6) == 7
    assert (await taken(source)).sequence == 7


async def test_a_ticket_that_its_worker_hands_back_goes_to_the_next(
    ends: Ends, trainer: TrainerBroker
) -> None:
    await trainer.issue([b"a"], 0)
    one, two = [await (await ends.worker(name)).tickets() for name in ("one", "two")]
    await (await taken(one)).hand_back()
    again = await taken(two)
    assert (again.sequence, again.is_redelivered) == (1, True)


async def test_a_delayed_ticket_comes_back_after_the_others(ends: Ends, trainer: TrainerBroker) -> None:
    await trainer.issue([b"a", b"b"], 0)
    source = await (await ends.worker("one")).tickets()
    await (await taken(source)).hand_back(delay_seconds=0.5)
    assert [(await taken(source)).sequence for _ in range(2)] == [2, 1]


async def test_the_trainer_hands_back_what_a_dead_worker_held(ends: Ends, trainer: TrainerBroker) -> None:
    await trainer.issue([b"a", b"b"], 0)
    source = await (await ends.worker("dead")).tickets()
    first, second = await taken(source), await taken(source)
    await second.acknowledge()
    await trainer.hand_back([1, 2])
    again = await taken(await (await ends.worker("heir")).tickets())
    assert (again.sequence, again.is_redelivered) == (1, True)
    await first.renew(again)
    await first.acknowledge()
    assert await trainer.queued_tickets() == set(), "one that is acknowledged does not come back"


async def test_a_ticket_is_issued_only_as_the_next_of_its_stream(ends: Ends, trainer: TrainerBroker) -> None:
    await trainer.issue([b"a", b"b"], 0)
    for last in (0, 1, 3):
        with pytest.raises(WrongLastSequence):
            await trainer.issue([b"x"], last)
    facts = await trainer.prompts()
    assert facts is not None
    assert facts.last_sequence == 2


async def test_what_is_not_acknowledged_in_time_comes_again(ends: Ends, trainer: TrainerBroker) -> None:
    await trainer.ask("q", b"question", "q")
    one, two = [await (await ends.worker(name)).questions() for name in ("one", "two")]
    first = await taken(one)
    assert not first.is_ticket
    again = await taken(two)
    assert (again.data, again.is_redelivered) == (b"question", True)
    for _ in range(8):  # kept alive for longer than it may be silent
        await asyncio.sleep(QUESTION_ACK_WAIT / 4)
        await again.keep_alive()
        others = asyncio.create_task(one.take())
        done, _ = await asyncio.wait([others], timeout=0.05)
        assert not done or others.result() is None
        others.cancel()
        await asyncio.wait([others])
    await again.acknowledge()


# -- trajectories


async def test_trajectories_are_read_in_order_and_each_id_is_stored_once(
    ends: Ends, trainer: TrainerBroker
) -> None:
    worker = await ends.worker("one")
    assert not await worker.is_stored(3)
    for ticket, payload in ((3, b"three"), (1, b"one"), (3, b"again"), (2, b"two")):
        await worker.publish_trajectory(ticket, None, payload, str(ticket))
    await worker.publish_trajectory(4, 0, b"part", "4/0")
    messages = await read(trainer, 1, 4)
    assert [(each.sequence, each.data, each.message_id) for each in messages] == [
        (1, b"three", "3"),
        (2, b"one", "1"),
        (3, b"two", "2"),
        (4, b"part", "4/0"),
    ]
    assert messages[0].subject.endswith(".traj.3")
    assert messages[3].subject.endswith(".traj.4.0")
    assert await worker.is_stored(3)
    assert not await worker.is_stored(4), "a part is not the whole"
    assert [each.sequence for each in await read(trainer, 3, 2)] == [3, 4]


async def test_a_reader_waits_for_what_comes(ends: Ends, trainer: TrainerBroker) -> None:
    waiting = asyncio.create_task(read(trainer, 1, 1))
    await asyncio.sleep(0.2)
    await (await ends.worker("one")).publish_trajectory(1, None, b"late", "1")
    assert [each.data for each in await waiting] == [b"late"]


async def test_what_is_purged_is_gone_but_its_id_and_its_place_are_not(
    ends: Ends, trainer: TrainerBroker
) -> None:
    worker = await ends.worker("one")
    for ticket in (1, 2, 3):
        await worker.publish_trajectory(ticket, None, b"x" * 1000, str(ticket))
    before = await trainer.trajectories()
    await trainer.purge_trajectories(2)
    after = await trainer.trajectories()
    assert before is not None
    assert after is not None
    assert after.num_bytes < before.num_bytes < before.max_bytes
    assert (after.last_sequence, after.identity) == (3, before.identity)
    await worker.publish_trajectory(1, None, b"again", "1")
    await worker.publish_trajectory(4, None, b"four", "4")
    assert [each.sequence for each in await read(trainer, 1, 2)] == [3, 4]


async def test_a_full_stream_takes_a_message_once_there_is_room(ends: Ends, trainer: TrainerBroker) -> None:
    worker = await ends.worker("one")
    large = b"x" * (2**19)
    facts = await trainer.trajectories()
    assert facts is not None
    number = facts.max_bytes // len(large)
    for ticket in range(1, number):
        await worker.publish_trajectory(ticket, None, large, str(ticket))
    last = [asyncio.create_task(worker.publish_trajectory(n, None, large, str(n))) for n in (900, 901)]
    await asyncio.sleep(0.5)
    assert not all(task.done() for task in last)
    await trainer.purge_trajectories(number)
    async with asyncio.timeout(DEADLINE_SECONDS):
        await asyncio.gather(*last)


async def test_streams_that_are_made_again_are_others(ends: Ends, trainer: TrainerBroker) -> None:
    worker = await ends.worker("one")
    await worker.publish_trajectory(1, None, b"lost", "1")
    before = await trainer.trajectories()
    reading = asyncio.create_task(read(trainer, 2, 1))
    await trainer.delete_trajectories()
    assert await trainer.trajectories() is None
    await trainer.make_streams(None, 2)
    after = await trainer.trajectories()
    assert before is not None
    assert after is not None
    assert before.identity != after.identity
    assert after.last_sequence == 1
    await worker.publish_trajectory(1, None, b"anew", "1")
    assert [(each.sequence, each.data) for each in await reading] == [(2, b"anew")]


# -- state, heartbeats, requests, lease


async def test_state_is_kept_and_told(ends: Ends, trainer: TrainerBroker) -> None:
    worker = await ends.worker("one")
    heard: list[tuple[str, bytes]] = []
    await worker.hear_state(lambda key, data: heard.append((key, data)))
    assert await worker.state("version") is None
    await trainer.put("version", b"1")
    await trainer.put("version", b"2")
    await until("both are heard", lambda: len(heard) == 2)
    assert heard == [("version", b"1"), ("version", b"2")]
    assert await worker.state("version") == b"2"
    late = await ends.worker("late")
    assert await late.state("version") == b"2"


async def test_a_resume_point_is_kept_for_whoever_is_next(ends: Ends, trainer: TrainerBroker) -> None:
    one, two = await ends.worker("one"), await ends.worker("two")
    heard: list[str] = []
    await two.hear_state(lambda key, data: heard.append(key))
    assert await two.read_resume_point(5) is None
    await one.write_resume_point(ResumePoint(ticket=5, num_failures=2))
    assert await two.read_resume_point(5) == ResumePoint(ticket=5, num_failures=2)
    await two.delete_resume_point(5)
    assert await one.read_resume_point(5) is None
    assert heard == [], "it is nobody else's business"


async def test_heartbeats_are_heard(ends: Ends, trainer: TrainerBroker) -> None:
    worker = await ends.worker("one")
    heard: list[Heartbeat] = []
    await trainer.hear_heartbeats(heard.append, lambda: None)
    beat = Heartbeat(worker="one", incarnation="i", engine="e", engine_state="ready", version=None)
    beating = asyncio.create_task(worker.beat(lambda: beat, 0.05))
    await until("three beats", lambda: len(heard) >= 3)
    beating.cancel()
    await asyncio.wait([beating])
    assert set(heard) == {beat}


async def test_a_heartbeat_that_is_waited_for_comes_at_once(ends: Ends, trainer: TrainerBroker) -> None:
    worker = await ends.worker("one")
    heard: list[Heartbeat] = []
    await trainer.hear_heartbeats(heard.append, lambda: None)
    worker.beat_now()  # nobody beats yet
    beat = Heartbeat(worker="one", incarnation="i", engine="e", engine_state="drained", version=None)
    beating = asyncio.create_task(worker.beat(lambda: beat, 10 * DEADLINE_SECONDS))
    await until("the first beat", lambda: bool(heard))
    heard.clear()
    worker.beat_now()
    await until("another one", lambda: bool(heard))
    beating.cancel()
    await asyncio.wait([beating])


async def test_a_worker_answers_one_request_after_the_other(
    ends: Ends, trainer: TrainerBroker, names: JobNames
) -> None:
    worker = await ends.worker("one")
    running, most = 0, 0

    async def answer(payload: bytes) -> bytes:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1
        return payload.upper()

    await worker.answer_requests(answer)
    subject = names.control("one")
    asked = [trainer.request(subject, word, DEADLINE_SECONDS) for word in (b"a", b"b", b"c")]
    assert await asyncio.gather(*asked) == [b"A", b"B", b"C"]
    assert most == 1
    assert await trainer.request(names.control("nobody"), b"a", 0.2) is None


async def test_all_workers_answer_one_message(ends: Ends, trainer: TrainerBroker, names: JobNames) -> None:
    heard: list[bytes | None] = []
    async with trainer.request_all(names.control_all, b"a", heard.append):
        await until("nobody listens", lambda: heard == [None])

    def answering(name: bytes) -> Callable[[bytes], Awaitable[bytes]]:
        async def answer(payload: bytes) -> bytes:
            return name + payload

        return answer

    for name in ("one", "two"):
        await (await ends.worker(name)).answer_requests(answering(name.encode()))
    heard.clear()
    async with trainer.request_all(names.control_all, b"?", heard.append):
        await until("both have answered", lambda: len(heard) == 2)
    assert set(heard) == {b"one?", b"two?"}


async def test_an_answer_that_comes_too_late_is_none(
    ends: Ends, trainer: TrainerBroker, names: JobNames
) -> None:
    worker, go_on = await ends.worker("one"), asyncio.Event()

    async def answer(payload: bytes) -> bytes:
        await go_on.wait()
        return payload

    await worker.answer_requests(answer)
    assert await trainer.request(names.control("one"), b"a", 0.2) is None
    go_on.set()
    assert await trainer.request(names.control("one"), b"b", DEADLINE_SECONDS) == b"b"


async def test_a_later_attempt_takes_the_lease_from_an_earlier_one(ends: Ends) -> None:
    first, second = await ends.trainer(), await ends.trainer()
    await first.take_lease(1, "a")
    await second.take_lease(2, "b")
    with pytest.raises(Superseded):
        await first.take_lease(1, "a")
    with pytest.raises(Superseded):
        async with asyncio.timeout(DEADLINE_SECONDS):
            await first.keep_lease()


# -- held-out prompts


async def test_questions_are_asked_and_answered_once(ends: Ends, trainer: TrainerBroker) -> None:
    worker = await ends.worker("one")
    for _ in range(2):
        await trainer.ask("e.0", b"question", "ask e.0")
    source = await worker.questions()
    question = await taken(source)
    assert question.data == b"question"
    for _ in range(2):
        await worker.publish_answer("e.0", b"answer")
    await question.acknowledge()
    async with trainer.answers() as answers:
        assert await answers.take() == b"answer"
        assert await answers.take() is None
    assert await source.take() is None


async def test_dropped_questions_are_asked_nobody(ends: Ends, trainer: TrainerBroker) -> None:
    source = await (await ends.worker("one")).questions()
    await trainer.ask("e.0", b"question", "e.0")
    await trainer.drop_questions()
    await trainer.ask("e.1", b"another", "e.1")
    assert (await taken(source)).data == b"another"


async def test_nothing_is_left_of_a_job_whose_streams_are_deleted(ends: Ends, trainer: TrainerBroker) -> None:
    await trainer.issue([b"a"], 0)
    await trainer.put("version", b"1")
    await trainer.delete_streams()
    assert await trainer.prompts() is None
    assert await trainer.trajectories() is None
    with pytest.raises(TransportError):
        await trainer.queued_tickets()
    await trainer.make_streams(None, None)
    assert await (await ends.worker("one")).state("version") is None
