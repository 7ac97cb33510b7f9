"""The engine as a process: how it starts, refuses to start, and ends."""

import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_runtime.engine.model import CausalModel
from asyncrl_runtime.weights.group import open_store
from support.engines.tiny_models import EngineProcess, running_engine, tiny_model

PROMPT = [5, 6, 7]


def refused(*arguments: str) -> tuple[int, str]:
    """Exit code and message of an engine that does not start."""
    command = [sys.executable, "-m", "asyncrl_runtime.engine", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr.strip().splitlines()[-1]


def test_a_taken_port_is_tried_again_later() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, message = refused(str(tiny_model()), "--port", str(port))
    assert code == ExitCode.TRY_AGAIN
    assert f"cannot listen on 127.0.0.1:{port}" in message and "--port" in message


def test_weights_that_are_missing_or_torn_are_refused(tmp_path: Path) -> None:
    (whole,) = tiny_model().glob("*.safetensors")
    tensors = load_file(whole)
    del tensors["model.norm.weight"]
    for name, message in (("lacking", "lacks weights: model.norm.weight"), ("torn", "cannot be loaded")):
        folder = tmp_path / name
        shutil.copytree(tiny_model(), folder)
        save_file(tensors, folder / whole.name, metadata={"format": "pt"})
        if name == "torn":
            (folder / whole.name).write_bytes(whole.read_bytes()[:1000])
        with pytest.raises(ExitError, match=message) as refusal:
            CausalModel(folder, torch.float32)
        assert refusal.value.code == ExitCode.REFUSED


@pytest.mark.parametrize(
    ("missing", "message"), [("config.json", "no config.json"), ("tokenizer*.json", "no tokenizer")]
)
def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, missing: str, message: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model(), folder)
    for path in folder.glob(missing):
        path.unlink()
    code, line = refused(str(folder), "--port", "0")
    assert code == ExitCode.REFUSED
    assert str(folder) in line and message in line


def test_a_token_outside_the_vocabulary_ends_the_process() -> None:
    with running_engine(tiny_model()) as engine:
        with pytest.raises(httpx.RemoteProtocolError):
            engine.post("/generate", {"input_ids": [5, 512, 7]})
        assert engine.process.wait(timeout=10) == 1


def test_sigterm_lets_running_requests_finish() -> None:
    engine = EngineProcess(tiny_model())
    engine.post("/slow_down", {"forward_sleep_time": 0.02})
    with ThreadPoolExecutor() as pool:
        sampling = {"max_new_tokens": 30, "ignore_eos": True}
        body = {"input_ids": PROMPT, "sampling_params": sampling, "stream": True}
        with httpx.stream("POST", f"{engine.url}/generate", json=body, timeout=30) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)  # it is running
            ended = pool.submit(engine.close)
            assert list(lines)[-1] == "data: [DONE]"
        assert ended.result() == 0


def test_sigterm_ends_an_engine_that_waits_for_a_group() -> None:
    engine = EngineProcess(tiny_model())
    store = open_store("127.0.0.1")
    body = {"master_address": "127.0.0.1", "master_port": store.port, "rank_offset": 1, "world_size": 2}
    with pytest.raises(httpx.ReadTimeout):
        engine.post("/init_weights_update_group", {**body, "backend": "gloo"}, timeout=0.5)
    assert engine.close() == 0


def test_bfloat16_qwen_with_two_threads() -> None:
    """What the other tests leave out: dtype, family and threads together, at a fixed port's default host."""
    arguments = ("--dtype", "bfloat16", "--threads", "2", "--seed", "4", "--context-length", "64")
    with running_engine(tiny_model("qwen3"), *arguments) as engine:
        sampling = {"max_new_tokens": 20, "sampling_seed": 1, "ignore_eos": True}
        body = {"input_ids": PROMPT, "sampling_params": sampling, "return_logprob": True}
        answer = engine.generate(**body)
        assert len(answer["output_ids"]) == 20
        assert all(t[0] < 0 for t in answer["meta_info"]["output_token_logprobs"])
        too_long = engine.post("/generate", {"input_ids": [5] * 64})
        assert "context length (64 tokens)" in too_long.json()["error"]["message"]
