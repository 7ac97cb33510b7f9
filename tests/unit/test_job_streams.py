"""How a lost stream is noticed, and how it comes back."""

import asyncio
from dataclasses import replace

import pytest

from asyncrl_api.ledger import RecordedStep
from asyncrl_runtime.contract.broker import StreamFacts, StreamMessage, TransportError
from asyncrl_runtime.contract.messages import CurrentVersion, PolicyVersion, decode, encode
from asyncrl_runtime.trainer.books.books import Books, recorded_values
from asyncrl_runtime.trainer.job_streams import JobStreams, LostStreams
from support.fakes import FakeJobQueues
from support.messages.samples import make_group, make_job

SPEC = make_job("training.batchSize=1", "training.minibatches=1").spec


class Queues(FakeJobQueues):
    """Two streams that can be lost; each that is made has another identity."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.values: dict[str, bytes] = {}
        self.num_put: dict[str, int] = {}
        self.is_away = False
        self.num_made = 0
        self.streams: dict[str, StreamFacts] = {}
        self.before_an_answer: list[asyncio.Future[None]] = []
        """Waited for, one after the other, before the broker says what it knows of trajectories."""

    async def trajectories(self) -> StreamFacts | None:
        found = self.streams.get("trajectories")
        if self.before_an_answer:
            await self.before_an_answer.pop(0)
        return found

    async def prompts(self) -> StreamFacts | None:
        return self.streams.get("prompts")

    async def make_streams(self, first_ticket: int | None, first_trajectory: int | None) -> None:
        self.calls.append(f"make from ticket {first_ticket}, trajectory {first_trajectory}")
        for name, first in (("prompts", first_ticket), ("trajectories", first_trajectory)):
            if name not in self.streams:
                self.num_made += 1
                self.streams[name] = StreamFacts(f"{name} {self.num_made}", (first or 1) - 1, 0, 2**20)

    async def delete_prompts(self) -> None:
        self.streams.pop("prompts", None)

    async def delete_trajectories(self) -> None:
        self.streams.pop("trajectories", None)

    async def delete_streams(self) -> None:
        self.calls.append("delete all")
        self.streams.clear()

    async def put(self, key: str, data: bytes) -> None:
        if self.is_away:
            raise TransportError("away")
        self.values[key] = data
        self.num_put[key] = self.num_put.get(key, 0) + 1


def arrive(books: Books, ticket: int) -> None:
    books.take(StreamMessage(ticket, f"rl.j.traj.{ticket}", encode(make_group(ticket))))


async def test_a_job_that_begins_finds_nothing_of_an_earlier_one() -> None:
    queues = Queues()
    queues.streams["prompts"] = StreamFacts("old", 7, 0, 2**20)
    books = Books(SPEC)
    streams = JobStreams(queues, books, {"training": {"maxSteps": 5}})
    await streams.open(None)
    assert queues.calls == ["delete all", "make from ticket None, trajectory None"]
    assert books.num_issued == 0 and streams.identity.startswith("trajectories") and not streams.lost
    assert queues.values == {"live": b'{"training": {"maxSteps": 5}}'}


async def test_a_version_is_announced_once_unless_the_announcement_failed_or_was_lost() -> None:
    queues, books = Queues(), Books(SPEC)
    streams = JobStreams(queues, books, {})
    await streams.open(None)
    first, second = PolicyVersion(1, 0), PolicyVersion(1, 1)
    for _ in range(3):
        await streams.announce(first)
    assert queues.num_put["version"] == 1
    queues.is_away = True
    await streams.announce(second)
    queues.is_away = False
    for _ in range(3):
        await streams.announce(second)
    assert queues.num_put["version"] == 2
    assert decode(queues.values["version"], CurrentVersion).version == second
    queues.values.clear()  # the streams and the state are lost together
    streams.requeue()
    await streams.mend(pytest.fail)
    assert decode(queues.values["version"], CurrentVersion).version == second


async def test_recorded_steps_that_went_with_their_stream_are_given_up_before_it_is_made_again() -> None:
    """And the prompt stream is made once, though to give them up also asks for it."""
    queues = Queues()
    step = RecordedStep(1, 0, (1,), {}, recorded_values(SPEC), {1: 0})
    books = Books(SPEC, recorded=[step], position=4)
    streams = JobStreams(queues, books, {})
    await streams.open("another")
    assert streams.lost == LostStreams(trajectories=True, prompts=True) and queues.calls == []

    async def give_up() -> None:
        queues.calls.append("give up")
        books.cut()
        streams.requeue()

    await streams.mend(give_up)
    assert queues.calls == ["give up", "make from ticket 1, trajectory 5"]
    assert not streams.lost and not books.is_repeating and books.num_issued == 0


async def test_a_stream_that_is_gone_or_jumped_back_is_lost_and_rings_for_the_training_loop() -> None:
    queues, books = Queues(), Books(SPEC)
    streams = JobStreams(queues, books, {})
    await streams.open(None)
    await streams.inspect()
    assert not streams.lost
    arrive(books, 3)
    await books.news.wait(0)
    await streams.inspect()
    assert streams.lost == LostStreams(trajectories=True), (
        "the server has forgotten what has been read from it"
    )
    began = asyncio.get_running_loop().time()
    await books.news.wait(5)
    assert asyncio.get_running_loop().time() - began < 1, "nobody told the training loop"
    await streams.mend(pytest.fail)
    assert not streams.lost and not books.inbox.arrived


async def test_what_was_seen_before_the_streams_were_mended_is_not_believed_after() -> None:
    queues, books = Queues(), Books(SPEC)
    streams = JobStreams(queues, books, {})
    await streams.open(None)
    answer = asyncio.get_running_loop().create_future()
    queues.before_an_answer.append(answer)
    looking = asyncio.create_task(streams.inspect())
    await asyncio.sleep(0)
    streams.requeue()
    answer.set_result(None)
    await looking
    assert streams.lost == LostStreams(prompts=True), "the look has hidden what was lost meanwhile"

    queues.before_an_answer.append(answer := asyncio.get_running_loop().create_future())
    looking = asyncio.create_task(streams.inspect())
    await asyncio.sleep(0)
    queues.streams["trajectories"] = replace(queues.streams["trajectories"], identity="made by someone")
    await streams.mend(pytest.fail)
    assert not streams.lost
    answer.set_result(None)
    await looking
    assert not streams.lost, "the look was at streams that are no more"


async def test_a_broker_that_cannot_purge_now_is_asked_again_by_the_next_checkpoint() -> None:
    class Away(Queues):
        async def purge_trajectories(self, last_sequence: int) -> None:
            raise TransportError("away")

    streams = JobStreams(Away(), Books(SPEC), {})
    streams.is_nearly_full = True
    await streams.purge_behind(3)
    assert streams.is_nearly_full
