"""How SGLang is started, on GPUs and on CPUs."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from asyncrl_api.job import Spec
from asyncrl_api.marks import merge
from asyncrl_api.parsing import parse_spec
from asyncrl_runtime.sglang.command import CPU_SHIM, environment, server_arguments
from support.manifests.smallest import SMALLEST

FOLDER = Path("/models/tiny")


def spec_of(allocation: str, **more: Any) -> Spec:
    changes = {"gpuBudget": {"allocation": allocation}, "rollout": {"maxConcurrency": 32}, **more}
    return parse_spec(merge(SMALLEST["spec"], changes))


def test_on_gpus_it_is_told_model_sizes_and_address() -> None:
    text = " ".join(server_arguments(spec_of("ExtendedResource"), FOLDER, "10.0.0.1", 30000, gpus=4))
    assert "--model-path /models/tiny --host 10.0.0.1 --port 30000 --tp-size 4 --dtype bfloat16" in text
    assert "--max-running-requests 32" in text
    assert "cpu" not in text


def test_on_cpus_it_has_the_shim_before_all_else() -> None:
    text = " ".join(server_arguments(spec_of("None"), FOLDER, "127.0.0.1", 30000, gpus=1))
    assert "--device cpu --attention-backend torch_native" in text
    found = environment(spec_of("None"), {"PYTHONPATH": "/mine", "HOME": "/root"}, gpus=1)
    assert found["PYTHONPATH"] == f"{CPU_SHIM}{os.pathsep}/mine" and found["HOME"] == "/root"
    assert found["SGLANG_USE_CPU_ENGINE"] == "1" and "SGLANG_CPU_OMP_THREADS_BIND" not in found


def test_on_cpus_each_rank_has_a_core() -> None:
    found = environment(spec_of("None"), {}, gpus=3)
    assert len(found["SGLANG_CPU_OMP_THREADS_BIND"].split("|")) == 3


def test_where_adapters_are_trained_it_is_told_their_shape() -> None:
    training = {"lora": {"rank": 8, "targetModules": ["q_proj", "up_proj"]}}
    text = " ".join(server_arguments(spec_of("ExtendedResource", training=training), FOLDER, "h", 1, gpus=1))
    assert "--enable-lora --max-lora-rank 8 --lora-target-modules q_proj up_proj" in text
    assert "--lora-backend" not in text
    text = " ".join(server_arguments(spec_of("None", training=training), FOLDER, "h", 1, gpus=1))
    assert "--lora-backend torch_native" in text
    assert "--enable-lora" not in server_arguments(spec_of("None"), FOLDER, "h", 1, gpus=1)


def test_on_gpus_the_shim_is_out_of_reach() -> None:
    found = environment(spec_of("ExtendedResource"), {"PYTHONPATH": "/mine"}, gpus=4)
    assert found["PYTHONPATH"] == "/mine" and "SGLANG_USE_CPU_ENGINE" not in found


def test_the_shims_kernels_are_there_and_say_that_they_are_not() -> None:
    code = """
import sgl_kernel
from sgl_kernel.kvcacheio import copy_all_layer_kv_cache_cpu as found
try:
    found()
except NotImplementedError as error:
    print(error)
try:
    import sgl_kernel.scalar_type
except ImportError:
    print("SGLang falls back on its own")
"""
    env = {**os.environ, "PYTHONPATH": str(CPU_SHIM)}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, env=env, stdout=subprocess.PIPE, text=True
    )
    kernel = "sgl_kernel.kvcacheio.copy_all_layer_kv_cache_cpu"
    assert done.stdout.splitlines() == [
        f"{kernel} is a kernel for GPUs: there is none on this machine",
        "SGLang falls back on its own",
    ]
