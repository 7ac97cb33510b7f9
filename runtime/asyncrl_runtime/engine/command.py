"""Runs the CPU engine of a job: the command `asyncrl-runtime engine`."""

import os

from asyncrl_api.run_config import RunConfig
from asyncrl_runtime.engine.server import serve
from asyncrl_runtime.model.source import ensure_model

ADAPTIVE_RUNNING_REQUESTS = 64
"""The rows of the batch if `spec.rollout.maxConcurrency` leaves the number of samples to the worker."""


def run_engine(
    config: RunConfig, host: str, port: int, *, max_running_requests: int, max_total_tokens: int
) -> None:
    """Serve the job's model until SIGTERM.

    Args:
        max_running_requests: most sequences sampled at a time; 0: the manifest decides.
        max_total_tokens: most tokens of all sequences in the cache together.

    Raises:
        ExitError: the model cannot be served, or the port is taken.
    """
    spec = config.spec
    folder = ensure_model(spec.model, config.model_cache, spec.training.seed)
    serve(
        folder,
        host,
        port,
        max_running_requests=max_running_requests
        or spec.rollout.max_concurrency
        or ADAPTIVE_RUNNING_REQUESTS,
        max_total_tokens=max_total_tokens,
        context_length=spec.model.context_length,
        dtype="bfloat16" if spec.model.dtype == "BFloat16" else "float32",
        threads=int(os.environ.get("OMP_NUM_THREADS", "1")),
        seed=spec.training.seed,
    )
