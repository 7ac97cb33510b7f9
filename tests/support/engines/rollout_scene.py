"""A controller that only publishes weights, and workers in this process whose engines are real processes.

Faults strike at exact points: right before a worker's n-th call of one of its engine's endpoints.
"""

import asyncio
import contextlib
import hashlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from nats.aio.msg import Msg
from safetensors.torch import load_file
from torch import Tensor

from asyncrl_api.names import JobNames, NatsAddress
from asyncrl_api.protocols import Score
from asyncrl_runtime.contract.messages import (
    Group,
    Heartbeat,
    JoinGroup,
    PolicyVersion,
    Ticket,
    decode,
    encode,
)
from asyncrl_runtime.model.source import load_tokenizer, vocab_size
from asyncrl_runtime.rollout.engine_api import CONTROL_SECONDS
from asyncrl_runtime.rollout.engine_client import EngineClient
from asyncrl_runtime.rollout.prompts import PromptRenderer
from asyncrl_runtime.rollout.rewards.backend import RewardFailure
from asyncrl_runtime.rollout.rewards.frames import ScoreRequest
from asyncrl_runtime.rollout.rewards.scorer import Scorer
from asyncrl_runtime.rollout.weight_updates import WeightUpdates
from asyncrl_runtime.rollout.worker import Worker
from asyncrl_runtime.rollout.workflows import make_workflow
from asyncrl_runtime.transport.broker import Broker
from asyncrl_runtime.transport.reader import OrderedReader
from asyncrl_runtime.transport.streams import delete_streams, make_streams
from asyncrl_runtime.transport.trainer_end import TrainerEnd
from asyncrl_runtime.transport.worker_end import WorkerEnd
from asyncrl_runtime.weights.bucket import BucketBuffer, PublishedWeights, describe
from asyncrl_runtime.weights.engines import Published
from asyncrl_runtime.weights.fleet import Fleet
from asyncrl_runtime.weights.group import TorchGroups
from asyncrl_runtime.weights.publisher import WeightPublisher
from support.engines.forked_engines import ForkedEngine
from support.engines.tiny_models import tiny_model
from support.fakes import FakeBackend
from support.jobs.job_harness import build_job
from support.user_code.harness_data import reward

PHASE_SECONDS = 3.0
"""The deadline of a phase: short, but long enough for a busy machine."""
TENSORS_PER_BUCKET = 4
STORAGE_BYTES = 2**26
SPEC = build_job(rollout={"maxConcurrency": 4}).spec

attempts = itertools.count(1)
"""The numbers of the trainer's attempts. This process plays them all, and a group's name must not occur twice
in a process."""

Strike = Callable[[], Awaitable[None] | None]


class StruckClient(EngineClient):
    """A client of an engine to which something happens at an exact call."""

    def __init__(self, base_url: str, vocabulary_size: int) -> None:
        super().__init__(base_url, vocabulary_size)
        self._strikes: dict[tuple[str, int], Strike] = {}
        self._num_calls: dict[str, int] = {}

    def strike(self, path: str, nth: int, strike: Strike) -> None:
        """Call `strike` right before the n-th call of `path` from now on; what it raises is raised there."""
        self._strikes[path, self._num_calls.get(path, 0) + nth] = strike

    async def call(
        self, path: str, body: dict[str, Any], timeout_seconds: float = CONTROL_SECONDS
    ) -> dict[str, Any]:
        self._num_calls[path] = self._num_calls.get(path, 0) + 1
        if strike := self._strikes.pop((path, self._num_calls[path]), None):
            struck = strike()
            if struck is not None:
                await struck
        return await super().call(path, body, timeout_seconds)


def score(request: ScoreRequest) -> Score | RewardFailure:
    """Score as user code would: by the response, except for rows that it cannot score."""
    if "unscorable" in request.row:
        return RewardFailure("reward_error", "told to")
    return Score(reward(request.prompt, request.response, request.row))


class Replica:
    """An engine process, and its worker as a task of this process."""

    def __init__(self, name: str, engine: ForkedEngine, address: NatsAddress, names: JobNames) -> None:
        self.name = name
        self.engine = engine
        self._address = address
        self._names = names

    async def start_worker(self) -> None:
        model = tiny_model()
        self.client = StruckClient(self.engine.url, vocab_size(model))
        self._broker = await WorkerEnd.connect(self._address, self._names, self.name)
        self.worker = Worker(
            self.name,
            SPEC,
            self._broker,
            self.client,
            WeightUpdates,
            PromptRenderer(load_tokenizer(model), SPEC.dataset.prompt_field),
            make_workflow(SPEC.workflow),
            Scorer(FakeBackend(score), max_attempts=1),
        )
        self._running = asyncio.create_task(self.worker.run(), name=self.name)

    async def kill_worker(self) -> None:
        """End the worker so that it says nothing more and hands nothing back."""
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        await self._broker.close()
        await self.client.close()

    async def close(self) -> None:
        self.engine.kill()
        await self.kill_worker()
        await self.engine.close()


class Scene:
    """Everything that the trainer's rank 0 has to do with workers; made by `open_scene`."""

    def __init__(self, address: NatsAddress, names: JobNames, broker: Broker) -> None:
        self.names = names
        self.broker = broker
        self.end = TrainerEnd(broker, names, STORAGE_BYTES)
        self.fleet = Fleet(time.monotonic)
        self.joins: list[JoinGroup] = []
        """Every request to join a group."""
        self.groups: dict[int, Group] = {}
        """The groups that came of the tickets."""
        self.replicas: dict[str, Replica] = {}
        self._address = address
        self.publishers: list[WeightPublisher] = []
        self._num_tickets = 0

    def publisher(self, *, verify: bool = False) -> WeightPublisher:
        """Return the publisher of another attempt of the trainer."""
        publisher = WeightPublisher(
            self.broker,
            self.names,
            self.fleet,
            tiny_weights(0),
            TorchGroups(),
            attempt=next(attempts),
            host="127.0.0.1",
            backend="gloo",
            model_bytes=0,
            timeout_seconds=PHASE_SECONDS,
            verify=verify,
        )
        self.publishers.append(publisher)
        return publisher

    async def add(self, *names: str, model_folder: Path | None = None, tp_size: int = 1) -> list[Replica]:
        """Start replicas, and wait until their engines are known to have no weights."""
        folder = model_folder or tiny_model()
        added = [Replica(name, ForkedEngine(folder, tp_size), self._address, self.names) for name in names]
        self.replicas |= {replica.name: replica for replica in added}
        for replica in added:
            await replica.engine.wait_until_it_answers()
            await replica.start_worker()
        await self.until("all engines are known", lambda: all(self.state(name) == "empty" for name in names))
        return added

    def beat(self, name: str) -> Heartbeat:
        """Return a living worker's last heartbeat."""
        return next(beat for beat in self.fleet.living if beat.worker == name)

    def state(self, name: str) -> str:
        """Return an engine's state as its worker last reported it; "" if the worker is silent."""
        return next((beat.engine_state for beat in self.fleet.living if beat.worker == name), "")

    @property
    def held(self) -> set[int]:
        """Tickets in the hands of living workers."""
        return {ticket for beat in self.fleet.living for ticket in beat.held}

    async def restart_engine(self, replica: Replica) -> None:
        """Restart an engine as a failed liveness probe does; wait until the worker knows the new process."""
        replica.engine.kill()
        await self.until(f"{replica.name} is down", lambda: self.state(replica.name) == "down")
        replica.engine.restart()
        await self.until(f"{replica.name} has another engine", lambda: self.state(replica.name) == "empty")

    async def until(self, what: str, condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            states = {name: self.state(name) for name in self.replicas}
            assert time.monotonic() < deadline, f"{what}: not in {seconds} s; {states}"
            await asyncio.sleep(0.02)

    async def hear(self, name: str, num_beats: int) -> None:
        """Wait for a number of a worker's heartbeats, by which time it has done what it was about to do."""
        heard: list[Heartbeat] = []
        while len(heard) < num_beats:
            heard += [b for b in self.fleet.living if b.worker == name and (not heard or b is not heard[-1])]
            await asyncio.sleep(0.02)

    async def issue(self, count: int, max_new_tokens: int = 8) -> list[int]:
        """Put tickets into the queue; return their numbers."""
        issued = range(self._num_tickets + 1, self._num_tickets + count + 1)
        for number in issued:
            ticket = Ticket(
                ticket=number,
                row={"question": f"{number} + 1 ="},
                group_size=SPEC.sampling.group_size,
                max_new_tokens=max_new_tokens,
                temperature=1.0,
            )
            await self.broker.jetstream.publish(self.names.prompt(number), encode(ticket))
        self._num_tickets += count
        return list(issued)

    async def sampled(self, tickets: list[int]) -> list[Group]:
        """Wait for the groups that the workers make of tickets."""
        await self.until(f"tickets {tickets} are sampled", lambda: set(tickets) <= self.groups.keys())
        return [self.groups[ticket] for ticket in tickets]

    async def read(self) -> None:
        async for message in OrderedReader(self.broker, self.names.trajectory_stream, 1):
            group = decode(message.data, Group)
            self.groups[group.ticket] = group


@contextlib.asynccontextmanager
async def open_scene(address: NatsAddress, names: JobNames) -> AsyncIterator[Scene]:
    """Make a job's streams and listen to its workers; ends all replicas at the end."""
    broker = await Broker.connect(address, names, "controller")
    await make_streams(broker.jetstream, names, STORAGE_BYTES)
    scene = Scene(address, names, broker)

    async def on_heartbeat(message: Msg) -> None:
        scene.fleet.heard(decode(message.data, Heartbeat))

    async def on_control(message: Msg) -> None:
        with contextlib.suppress(ValueError):  # another phase
            scene.joins.append(decode(message.data, JoinGroup))

    await broker.client.subscribe(names.heartbeat("*"), cb=on_heartbeat)
    await broker.client.subscribe(names.control("*"), cb=on_control)
    reading = asyncio.create_task(scene.read())
    try:
        yield scene
    finally:
        reading.cancel()
        for replica in scene.replicas.values():
            await replica.close()
        for publisher in scene.publishers:
            await publisher.leave()
        await delete_streams(broker.jetstream, names)
        await broker.close()


def weights_of(seed: int) -> dict[str, Tensor]:
    """The weights of the tiny model made with `seed`, as Hugging Face names them."""
    return load_file(tiny_model(seed=seed) / "model.safetensors")


def checksums_of(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the checksums of an engine that holds `weights`."""
    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()
        for name, tensor in weights.items()
    }


async def publish(
    publisher: WeightPublisher, version: PolicyVersion, seed: int, interrupt: str = "Retract"
) -> Published:
    """Publish the weights of the tiny model made with `seed`."""
    publisher.weights = tiny_weights(seed)
    return await publisher.publish(version, interrupt)


def tiny_weights(seed: int) -> PublishedWeights:
    """Return what a publisher sends of the tiny model made with `seed`, a few tensors at a time."""
    tensors = weights_of(seed)
    buffer = BucketBuffer()

    async def gather(names: tuple[str, ...]) -> Tensor:
        chosen = [(name, tensors[name]) for name in names]
        return buffer.fill(chosen, sum(tensor.nbytes for _, tensor in chosen), torch.device("cpu"))

    described = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    starts = range(0, len(described), TENSORS_PER_BUCKET)
    layout = tuple(describe(described[start : start + TENSORS_PER_BUCKET]) for start in starts)
    return PublishedWeights(layout, gather)


async def holds(replica: Replica, version: PolicyVersion, seed: int) -> bool:
    """Whether an engine samples with all weights of a version, which are those made with `seed`."""
    engine = replica.engine
    return (
        await engine.label() == str(version)
        and await engine.checksums() == checksums_of(weights_of(seed))
        and not await engine.is_paused()
    )


def versions(group: Group) -> set[PolicyVersion]:
    """Return the versions of the policies that sampled a group's tokens."""
    return {span.policy_version for sample in group.samples for span in sample.version_spans}
