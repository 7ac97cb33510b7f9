"""Puts a worker together and runs it to its end: the command `asyncrl-runtime worker`."""

import asyncio
import logging
import os
import signal
import socket
from pathlib import Path

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
from asyncrl_runtime.rollout.rewards.pool import RewardNotLoaded
from asyncrl_runtime.rollout.rewards.reward_types import REWARD_TYPES, ProcessReward
from asyncrl_runtime.rollout.rewards.scorer import Scorer, make_scorer
from asyncrl_runtime.rollout.weight_updates import WeightUpdates
from asyncrl_runtime.rollout.worker import Worker
from asyncrl_runtime.rollout.workflows import make_workflow
from asyncrl_runtime.transport.worker_end import WorkerEnd

log = logging.getLogger(__name__)


async def run_worker(config: RunConfig, name: str, engine_url: str, host: str, health_port: int) -> None:
    """Run a worker until SIGTERM.

    Args:
        name: the worker's name, the same for its successors: the pod's name, say.
        engine_url: the address of its only engine.
        host, health_port: the address at which it answers probes.

    Raises:
        ExitError: the worker cannot work; the message names the cause.
    """
    spec = config.spec
    # First, since loading takes long.
    listener = bind(host, health_port, "worker", "--host and --health-port")
    folder = await asyncio.to_thread(ensure_model, spec.model, config.model_cache, spec.training.seed)
    try:
        engine, updates_of = choose_engine(spec, engine_url, vocab_size(folder))
        async with _scorer(config) as scorer:
            await _run(config, name, engine, updates_of, folder, scorer, listener)
    except ImportFailed as error:
        raise ExitError(ExitCode.REFUSED, str(error)) from error
    except RewardNotLoaded as error:
        raise ExitError(ExitCode.REFUSED, f"{_describe(config)} cannot be loaded: {error}") from error
    except TransportError as error:
        raise ExitError(ExitCode.TRY_AGAIN, str(error)) from error


async def _run(
    config: RunConfig,
    name: str,
    engine: Engine,
    updates_of: UpdatesOf,
    folder: Path,
    scorer: Scorer,
    listener: socket.socket,
) -> None:
    workflow = make_workflow(config.spec.workflow)
    renderer = PromptRenderer(
        load_tokenizer(folder), config.spec.dataset.prompt_field, config.spec.workflow.system_prompt
    )
    broker: WorkerBroker = await WorkerEnd.connect(config.nats, config.names, name)
    worker = Worker(name, config.spec, broker, engine, updates_of, renderer, workflow, scorer)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, worker.stop)
    probes = asyncio.create_task(serve_health(listener, worker.engine_fault, worker.is_fit))
    try:
        await worker.run()
    finally:
        probes.cancel()
        await engine.close()
        await broker.close()


def choose_engine(spec: Spec, url: str, vocabulary_size: int) -> tuple[Engine, UpdatesOf]:
    """Return the engine, and what brings it the kind of weights that is trained: no other code here asks."""
    if spec.training.trains_adapters:
        return EngineClient(url, vocabulary_size, samples_with_adapters=True), AdapterUpdates
    return EngineClient(url, vocabulary_size), WeightUpdates


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
