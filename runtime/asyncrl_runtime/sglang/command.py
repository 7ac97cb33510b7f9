"""Runs SGLang as the engine of a job: the command `asyncrl-runtime sglang` turns into SGLang's server."""

import importlib.util
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, NoReturn

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_api.job import Spec
from asyncrl_api.run_config import SGLANG_PYTHON, RunConfig
from asyncrl_runtime.model.source import ensure_model

log = logging.getLogger(__name__)

CPU_SHIM = Path(__file__).parent / "cpu_shim"
CPU_TOKENS = 65536
"""The tokens of the KV cache; without it SGLang would take a share of the whole machine's memory."""
CPU_OPTIONS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--max-total-tokens", str(CPU_TOKENS)),
    *("--mem-fraction-static", "0.3", "--disable-overlap-schedule", "--disable-cuda-graph"),
    "--sleep-on-idle",  # otherwise it keeps a core busy when it has nothing to do
)


def run_sglang(config: RunConfig, host: str, port: int, *, gpus: int, arguments: Sequence[str]) -> NoReturn:
    """Replace this process with SGLang's server for the job's model.

    Args:
        gpus: the tensor-parallel size.
        arguments: `rollout.engine.args`; they come last, so they win.

    Raises:
        ExitError: the model is not available, or SGLang is not installed.
    """
    spec = config.spec
    python = os.environ.get(SGLANG_PYTHON, sys.executable)
    if python == sys.executable and importlib.util.find_spec("sglang") is None:
        raise ExitError(
            ExitCode.USAGE,
            f"spec.rollout.engine.type: SGLang is not installed for {python}; name an interpreter that has "
            f"it in {SGLANG_PYTHON} (`make sglang` makes one for CPUs), or set the type to CPU",
        )
    folder = ensure_model(spec.model, config.model_cache, spec.training.seed)
    command = [python, *server_arguments(spec, folder, host, port, gpus), *arguments]
    log.info("starting %s", " ".join(command))
    try:
        os.execve(python, command, environment(spec, os.environ, gpus))
    except OSError as error:
        raise ExitError(ExitCode.USAGE, f"{SGLANG_PYTHON}: {python}: {error.strerror}") from error


def server_arguments(spec: Spec, folder: Path, host: str, port: int, gpus: int) -> list[str]:
    """Return the server's command line, without the interpreter."""
    dtype = "bfloat16" if spec.model.dtype == "BFloat16" else "float32"
    arguments = ["-m", "sglang.launch_server", "--model-path", str(folder), "--host", host]
    arguments += ["--port", str(port), "--tp-size", str(gpus), "--dtype", dtype]
    arguments += ["--context-length", str(spec.model.context_length)]
    arguments += ["--random-seed", str(spec.training.seed), "--enable-metrics", "--skip-server-warmup"]
    arguments.append("--incremental-streaming-output")  # otherwise each chunk repeats the whole answer so far
    if spec.rollout.max_concurrency:
        arguments += ["--max-running-requests", str(spec.rollout.max_concurrency)]
    return [*arguments, *adapter_options(spec).arguments, *(CPU_OPTIONS if is_on_cpu(spec) else ())]


class AdapterOptions(NamedTuple):
    """What a server gets beside its other options where adapters are trained, and nothing where not."""

    arguments: tuple[str, ...] = ()
    variables_on_cpu: Mapping[str, str] = MappingProxyType({})


def adapter_options(spec: Spec) -> AdapterOptions:
    if not spec.training.trains_adapters:
        return AdapterOptions()
    lora = spec.training.lora
    backend = ("--lora-backend", "torch_native") if is_on_cpu(spec) else ()
    arguments = ("--enable-lora", "--max-lora-rank", str(lora.rank), "--lora-target-modules")
    return AdapterOptions((*arguments, *lora.target_modules, *backend), {"ASYNCRL_SGLANG_UNPINNED": "1"})


def environment(spec: Spec, inherited: Mapping[str, str], gpus: int) -> dict[str, str]:
    """Return the server's environment: with it a probe samples nothing, and on CPUs SGLang finds the shim."""
    ours = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"}
    if is_on_cpu(spec):
        paths = [str(CPU_SHIM), *filter(None, [inherited.get("PYTHONPATH", "")])]
        ours |= {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
        ours |= adapter_options(spec).variables_on_cpu
        if gpus > 1:  # by default each rank has a NUMA node to itself, and there may be only one
            cores = sorted(os.sched_getaffinity(0))
            ours["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[i % len(cores)]) for i in range(gpus))
    return {**inherited, **ours}


def is_on_cpu(spec: Spec) -> bool:
    """Return whether the job runs on CPUs: its budget counts process slots, not GPUs."""
    return spec.gpu_budget.allocation == "None"
