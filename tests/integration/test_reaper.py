"""Tickets of the dead come back through the real queue."""

import time

import pytest

from asyncrl_api.names import JobNames, NatsAddress
from asyncrl_runtime.contract.messages import Heartbeat, PolicyVersion
from asyncrl_runtime.trainer.reaper import UNHELD_SECONDS, Reaper
from asyncrl_runtime.transport.broker import Broker
from asyncrl_runtime.transport.streams import ACK_WAIT_SECONDS, make_streams
from asyncrl_runtime.transport.ticket_queue import TAKE_SECONDS, NatsDelivery, TicketQueue
from asyncrl_runtime.transport.trainer_end import TrainerEnd
from asyncrl_runtime.weights.fleet import Fleet
from support.engines.rollout_scene import SPEC, open_scene, publish

STORAGE_BYTES = 2**28
GROUP_SIZE = 4


async def take(queue: TicketQueue) -> NatsDelivery:
    delivery = await queue.take()
    assert delivery is not None
    return delivery


async def test_what_nobody_holds_is_delivered_to_the_next_worker(
    nats_address: NatsAddress, names: JobNames
) -> None:
    """One of five tickets is done, a living worker has one, two were never reported, and one is queued."""
    controller = await Broker.connect(nats_address, names, "controller")
    await make_streams(controller.jetstream, names, STORAGE_BYTES)
    for ticket in range(1, 6):
        await controller.jetstream.publish(names.prompt(ticket), b"row")
    dead = await Broker.connect(nats_address, names, "dead")
    dead_queue = await TicketQueue.of_prompts(dead, names)
    done, held, *_ = [await take(dead_queue) for _ in range(4)]
    await done.acknowledge()

    now = time.monotonic()
    fleet = Fleet(lambda: now)
    reaper = Reaper(TrainerEnd(controller, names, STORAGE_BYTES), fleet, lambda: now, GROUP_SIZE)
    assert await reaper.reap([2, 3, 4, 5]) == []
    now += UNHELD_SECONDS
    fleet.heard(
        Heartbeat(
            worker="w",
            incarnation="i",
            engine="e",
            engine_state="ready",
            version=None,
            max_running_samples=GROUP_SIZE,
            held=(held.sequence,),
        )
    )
    assert await reaper.reap([2, 3, 4, 5]) == [3, 4]

    queue = await TicketQueue.of_prompts(controller, names)
    # Each wait is shorter than the one after which the server itself would deliver again.
    assert 3 * TAKE_SECONDS < ACK_WAIT_SECONDS
    taken = [await take(queue) for _ in range(3)]
    assert sorted(delivery.sequence for delivery in taken) == [3, 4, 5]
    assert {d.sequence for d in taken if d.is_redelivered} == {3, 4}
    await dead.close()
    await controller.close()


@pytest.mark.parametrize("ticket", [1, 2])
async def test_a_hand_back_that_comes_too_late_does_no_harm(
    nats_address: NatsAddress, names: JobNames, ticket: int
) -> None:
    """The ticket was acknowledged meanwhile, or is redelivered and acknowledged by its second holder."""
    broker = await Broker.connect(nats_address, names, "b")
    await make_streams(broker.jetstream, names, STORAGE_BYTES)
    for number in (1, 2):
        await broker.jetstream.publish(names.prompt(number), b"row")
    queue = await TicketQueue.of_prompts(broker, names)
    first, second = await take(queue), await take(queue)
    await first.acknowledge()
    now = 0.0
    reaper = Reaper(TrainerEnd(broker, names, STORAGE_BYTES), Fleet(lambda: now), lambda: now, GROUP_SIZE)
    await reaper.reap([ticket])
    now += UNHELD_SECONDS
    assert await reaper.reap([ticket]) == [ticket]
    again = await queue.take()
    assert (again.sequence if again else None) == (None if ticket == 1 else 2)
    await second.acknowledge()  # the first holder, who was believed dead: accepted
    info = await broker.jetstream.stream_info(names.prompt_stream)
    assert info.state.messages == 0
    await broker.close()


async def test_a_worker_keeps_a_ticket_that_it_is_given_again(
    nats_address: NatsAddress, names: JobNames
) -> None:
    """It was slow, and taken for dead: a second copy of its work would make it slower yet."""
    async with open_scene(nats_address, names) as scene:
        [replica] = await scene.add("a")
        await publish(scene.publisher(), PolicyVersion(1, 0), seed=1)
        await replica.engine.slow_down(0.3)
        [ticket] = await scene.issue(1, max_new_tokens=16)
        await scene.until("the worker holds it", lambda: scene.held == {ticket})
        for _ in range(2):
            await scene.end.hand_back([ticket])
            await scene.hear("a", 2)
        await scene.sampled([ticket])
        await scene.until("nothing is held", lambda: not scene.held)
        assert scene.beat("a").num_sampled_tokens <= SPEC.sampling.group_size * 16
        info = await scene.broker.jetstream.stream_info(names.prompt_stream)
        assert info.state.messages == 0, "the ticket is acknowledged by its last delivery"
