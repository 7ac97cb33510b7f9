"""One test for each trap of nats-py 2.16 and the server that transport/ steps around.

Each shows the trap, where that is possible, and shows that our code does not fall into it.
"""

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import nats
import nats.errors
import nats.js.errors
import pytest
from nats.aio.msg import Msg
from nats.js import api

from asyncrl_api.names import JobNames, NatsAddress
from asyncrl_operator.layout import NATS_HEALTH_PATH
from asyncrl_runtime.contract.broker import PayloadTooLarge, TransportError, WrongLastSequence
from asyncrl_runtime.history.ledger_writer import Superseded
from asyncrl_runtime.transport.broker import Broker, StreamFull
from asyncrl_runtime.transport.lease import Holder, Lease
from asyncrl_runtime.transport.reader import PULL_MESSAGES, OrderedReader
from asyncrl_runtime.transport.streams import delete_streams, identity_of, make_streams, stream_info
from asyncrl_runtime.transport.ticket_queue import TicketQueue, is_stored
from support.engines.cut_proxy import CutProxy
from support.jobs.nats_server import NatsServer

STORAGE = 200 * 2**20


async def broker_with_streams(address: NatsAddress, names: JobNames, storage: int = STORAGE) -> Broker:
    broker = await Broker.connect(address, names, "test")
    await make_streams(broker.jetstream, names, storage)
    return broker


async def test_headers_count_towards_max_payload(nats_address: NatsAddress, names: JobNames) -> None:
    """Trap: the client checks the payload alone; the server closes the connection for good."""
    broker = await broker_with_streams(nats_address, names)
    just_under = bytes(broker.client.max_payload - 10)
    with pytest.raises(PayloadTooLarge):
        await broker.publish(names.trajectory(1), just_under, message_id="1")
    assert not broker.closed.is_set()

    with contextlib.suppress(nats.errors.Error):
        await broker.jetstream.publish(
            names.trajectory(1), just_under, headers={"Nats-Msg-Id": "1"}, timeout=1
        )
    await asyncio.wait_for(broker.closed.wait(), 5)  # what would have happened, and that we would know


async def test_publish_survives_a_server_that_restarts(own_nats: NatsServer, names: JobNames) -> None:
    """Trap: futures of publish_async stay pending for ever across a reconnect."""
    broker = await broker_with_streams(NatsAddress(url=own_nats.url), names)
    own_nats.kill()
    slow = asyncio.create_task(
        broker.publish(names.trajectory(7), b"x", message_id="7", attempt_timeout_seconds=0.5)
    )
    with pytest.raises(TransportError):
        await broker.publish_fenced(names.prompt("x")[:-2], [b"a", b"b"], last_sequence=0)
    own_nats.start()
    ack = await asyncio.wait_for(slow, 30)
    assert ack.seq == 1
    assert await broker.publish_fenced(names.prompt("x")[:-2], [b"a", b"b"], last_sequence=0) == 2
    await broker.close()


async def test_timed_out_publish_is_stored_once(own_nats: NatsServer, names: JobNames) -> None:
    """Trap: a publish that timed out while the server was away is still sent after the reconnect."""
    broker = await broker_with_streams(NatsAddress(url=own_nats.url), names)
    own_nats.kill()
    with pytest.raises(TransportError):
        await broker.publish(
            names.trajectory(3), b"x", message_id="3", deadline_seconds=1, attempt_timeout_seconds=0.3
        )
    own_nats.start()
    await broker.publish(names.trajectory(3), b"x", message_id="3")
    info = await broker.jetstream.stream_info(names.trajectory_stream)
    assert info.state.messages == 1
    await broker.close()


async def test_failing_error_callback_does_not_kill_the_read_loop(
    nats_address: NatsAddress, names: JobNames
) -> None:
    """Trap: an error_cb that raises ends the read loop while is_connected stays true."""
    broker = await broker_with_streams(nats_address, names)

    async def broken_handler(message: object) -> None:
        raise RuntimeError("user code")

    await broker.client.subscribe(names.heartbeat("x"), cb=broken_handler)  # its error goes to error_cb
    await broker.client.publish(names.heartbeat("x"), b"1")
    ack = await broker.publish(names.trajectory(1), b"x", message_id="1", deadline_seconds=5)
    assert ack.seq == 1
    await broker.close()


async def test_fenced_publish_refuses_a_second_publisher(nats_address: NatsAddress, names: JobNames) -> None:
    broker = await broker_with_streams(nats_address, names)
    subject = names.prompt("x")[:-2]
    assert await broker.publish_fenced(subject, [b"1", b"2", b"3"], last_sequence=0) == 3
    with pytest.raises(WrongLastSequence):
        await broker.publish_fenced(subject, [b"other"], last_sequence=2)
    assert await broker.publish_fenced(subject, [b"4"], last_sequence=3) == 4
    await broker.close()


async def test_full_stream_refuses_and_takes_again(nats_address: NatsAddress, names: JobNames) -> None:
    """A refused message id is not remembered: the retry stores it."""
    broker = await broker_with_streams(nats_address, names, storage=400_000)
    payload = bytes(100_000)
    for ticket in (1, 2):
        await broker.publish(names.trajectory(ticket), payload, message_id=str(ticket))
    with pytest.raises(TransportError, match="StreamFull"):
        await broker.publish(names.trajectory(3), payload, message_id="3", deadline_seconds=0.5)
    waiting = asyncio.create_task(broker.publish(names.trajectory(3), payload, message_id="3"))
    await broker.jetstream.purge_stream(names.trajectory_stream, seq=2)
    ack = await asyncio.wait_for(waiting, 10)
    assert ack.seq == 3 and not ack.duplicate
    assert issubclass(StreamFull, Exception)
    await broker.close()


async def test_work_queue_forgets_message_ids_at_a_restart(own_nats: NatsServer, names: JobNames) -> None:
    """Why trajectories are not in a work queue; and in the limits stream the id is remembered."""
    broker = await broker_with_streams(NatsAddress(url=own_nats.url), names)
    await broker.jetstream.publish(names.prompt(1), b"x", headers={"Nats-Msg-Id": "p"})
    queue = await TicketQueue.of_prompts(broker, names)
    delivery = await queue.take()
    assert delivery is not None
    await delivery.acknowledge()
    await broker.publish(names.trajectory(1), b"x", message_id="t")
    own_nats.kill()
    own_nats.start()

    async def again(subject: str, message_id: str) -> api.PubAck:
        return await broker.publish(subject, b"x", message_id=message_id)

    assert not (await again(names.prompt(1), "p")).duplicate
    assert (await again(names.trajectory(1), "t")).duplicate
    await broker.close()


async def test_waiting_take_goes_on_after_a_restart(own_nats: NatsServer, names: JobNames) -> None:
    """Trap: a pull that waits is lost with the server, and the client waits out its whole timeout."""
    broker = await broker_with_streams(NatsAddress(url=own_nats.url), names)
    queue = await TicketQueue.of_prompts(broker, names)

    async def take_one() -> int:
        while (delivery := await queue.take()) is None:
            pass
        return delivery.sequence

    taking = asyncio.create_task(take_one())
    await asyncio.sleep(0)  # the pull is on its way
    own_nats.kill()
    own_nats.start()
    await broker.retry(
        lambda: broker.publish_fenced(names.prompt("x")[:-2], [b"a"], last_sequence=0),
        "publish",
        10,
        TransportError,
    )
    assert await asyncio.wait_for(taking, 10) == 1
    await broker.close()


async def test_reader_gets_everything_once_over_a_cut_connection(
    shared_nats: NatsServer, names: JobNames
) -> None:
    """Trap: an ack-none consumer believes delivered what the cut connection swallowed."""
    writer = await broker_with_streams(NatsAddress(url=shared_nats.url), names)
    total = 400
    for number in range(1, total + 1):
        await writer.publish(names.trajectory(number), bytes(20_000), message_id=str(number))
    cuts = (1_000_000, 3_000_000, 6_000_000)
    async with CutProxy("127.0.0.1", shared_nats.port, cuts) as proxy:
        broker = await Broker.connect(NatsAddress(url=proxy.url), names, "reader")
        reader = OrderedReader(broker, names.trajectory_stream, 1)
        seen = []
        async for message in reader:
            seen.append(message.sequence)
            if len(seen) == total:
                break
        assert seen == list(range(1, total + 1))
        assert reader.num_reopened >= 3
        await broker.close()
    await writer.close()


async def test_reader_notices_what_a_full_client_buffer_dropped(
    nats_address: NatsAddress, names: JobNames
) -> None:
    broker = await broker_with_streams(nats_address, names)
    for number in range(1, 61):
        await broker.publish(names.trajectory(number), bytes(100_000), message_id=str(number))
    reader = OrderedReader(broker, names.trajectory_stream, 1)
    subscribe = broker.client.subscribe

    async def small_buffer(subject: str, cb: Callable[[Msg], Awaitable[None]]) -> object:
        return await subscribe(subject, cb=cb, pending_bytes_limit=150_000)  # for one, and two come together

    broker.client.subscribe = small_buffer  # type: ignore[method-assign,assignment]  # forces the drop
    seen = []
    async for message in reader:
        seen.append(message.sequence)
        if message.sequence == 60:
            break
    assert seen == list(range(1, 61))
    assert reader.num_holes >= 1
    await broker.close()


async def test_reader_notices_that_the_last_message_was_lost(
    nats_address: NatsAddress, names: JobNames
) -> None:
    """Trap: no later message shows the hole, and heartbeats go on as if nothing were amiss."""
    broker = await broker_with_streams(nats_address, names)
    for number in (1, 2, 3):
        await broker.publish(names.trajectory(number), b"x", message_id=str(number))
    subscribe = broker.client.subscribe
    lost: list[Msg] = []

    async def lossy(subject: str, cb: Callable[[Msg], Awaitable[None]]) -> object:
        async def lose_the_third_once(message: Msg) -> None:
            if message.subject == names.trajectory(3) and not lost:
                lost.append(message)
                return
            await cb(message)

        return await subscribe(subject, cb=lose_the_third_once)

    broker.client.subscribe = lossy  # type: ignore[method-assign,assignment]
    reader = OrderedReader(broker, names.trajectory_stream, 1)
    messages = aiter(reader)
    for number in (1, 2, 3):
        assert (await asyncio.wait_for(anext(messages), 20)).sequence == number
    assert lost and reader.num_holes == 1
    await broker.close()


async def test_reader_never_has_more_than_one_pull_waiting(
    nats_address: NatsAddress, names: JobNames
) -> None:
    """Trap: a pull with a byte limit is reported complete when the next one is already under way."""
    broker = await broker_with_streams(nats_address, names)
    total = 4 * PULL_MESSAGES + 1
    for number in range(1, total + 1):
        await broker.publish(names.trajectory(number), b"x", message_id=str(number))
    messages = aiter(OrderedReader(broker, names.trajectory_stream, 1))
    for _ in range(total):
        await asyncio.wait_for(anext(messages), 20)
    waiting = asyncio.ensure_future(anext(messages))
    await broker.client.flush()
    [consumer] = await broker.jetstream.consumers_info(names.trajectory_stream)
    assert consumer.num_waiting == 1
    await broker.publish(names.trajectory(total + 1), b"x", message_id=str(total + 1))
    await asyncio.wait_for(waiting, 20)
    await broker.close()


async def test_reader_goes_on_where_the_server_lost_its_memory_consumer(
    own_nats: NatsServer, names: JobNames
) -> None:
    broker = await broker_with_streams(NatsAddress(url=own_nats.url), names)
    await broker.publish(names.trajectory(1), b"1", message_id="1")
    reader = OrderedReader(broker, names.trajectory_stream, 1)
    messages = aiter(reader)
    assert (await anext(messages)).sequence == 1
    own_nats.kill()
    own_nats.start()
    await broker.publish(names.trajectory(2), b"2", message_id="2")
    assert (await asyncio.wait_for(anext(messages), 20)).sequence == 2
    await broker.close()


async def test_stream_made_again_has_another_identity_and_the_next_sequence(
    nats_address: NatsAddress, names: JobNames
) -> None:
    broker = await broker_with_streams(nats_address, names)
    first = await stream_info(broker.jetstream, names.trajectory_stream)
    await delete_streams(broker.jetstream, names)
    assert await stream_info(broker.jetstream, names.trajectory_stream) is None
    await make_streams(
        broker.jetstream, names, STORAGE, {names.prompt_stream: 41, names.trajectory_stream: 17}
    )
    again = await stream_info(broker.jetstream, names.trajectory_stream)
    assert first is not None and again is not None and identity_of(first) != identity_of(again)
    assert await broker.publish_fenced(names.prompt("x")[:-2], [b"a"], last_sequence=40) == 41
    assert (await broker.publish(names.trajectory(5), b"x", message_id="5")).seq == 17
    assert await is_stored(broker, names, 5) and not await is_stored(broker, names, 6)
    await broker.close()


async def test_lease_is_taken_over_after_its_time_to_live(
    nats_address: NatsAddress, names: JobNames, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap: with limit markers on the bucket a create waits for the marker as well."""
    monkeypatch.setattr("asyncrl_runtime.transport.lease.TIME_TO_LIVE_SECONDS", 1)
    broker = await broker_with_streams(nats_address, names)
    await Lease(broker, names, Holder(1, "a")).acquire()
    other = Lease(broker, names, Holder(1, "b"))
    loop = asyncio.get_running_loop()
    began = loop.time()
    await other.acquire(deadline_seconds=10)
    assert loop.time() - began < 4
    await broker.close()


async def test_higher_attempt_takes_the_lease_at_once_and_the_lower_ends(
    nats_address: NatsAddress, names: JobNames, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncrl_runtime.transport.lease.RENEW_SECONDS", 0.05)
    broker = await broker_with_streams(nats_address, names)
    old, new = Lease(broker, names, Holder(1, "a")), Lease(broker, names, Holder(2, "b"))
    await old.acquire()
    keeping = asyncio.create_task(old.keep())
    await new.acquire(deadline_seconds=1)
    with pytest.raises(Superseded):
        await asyncio.wait_for(keeping, 5)
    with pytest.raises(Superseded):
        await old.acquire()
    await broker.close()


async def test_no_server_is_an_error_with_its_address(names: JobNames) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"nats://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(TransportError, match=url):
            await Broker.connect(NatsAddress(url=url), names, "test", deadline_seconds=1)


@pytest.fixture
def small_store(tmp_path: Path) -> Iterator[Path]:
    """The folder of a server whose files have 8 MB of room."""
    store = tmp_path / "nats" / "store"
    store.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(store)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield store.parent
    subprocess.run(["umount", "--lazy", str(store)], check=True)


async def health(server: NatsServer) -> int:
    async with httpx.AsyncClient() as client:
        return (await client.get(f"http://127.0.0.1:{server.health_port}{NATS_HEALTH_PATH}")).status_code


async def test_a_stream_that_met_a_full_disk_goes_on_once_its_server_has_started_again(
    small_store: Path, names: JobNames
) -> None:
    """Trap: a stream remembers a write that failed, and takes nothing more, though there is room again.

    A worker's publish is tried again all the while, and nothing that was stored is lost.
    """
    server = NatsServer(small_store)
    server.start()
    broker = await broker_with_streams(NatsAddress(url=server.url), names)
    stored, subject = 0, names.trajectory(1)
    with pytest.raises(nats.errors.Error):
        while True:
            await broker.jetstream.publish(subject, bytes(300_000), timeout=1)
            stored += 1
    remount = ["mount", "-o", "remount,size=64m", str(small_store / "store")]
    await asyncio.to_thread(subprocess.run, remount, check=True)
    with pytest.raises(nats.errors.Error):
        await broker.jetstream.publish(subject, b"x", timeout=1)
    assert await health(server) == 503, "so its probe has it started again"
    tried = asyncio.create_task(broker.publish(subject, b"x", message_id="1", attempt_timeout_seconds=0.5))
    await asyncio.sleep(0)
    server.kill()
    server.start()
    ack = await asyncio.wait_for(tried, 60)
    assert 0 < stored < ack.seq
    assert await health(server) == 200
    await broker.close()
    server.kill()
