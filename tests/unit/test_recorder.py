"""Events on a job: the same words are one Event with a count, and one that is lost holds nobody up."""

import logging

import pytest

from asyncrl_operator.api_server.api import Api
from asyncrl_operator.api_server.recorder import LONGEST_MESSAGE, Recorder
from asyncrl_operator.decide.desired import Event
from asyncrl_operator.resources import EVENTS, Json
from asyncrl_operator.workqueue import Key
from support.cluster.api_calls import RefusalError, Request
from support.cluster.memory_api_client import MemoryApiClient, MemoryResponse, Send, pass_on
from support.cluster.memory_api_server import NAMESPACES, MemoryApiServer
from support.cluster.whole_operator import BEGAN, CRD

KEY, UID = Key("team", "gsm8k"), "0b5e"
RESTART = Event("TrainerRestart", "exit code 1", "Warning")


class Scene:
    """A recorder, the server that it writes to, and the time."""

    def __init__(self) -> None:
        self.now = BEGAN
        self.server = MemoryApiServer(CRD, lambda: self.now)
        self.server.store(NAMESPACES, {"metadata": {"name": "team", "uid": "n1"}})
        self.on_the_way = pass_on
        self.recorder = Recorder(Api(MemoryApiClient(self.server, self._call)), lambda: self.now)

    async def _call(self, request: Request, send: Send) -> MemoryResponse:
        return await self.on_the_way(request, send)

    def events(self) -> list[Json]:
        return self.server.all(EVENTS)


async def test_the_same_words_are_one_event_with_a_count() -> None:
    scene = Scene()
    await scene.recorder.record(KEY, UID, [RESTART])
    scene.now += 60
    await scene.recorder.record(KEY, UID, [RESTART, Event("TrainerRestart", "exit code 2", "Warning")])
    counts = {each["message"]: each["count"] for each in scene.events()}
    assert counts == {"exit code 1": 2, "exit code 2": 1}
    [twice] = [each for each in scene.events() if each["count"] == 2]
    assert (twice["firstTimestamp"], twice["lastTimestamp"]) == (
        "2027-01-15T08:00:00Z",
        "2027-01-15T08:01:00Z",
    )
    assert (twice["type"], twice["reason"]) == ("Warning", "TrainerRestart")
    assert twice["involvedObject"]["uid"] == UID and twice["involvedObject"]["kind"] == "AsyncRLJob"


async def test_a_job_that_was_made_anew_has_events_of_its_own() -> None:
    scene = Scene()
    await scene.recorder.record(KEY, UID, [RESTART])
    await scene.recorder.record(KEY, "another", [RESTART])
    assert [each["count"] for each in scene.events()] == [1, 1]


async def test_a_long_message_is_cut() -> None:
    scene = Scene()
    await scene.recorder.record(KEY, UID, [Event("Failed", "x" * 3000)])
    assert [len(each["message"]) for each in scene.events()] == [LONGEST_MESSAGE]


async def test_an_event_that_cannot_be_written_is_logged_and_the_next_is_written(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scene = Scene()

    async def refuse_first(request: Request, send: Send) -> MemoryResponse:
        scene.on_the_way = pass_on
        return MemoryResponse.of(RefusalError(403, "Forbidden", "events are forbidden"))

    scene.on_the_way = refuse_first
    with caplog.at_level(logging.WARNING):
        await scene.recorder.record(KEY, UID, [Event("Started", "a"), Event("Running", "b")])
    assert [each["reason"] for each in scene.events()] == ["Running"]
    assert "team/gsm8k: Event Started is lost: 403 Forbidden: events are forbidden" in caplog.text


async def test_an_event_that_is_gone_while_it_is_counted_is_lost_without_more() -> None:
    """Its time was over between the two calls."""
    scene = Scene()
    await scene.recorder.record(KEY, UID, [RESTART])

    async def drop(request: Request, send: Send) -> MemoryResponse:
        response = await send(request)
        for each in scene.events() if request.verb == "POST" else ():
            path = EVENTS.path("team", each["metadata"]["name"])
            scene.server.answer(Request("DELETE", path, {}, {}))
        return response

    scene.on_the_way = drop
    await scene.recorder.record(KEY, UID, [RESTART])
    assert scene.events() == []
