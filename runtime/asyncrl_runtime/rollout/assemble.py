"""Puts the workers of a process together and runs them to their end: the command `asyncrl-runtime worker`."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_api.job import Spec
from asyncrl_api.processes import bind
from asyncrl_api.run_config import RunConfig
from asyncrl_runtime.contract.broker import TransportError, WorkerBroker
from asyncrl_runtime.contract.imports import ImportFailed
from asyncrl_runtime.model.source import ensure_model, load_tokenizer, vocab_size
from asyncrl_runtime.rollout.adapter_updates import AdapterUpdates
from asyncrl_runtime.rollout.engine_api import Engine
from asyncrl_runtime.rollout.engine_client import EngineClient
from asyncrl_runtime.rollout.engine_updates import UpdatesOf
from asyncrl_runtime.rollout.health_port import serve_health
from asyncrl_runtime.rollout.prompts import PromptRenderer
from asyncrl_runtime.rollout.receiver_client import ReceiverClient
from asyncrl_runtime.rollout.rewards.pool import RewardNotLoaded
from asyncrl_runtime.rollout.rewards.reward_types import REWARD_TYPES, ProcessReward
from asyncrl_runtime.rollout.rewards.scorer import Scorer, make_scorer
from asyncrl_runtime.rollout.staged_updates import StagedUpdates
from asyncrl_runtime.rollout.weight_updates import WeightUpdates
from asyncrl_runtime.rollout.worker import Worker
from asyncrl_runtime.rollout.workflows import make_workflow
from asyncrl_runtime.transport.worker_end import WorkerEnd

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerPlace:
    """Which worker this is, and where it and its engine are reached."""

    name: str
    """The worker's name, the same for its successors: the pod's name, say."""
    engine_url: str
    health_port: int
    """The port on which it answers probes of itself and its engine."""
    receiver_url: str = ""
    """Empty unless weights are staged."""


def worker_places(
    name: str, engine_url: str, health_port: int, count: int, receiver_url: str = ""
) -> list[WorkerPlace]:
    """Return the places of `count` workers: number i has `-i` behind its name, and ports that are i higher.

    A single one is called by the name as it is.

    Raises:
        ExitError: there are several workers, and a URL has no port to count from.
    """
    if count == 1:
        return [WorkerPlace(name, engine_url, health_port, receiver_url)]
    engines = _urls("--engine-url", engine_url, count)
    receivers = _urls("--receiver-url", receiver_url, count) if receiver_url else [""] * count
    return [WorkerPlace(f"{name}-{i}", engines[i], health_port + i, receivers[i]) for i in range(count)]


def _urls(option: str, first: str, count: int) -> list[str]:
    """Return `count` URLs, the first of which is given, on ports in a row."""
    url = urlsplit(first)
    if url.port is None:
        raise ExitError(ExitCode.USAGE, f"{option} is {first}; with --count {count} it must have a port")
    host = url.hostname or ""
    host = f"[{host}]" if ":" in host else host
    return [f"{url.scheme}://{host}:{url.port + i}" for i in range(count)]


async def run_workers(config: RunConfig, places: Sequence[WorkerPlace], host: str) -> None:
    """Run workers until SIGTERM, on one event loop, with one tokenizer, one workflow and one set of rewards.

    Each has its own engine, heartbeats, limit of concurrency and updates of the weights. What ends one ends
    the process, and user code that blocks holds up all.

    Args:
        host: the address at which they answer probes.

    Raises:
        ExitError: a worker cannot work; the message names the cause.
    """
    spec = config.spec
    if spec.weight_sync.mode == "Staged" and not all(each.receiver_url for each in places):
        raise ExitError(
            ExitCode.USAGE, "--receiver-url is missing, but spec.weightSync.mode is Staged: name the receiver"
        )
    # First, since loading takes long.
    listeners = [bind(host, each.health_port, "worker", "--host and --health-port") for each in places]
    folder = await asyncio.to_thread(ensure_model, spec.model, config.model_cache, spec.training.seed)
    try:
        async with _scorer(config) as scorer:
            await _run(config, places, listeners, folder, scorer)
    except ImportFailed as error:
        raise ExitError(ExitCode.REFUSED, str(error)) from error
    except RewardNotLoaded as error:
        raise ExitError(ExitCode.REFUSED, f"{_describe(config)} cannot be loaded: {error}") from error
    except TransportError as error:
        raise ExitError(ExitCode.TRY_AGAIN, str(error)) from error


async def _run(
    config: RunConfig,
    places: Sequence[WorkerPlace],
    listeners: Sequence[socket.socket],
    folder: Path,
    scorer: Scorer,
) -> None:
    spec = config.spec
    workflow = make_workflow(spec.workflow)
    renderer = PromptRenderer(load_tokenizer(folder), spec.dataset.prompt_field, spec.workflow.system_prompt)
    vocabulary_size = vocab_size(folder)
    brokers: list[WorkerBroker] = await asyncio.gather(
        *(WorkerEnd.connect(config.nats, config.names, place.name) for place in places)
    )
    workers: list[Worker] = []
    try:
        async with asyncio.TaskGroup() as running:
            for place, listener, broker in zip(places, listeners, brokers, strict=True):
                engine, updates_of = choose_engine(spec, place, vocabulary_size)
                worker = Worker(place.name, spec, broker, engine, updates_of, renderer, workflow, scorer)
                workers.append(worker)
                running.create_task(_run_one(worker, engine, broker, listener), name=place.name)

            def stop() -> None:
                for worker in workers:
                    worker.stop()

            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, stop)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors


async def _run_one(worker: Worker, engine: Engine, broker: WorkerBroker, listener: socket.socket) -> None:
    probes = asyncio.create_task(serve_health(listener, worker.engine_fault, worker.is_fit))
    try:
        await worker.run()
    finally:
        probes.cancel()
        await engine.close()
        await broker.close()


def choose_engine(spec: Spec, place: WorkerPlace, vocabulary_size: int) -> tuple[Engine, UpdatesOf]:
    """Return the engine, and what brings it the kind of weights that is trained: no other code here asks."""
    url = place.engine_url
    if spec.training.trains_adapters:
        return EngineClient(url, vocabulary_size, samples_with_adapters=True), AdapterUpdates
    engine = EngineClient(url, vocabulary_size)
    if spec.weight_sync.mode == "Staged":
        return engine, partial(StagedUpdates, receiver=ReceiverClient(place.receiver_url))
    return engine, WeightUpdates


def _scorer(config: RunConfig) -> Scorer:
    return make_scorer(
        config.spec.reward,
        answer_field=config.spec.dataset.answer_field,
        import_paths=config.import_paths,
        num_processes=max(1, (os.cpu_count() or 1) // 2),
    )


def _describe(config: RunConfig) -> str:
    """Return in words which reward a job has, and where user code is looked for."""
    reward = REWARD_TYPES[config.spec.reward.type]
    if not (isinstance(reward, ProcessReward) and reward.is_user_code):
        return f"spec.reward.type: {config.spec.reward.type}"
    folders = ", ".join(map(str, config.import_paths)) or "the installed packages"
    return f"spec.reward.function: {config.spec.reward.function} (looked for in {folders})"
