"""The engine process: one thread for HTTP, one for the model."""

import asyncio
import logging
import os
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import transformers

from asyncrl_api.exits import ExitCode
from asyncrl_api.processes import bind
from asyncrl_runtime.engine.app import EngineApp
from asyncrl_runtime.engine.model import DTYPES, CausalModel, context_length_of
from asyncrl_runtime.engine.scheduler import Progress, Scheduler, SchedulerLimits
from asyncrl_runtime.http_server import serve_until_stopped

logger = logging.getLogger(__name__)

SWITCH_SECONDS = 0.0005
"""Time for which one thread may keep the interpreter from the other."""


def serve(
    model_folder: Path,
    host: str,
    port: int,
    *,
    max_running_requests: int = 16,
    max_total_tokens: int = 65536,
    context_length: int = 0,
    dtype: str = "float32",
    threads: int = 1,
    max_cached_tokens: int = 16384,
    stream_interval: int = 1,
    seed: int | None = None,
) -> None:
    """Serve SGLang's native HTTP API until SIGTERM or SIGINT.

    An error that the engine cannot survive, such as a token id outside the vocabulary, ends the process with
    status 1, as it does in SGLang.

    Args:
        model_folder: a folder with config, safetensors and tokenizer, as `save_pretrained` writes it.
        port: 0 for any free one; the log line "serves ... at <url>" names it.
        max_running_requests: rows of the batch.
        max_total_tokens: most tokens of all rows together; beyond that the youngest request is retracted.
        context_length: most tokens of prompt and output together; 0: as the model's config says.
        dtype: `float32` or `bfloat16`, for weights and cache.
        threads: threads of the model; HTTP has one more.
        max_cached_tokens: most tokens of prompts that are kept for reuse; 0 keeps none.
        stream_interval: tokens between chunks of a stream.
        seed: seed of the noise for requests without a `sampling_seed`; None: a new one at every start.

    Raises:
        ExitError: the port is taken, or the model folder cannot be served.
    """
    listener = bind(
        host, port, "engine", "--host and --port (0 for any free port)"
    )  # first, since loading takes long
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model = CausalModel(model_folder, DTYPES[dtype])
    limits = SchedulerLimits(
        max_running_requests=max_running_requests,
        max_total_tokens=max_total_tokens,
        context_length=context_length or context_length_of(model_folder),
        max_cached_tokens=max_cached_tokens,
        stream_interval=stream_interval,
    )
    sys.setswitchinterval(SWITCH_SECONDS)
    arguments = {"model_path": str(model_folder), "host": host, "dtype": dtype, "random_seed": seed}
    asyncio.run(_run(model, limits, listener, np.random.default_rng(seed), arguments | limits._asdict()))


async def _run(
    model: CausalModel,
    limits: SchedulerLimits,
    listener: socket.socket,
    rng: np.random.Generator,
    arguments: Mapping[str, object],
) -> None:
    loop = asyncio.get_running_loop()

    def deliver(updates: list[Progress]) -> None:
        loop.call_soon_threadsafe(app.generation.deliver, updates)

    scheduler = Scheduler(model, limits, rng, deliver)
    app = EngineApp(scheduler, arguments)
    worker = threading.Thread(target=_run_or_die, args=(scheduler,), name="scheduler", daemon=True)
    worker.start()
    await serve_until_stopped(app.build(), listener, f"engine serves {model.folder}")
    scheduler.post(scheduler.stop)
    worker.join(timeout=1.0)
    if worker.is_alive():  # it is in a join or a broadcast that may never end
        logging.shutdown()
        os._exit(ExitCode.DONE)


def _run_or_die(scheduler: Scheduler) -> None:
    try:
        scheduler.run()
    except BaseException:
        logger.critical("the scheduler has failed, and the engine with it", exc_info=True)
        logging.shutdown()
        os._exit(1)
