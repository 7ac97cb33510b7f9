"""The engine's client against a server on loopback that answers, refuses, breaks off and dies as told."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from asyncrl_runtime.contract.messages import BucketLayout, JoinGroup, PolicyVersion, VersionSpan
from asyncrl_runtime.rollout.engine_api import (
    BrokenStream,
    EngineFailed,
    EngineLoad,
    EngineLost,
    EngineRefused,
    EngineTimeout,
    IncomingBucket,
    SamplingRequest,
)
from asyncrl_runtime.rollout.engine_client import EngineClient
from support.fakes import Exchange, ScriptedServer, scripted_server

VOCAB_SIZE = 50
REQUEST = SamplingRequest(input_ids=[1, 2, 3], max_new_tokens=40, temperature=0.5, seed=9)
Reply = Callable[[Exchange], Awaitable[None]]


def chunk(
    num_tokens: int, finish: str | None = None, versions: Sequence[tuple[str, int]] = (), *, start: int = 0
) -> Any:
    """What an engine has said, from token `start` on: tokens 10, 11, 12 ... and where each version ends."""
    ids = [10 + place for place in range(start, num_tokens)]
    meta: dict[str, Any] = {
        "completion_tokens": num_tokens,
        "finish_reason": finish and {"type": finish},
        "output_token_logprobs": [[-token / 10, token, None] for token in ids],
    }
    if finish:
        meta["weight_versions"] = [{"version": version, "end": end} for version, end in versions]
    return {"output_ids": ids, "meta_info": meta}


@asynccontextmanager
async def talking(
    reply: Reply, *, samples_with_adapters: bool = False
) -> AsyncIterator[tuple[EngineClient, ScriptedServer]]:
    async with scripted_server(reply) as server:
        client = EngineClient(server.url, VOCAB_SIZE, samples_with_adapters=samples_with_adapters)
        client.weights.version = PolicyVersion(1, 3)
        try:
            yield client, server
        finally:
            await client.close()


def answering(content: Any, status: int = 200) -> Reply:
    async def reply(exchange: Exchange) -> None:
        await exchange.answer(content, status)

    return reply


async def drop(exchange: Exchange) -> None:
    exchange.drop()


async def hang(exchange: Exchange) -> None:
    await asyncio.Event().wait()


# -- what is sent


async def test_a_group_goes_out_as_one_request_and_comes_back_in_order() -> None:
    first, second = chunk(2, "stop", [("1.3", 2)]), chunk(3, "length", [("1.3", 1), ("2.4", 3)])
    async with talking(answering([first, second])) as (client, server):
        one, two = await client.generate([REQUEST, REQUEST], cache_salt="1.3")
    assert (one.output_ids, one.logprobs, one.finish_reason) == ([10, 11], [-1.0, -1.1], "stop")
    assert one.spans == (VersionSpan(1, 3, 2),)
    assert two.spans == (VersionSpan(1, 3, 1), VersionSpan(2, 4, 3)) and two.finish_reason == "length"
    [exchange] = server.exchanges
    rids = exchange.body.pop("rid")
    sampling = {"max_new_tokens": 40, "temperature": 0.5, "sampling_seed": 9}
    assert (exchange.method, exchange.path) == ("POST", "/generate") and len(set(rids)) == 2
    assert exchange.body == {
        "input_ids": [[1, 2, 3]] * 2,
        "sampling_params": [sampling] * 2,
        "return_logprob": True,
        "cache_salt": "1.3",
    }


@pytest.mark.parametrize("starts", [(0, 1, 4), (0, 0, 0), (0, 1, 0)], ids=["new", "all so far", "some"])
async def test_a_stream_is_asked_for_one_sequence_and_is_put_together(starts: Sequence[int]) -> None:
    """A server may repeat in a chunk what it has said before."""

    async def reply(exchange: Exchange) -> None:
        first, second, last = starts
        end = chunk(6, "stop", [("1.3", 2), ("1.4", 6)], start=last)
        await exchange.events(chunk(1, start=first), chunk(4, start=second), end, "[DONE]")
        await exchange.end()

    async with talking(reply) as (client, server):
        generation = await client.stream(REQUEST)
    assert generation.output_ids == list(range(10, 16)) and generation.finish_reason == "stop"
    assert generation.logprobs == [-token / 10 for token in range(10, 16)]
    assert generation.spans == (VersionSpan(1, 3, 2), VersionSpan(1, 4, 6))
    [body] = server.bodies
    assert body["stream"] and body["input_ids"] == [1, 2, 3] and "cache_salt" not in body
    assert isinstance(body["rid"], str) and body["sampling_params"]["sampling_seed"] == 9


async def test_no_request_id_is_the_beginning_of_another() -> None:
    """An abort matches every request id with its prefix."""
    async with talking(answering([chunk(1, "stop", [("1.3", 1)])] * 8)) as (client, server):
        for _ in range(4):
            await client.generate([REQUEST] * 8)
    rids = [rid for body in server.bodies for rid in body["rid"]]
    assert len(set(rids)) == 32 and all(re.fullmatch("[0-9a-f]{32}", rid) for rid in rids)


@pytest.mark.parametrize("token", [VOCAB_SIZE, -1])
@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_token_outside_the_vocabulary_never_leaves(token: int, is_streamed: bool) -> None:
    """Such a token would kill the engine."""
    bad = SamplingRequest([1, token, 3], 4, 1.0, 0)
    async with talking(drop) as (client, server):
        with pytest.raises(EngineRefused, match=f"token id {token} is outside the vocabulary of 50"):
            await (client.stream(bad) if is_streamed else client.generate([REQUEST, bad]))
    assert not server.exchanges


async def test_an_engine_is_reached_without_the_proxy_of_its_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    async with talking(answering({"weight_version": "1.3"})) as (client, _):
        assert await client.label() == "1.3"


# -- adapters


@asynccontextmanager
async def changing_adapters(
    *answers: Any, to: PolicyVersion | None
) -> AsyncIterator[tuple[EngineClient, ScriptedServer]]:
    """An engine that is given another adapter before it answers anything, and then answers one by one."""
    left = list(answers)

    async def reply(exchange: Exchange) -> None:
        client.weights.version = to
        answer = left.pop(0)
        if exchange.body.get("stream"):
            await exchange.events(answer, "[DONE]")
            await exchange.end()
        else:
            await exchange.answer(answer)

    async with talking(reply, samples_with_adapters=True) as (client, server):
        yield client, server


async def test_what_was_broken_off_for_a_newer_adapter_goes_on_under_it() -> None:
    """A token belongs to the adapter that its request named, whatever label the engine had at the time."""
    first, second = chunk(3, "abort", [("1.4", 3)]), chunk(2, "stop", [("1.4", 2)])
    async with changing_adapters(first, second, to=PolicyVersion(1, 4)) as (client, server):
        generation = await client.stream(REQUEST)
    assert generation.output_ids == [10, 11, 12, 10, 11] and generation.finish_reason == "stop"
    assert generation.spans == (VersionSpan(1, 3, 3), VersionSpan(1, 4, 5))
    assert [body["lora_path"] for body in server.bodies] == ["1.3", "1.4"]
    assert server.bodies[1]["input_ids"] == [1, 2, 3, 10, 11, 12]
    assert server.bodies[1]["sampling_params"]["max_new_tokens"] == 37
    assert server.bodies[1]["sampling_params"]["sampling_seed"] == 9


async def test_of_a_group_each_goes_on_that_was_broken_off() -> None:
    together = [chunk(3, "abort", [("1.4", 3)]), chunk(1, "stop", [("1.4", 1)]), chunk(40, "abort")]
    second = chunk(2, "stop", [("1.4", 2)])
    async with changing_adapters(together, second, to=PolicyVersion(1, 4)) as (client, server):
        broken, whole, full = await client.generate([REQUEST] * 3)
    assert len(broken.output_ids) == 5 and len(server.bodies) == 2
    assert whole.spans == (VersionSpan(1, 3, 1),) and whole.finish_reason == "stop"
    assert full.finish_reason == "length", "there is no room to go on"


async def test_what_was_broken_off_to_end_is_answered_as_it_is() -> None:
    async with changing_adapters(chunk(3, "abort"), to=PolicyVersion(1, 3)) as (client, server):
        generation = await client.stream(REQUEST)
    assert generation.finish_reason == "abort" and len(server.bodies) == 1


async def test_an_engine_that_was_replaced_meanwhile_has_no_adapter_to_go_on_with() -> None:
    async with changing_adapters(chunk(3, "abort"), to=None) as (client, server):
        with pytest.raises(BrokenStream, match="the engine has no adapter yet") as broken:
            await client.stream(REQUEST)
        assert broken.value.earned.spans == (VersionSpan(1, 3, 3),) and len(server.bodies) == 1
        with pytest.raises(EngineLost, match="the engine has no adapter yet"):
            await client.generate([REQUEST])


# -- what comes back instead of an answer


CALLS: dict[str, Callable[[EngineClient], Awaitable[Any]]] = {
    "generate": lambda client: client.generate([REQUEST]),
    "stream": lambda client: client.stream(REQUEST),
    "call": lambda client: client.call("/pause_generation", {"mode": "retract"}),
    "get": lambda client: client.label(),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@calls
@pytest.mark.parametrize("status", [400, 404])
async def test_what_can_never_work_is_refused_with_the_engines_words(call: Any, status: int) -> None:
    async with talking(answering({"error": {"message": "too long"}}, status)) as (client, _):
        with pytest.raises(EngineRefused, match="too long"):
            await call(client)


@calls
async def test_a_failure_of_the_engines_own_is_reported(call: Any) -> None:
    """It therefore uses up the ticket's retry budget, streamed or not."""
    async with talking(answering("scheduler: out of memory", 500)) as (client, _):
        with pytest.raises(EngineLost, match="500: scheduler: out of memory") as lost:
            await call(client)
    assert lost.value.is_reported


@calls
async def test_a_lost_connection_is_a_lost_engine_and_nobodys_failure(call: Any) -> None:
    async with talking(drop) as (client, _):
        with pytest.raises(EngineLost) as lost:
            await call(client)
    assert not lost.value.is_reported and not isinstance(lost.value, EngineTimeout)
    assert client.name in str(lost.value)


@calls
async def test_an_engine_that_is_not_there_is_lost(call: Any) -> None:
    async with talking(drop) as (client, _):
        pass
    client = EngineClient(client.name, VOCAB_SIZE)
    with pytest.raises(EngineLost, match=f"{client.name}.*connection attempts failed") as lost:
        await call(client)
    assert not lost.value.is_reported
    await client.close()


async def test_an_engine_that_does_not_answer_in_time_hangs() -> None:
    async with talking(hang) as (client, _):
        with pytest.raises(EngineTimeout, match=r"/begin_weight_update: no answer in 0 s") as late:
            await client.call("/begin_weight_update", {}, timeout_seconds=0.01)
    assert not late.value.is_reported


async def test_a_request_that_fails_casts_doubt_until_the_engine_answers_again() -> None:
    replies = [drop, drop, answering({"weight_version": "1.3"})]

    async def reply(exchange: Exchange) -> None:
        await replies.pop(0)(exchange)

    async with talking(reply) as (client, _):
        assert not client.is_in_doubt
        with pytest.raises(EngineLost):
            await client.generate([REQUEST])
        assert client.is_in_doubt
        with pytest.raises(EngineLost):
            await client.label()
        assert client.is_in_doubt
        await client.label()
        assert not client.is_in_doubt


@pytest.mark.parametrize("label", ["default", "", "1", "1.x", "1.-3"])
async def test_weights_that_are_not_this_jobs_make_no_sample(label: str) -> None:
    async def reply(exchange: Exchange) -> None:
        answer = chunk(3, "stop", [("1.3", 1), (label, 3)])
        if exchange.body.get("stream"):
            await exchange.events(chunk(2), answer)
            await exchange.end()
        else:
            await exchange.answer([answer])

    async with talking(reply) as (client, _):
        for call in (client.generate([REQUEST]), client.stream(REQUEST)):
            with pytest.raises(EngineLost, match=f"not this job's: '{label}'") as lost:
                await call
            assert not isinstance(lost.value, BrokenStream)  # which weights the others came from is unknown


async def test_a_request_broken_off_is_an_answer() -> None:
    async with talking(answering([chunk(2, "abort", [("1.3", 2)])])) as (client, _):
        [generation] = await client.generate([REQUEST])
    assert (generation.finish_reason, len(generation.output_ids)) == ("abort", 2)


# -- updates

JOIN = JoinGroup(
    group="wu", host="h", port=1, rank=2, world_size=3, backend="gloo", timeout_seconds=9, layout=()
)


def bucket(*, is_last: bool) -> IncomingBucket:
    return IncomingBucket(
        group="wu",
        version=PolicyVersion(1, 4),
        layout=BucketLayout(("w",), ("float32",), ((2, 3),)),
        is_last=is_last,
        timeout_seconds=9,
    )


def posts(server: ScriptedServer) -> list[tuple[str, Any]]:
    return [(exchange.path, exchange.body) for exchange in server.exchanges]


async def test_an_update_makes_these_calls() -> None:
    async with talking(answering({"success": True, "per_engine_checksum": "c0ffee"})) as (client, server):
        await client.join_group(JOIN)
        await client.pause("Retract")
        await client.begin_update()
        await client.receive_bucket(bucket(is_last=False), keeps_cache=False)
        await client.receive_bucket(bucket(is_last=True), keeps_cache=False)
        await client.end_update()
        assert await client.checksum() == "c0ffee"
        await client.resume()
        await client.leave_group("wu")
    told = {
        "names": ["w"],
        "dtypes": ["float32"],
        "shapes": [[2, 3]],
        "group_name": "wu",
        "load_format": "flattened_bucket",
    }
    where = {"master_address": "h", "master_port": 1, "rank_offset": 2, "world_size": 3}
    assert posts(server) == [
        ("/init_weights_update_group", {**where, "group_name": "wu", "backend": "gloo"}),
        ("/pause_generation", {"mode": "retract"}),
        ("/begin_weight_update", {"selector": "all"}),
        ("/update_weights_from_distributed", {**told, "flush_cache": False}),
        ("/update_weights_from_distributed", {**told, "flush_cache": True, "weight_version": "1.4"}),
        ("/end_weight_update", {}),
        ("/weights_checker", {"action": "checksum"}),
        ("/continue_generation", {}),
        ("/destroy_weights_update_group", {"group_name": "wu"}),
    ]


@pytest.mark.parametrize(
    ("interrupt", "mode"), [("Retract", "retract"), ("InPlace", "in_place"), ("Drain", "retract")]
)
async def test_a_cache_that_is_kept_is_not_flushed(interrupt: str, mode: str) -> None:
    async with talking(answering({"success": True})) as (client, server):
        await client.pause(interrupt)
        await client.receive_bucket(bucket(is_last=True), keeps_cache=True)
    (_, paused), (_, received) = posts(server)
    assert paused == {"mode": mode} and received["flush_cache"] is False


async def test_an_engine_without_sessions_takes_its_buckets_in_a_pause() -> None:
    """SGLang up to 0.5.20 has no such endpoints; one that was restarted may be of a newer line."""
    has_sessions = False

    async def reply(exchange: Exchange) -> None:
        await exchange.answer(
            {}, 200 if has_sessions or not exchange.path.endswith("_weight_update") else 404
        )

    async def update(client: EngineClient) -> list[tuple[str, Any]]:
        num_before = len(server.exchanges)
        for interrupt in ("Retract", "InPlace"):
            await client.pause(interrupt)
            await client.begin_update()
            await client.end_update()
        return [(path, body.get("mode")) for path, body in posts(server)[num_before:]]

    begin, end = ("/begin_weight_update", None), ("/end_weight_update", None)
    retract, abort, in_place = (("/pause_generation", mode) for mode in ("retract", "abort", "in_place"))
    async with talking(reply) as (client, server):
        assert await update(client) == [retract, begin, in_place, begin]
        broken_off = [abort, begin, in_place, begin]
        assert await update(client) == broken_off, "it dies of a flush over a queue"
        has_sessions = True
        await client.take_over()
        assert await update(client) == [retract, begin, end, in_place, begin, end]


async def test_a_process_that_is_taken_over_ends_what_was_asked_of_it_before() -> None:
    async def reply(exchange: Exchange) -> None:
        is_end = exchange.path == "/end_weight_update"
        await exchange.answer({"success": not is_end, "message": "no update is open"})

    async with talking(reply) as (client, server):
        await client.take_over()
        with pytest.raises(EngineRefused, match="/end_weight_update: no update is open"):
            await client.end_update()
    assert posts(server)[0] == ("/abort_request", {"abort_all": True})


async def test_adapters_are_loaded_and_named_by_their_version() -> None:
    version = PolicyVersion(1, 4)
    async with talking(answering({"success": True})) as (client, server):
        await client.load_adapter(version, Path("/adapters/a"), 9)
        await client.set_label(version, aborts=True)
        await client.unload_adapter(version)
    assert posts(server) == [
        ("/load_lora_adapter", {"lora_name": "1.4", "lora_path": "/adapters/a"}),
        ("/update_weight_version", {"new_version": "1.4", "abort_all_requests": True}),
        ("/unload_lora_adapter", {"lora_name": "1.4"}),
    ]


async def test_the_load_is_summed_over_ranks() -> None:
    lines = [
        'sglang:token_usage{tp_rank="0"} 0.25',
        'sglang:token_usage{tp_rank="1"} 0.5',
        'sglang:num_queue_reqs{tp_rank="0"} 1.0',
        'sglang:num_queue_reqs{tp_rank="1"} 2.0',
        'sglang:num_used_tokens{tp_rank="0"} 7.0',
    ]
    async with talking(answering("\n".join(lines) + "\n")) as (client, _):
        assert await client.load() == EngineLoad(0.5, 3, 0, 0, 7)


# -- answers that break in the middle


async def test_of_a_broken_stream_all_is_kept_where_no_update_came() -> None:
    async def reply(exchange: Exchange) -> None:
        await exchange.events(chunk(2), chunk(5))
        exchange.drop()

    async with talking(reply) as (client, _):
        with pytest.raises(BrokenStream) as broken:
            await client.stream(REQUEST)
    earned = broken.value.earned
    assert (earned.output_ids, earned.finish_reason) == ([10, 11, 12, 13, 14], "abort")
    assert earned.logprobs == [-1.0, -1.1, -1.2, -1.3, -1.4] and earned.spans == (VersionSpan(1, 3, 5),)
    assert not broken.value.is_reported


def begin(client: EngineClient) -> None:
    client.weights.num_updates_begun += 1


def complete(client: EngineClient) -> None:
    client.weights.num_updates_completed += 1
    client.weights.version = PolicyVersion(1, 4)


def nothing(client: EngineClient) -> None:
    pass


@pytest.mark.parametrize(
    ("before", "events", "num_kept"),
    [
        (nothing, [2, begin, complete, 5], 2),  # up to the update
        (nothing, [2, begin, 3, complete, 5], 2),  # what came meanwhile may be of either version
        (nothing, [begin, complete, 5], 0),
        (nothing, [2, begin, complete, 3, begin, complete, 5], 2),
        (nothing, [2, begin, 5], 5),  # nothing arrived of it: it was given up, or the engine is paused
        (nothing, [2, begin, 3, begin, complete, 5], 2),
        (begin, [complete, 5], 0),  # it was under way when the request began
        (begin, [2, complete, 5], 2),
        (begin, [5], 5),
    ],
)
async def test_a_broken_stream_is_kept_up_to_the_update_that_the_worker_saw(
    before: Callable[[EngineClient], None], events: list[Any], num_kept: int
) -> None:
    async def reply(exchange: Exchange) -> None:
        if exchange.path != "/generate":
            await exchange.answer({"weight_version": "1.3"})
            return
        for event in events:
            if callable(event):
                event(client)
            else:
                await exchange.events(chunk(event))
                # Answered after the piece was sent, so the client has read the piece by then.
                await client.label()
        exchange.drop()

    async with talking(reply) as (client, _):
        before(client)
        with pytest.raises(BrokenStream) as broken:
            await client.stream(REQUEST)
    earned = broken.value.earned
    assert len(earned.output_ids) == len(earned.logprobs) == num_kept
    assert earned.spans == ((VersionSpan(1, 3, num_kept),) if num_kept else ())


async def test_nothing_is_kept_of_an_engine_whose_version_the_worker_never_saw() -> None:
    async def reply(exchange: Exchange) -> None:
        await exchange.events(chunk(2))
        exchange.drop()

    async with talking(reply) as (client, _):
        client.weights.version = None
        with pytest.raises(BrokenStream) as broken:
            await client.stream(REQUEST)
    assert broken.value.earned.output_ids == [] and broken.value.earned.spans == ()


async def test_an_answer_that_was_whole_is_not_lost_with_its_connection() -> None:
    """Nor is it treated as broken off, because whoever continued it would sample beyond its end."""

    async def reply(exchange: Exchange) -> None:
        await exchange.events(chunk(2), chunk(3, "stop", [("1.3", 3)]))
        exchange.drop()

    async with talking(reply) as (client, _):
        generation = await client.stream(REQUEST)
    assert (len(generation.output_ids), generation.finish_reason) == (3, "stop")


async def test_a_stream_that_leaves_tokens_out_is_broken() -> None:
    async def reply(exchange: Exchange) -> None:
        await exchange.events(chunk(2), chunk(6, start=4))
        await exchange.end()

    async with talking(reply) as (client, _):
        with pytest.raises(BrokenStream, match="2 tokens of a stream are missing") as broken:
            await client.stream(REQUEST)
    assert len(broken.value.earned.output_ids) == 2


async def test_a_stream_that_ends_without_an_end_is_broken() -> None:
    async def reply(exchange: Exchange) -> None:
        await exchange.events(chunk(2), "[DONE]")
        await exchange.end()

    async with talking(reply) as (client, _):
        with pytest.raises(BrokenStream, match="ended without an end") as broken:
            await client.stream(REQUEST)
    assert len(broken.value.earned.output_ids) == 2


@pytest.mark.parametrize(
    ("last", "error"),
    [
        ({"error": {"message": "bad request", "code": 400}}, EngineRefused),
        ("500", EngineFailed),
        ("400", EngineRefused),
    ],
)
async def test_an_error_within_a_stream_is_the_error_it_would_have_been(last: Any, error: Any) -> None:
    if isinstance(last, str):
        status, last = int(last), chunk(2, "abort")
        last["meta_info"]["finish_reason"] |= {"status_code": status, "message": "bad request"}

    async def reply(exchange: Exchange) -> None:
        await exchange.events(chunk(1), last, "[DONE]")
        await exchange.end()

    async with talking(reply) as (client, _):
        with pytest.raises(error, match="bad request") as raised:
            await client.stream(REQUEST)
    assert type(raised.value) is error


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_giving_up_ends_what_is_in_flight_and_nothing_later(is_streamed: bool) -> None:
    arrived = asyncio.Semaphore(0)

    async def reply(exchange: Exchange) -> None:
        if is_streamed:
            await exchange.events(chunk(2))
        if len(server.exchanges) <= 3:
            arrived.release()
            await asyncio.Event().wait()
        if is_streamed:
            await exchange.events(chunk(3, "stop", [("1.3", 3)]))
            await exchange.end()
        else:
            await exchange.answer([chunk(3, "stop", [("1.3", 3)])])

    async with talking(reply) as (client, server), asyncio.timeout(30):

        def ask() -> Awaitable[Any]:
            return client.stream(REQUEST) if is_streamed else client.generate([REQUEST])

        flying = asyncio.gather(ask(), ask(), ask(), return_exceptions=True)
        for _ in range(3):
            await arrived.acquire()
        client.give_up()
        for error in await flying:
            assert isinstance(error, EngineLost) and str(error).endswith("given up")
            assert not error.is_reported
        await ask()


async def test_control_answers_are_read_where_they_are_json() -> None:
    contents = iter(["", "Cache flushed.\n", {"success": True, "message": "done"}])

    async def reply(exchange: Exchange) -> None:
        await exchange.answer(next(contents))

    async with talking(reply) as (client, server):
        await client.abort_all()
        assert await client.call("/flush_cache", {}) == {}
        assert await client.call("/end_weight_update", {}) == {"success": True, "message": "done"}
    assert server.bodies == [{"abort_all": True}, {}, {}]
