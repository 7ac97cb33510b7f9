"""Tiny random models with tokenizers, made in code, and an engine process that serves one."""

import atexit
import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

Family = Literal["llama", "qwen2", "qwen3", "qwen3_moe"]

PAD, BOS, EOS = 0, 1, 2
FEW_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TEXT = [f"{a} + {b} = {a + b}. The answer is {a * b}, or {a - b}?\n" for a in range(30) for b in range(30)]


def build_tokenizer(vocabulary_size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a chat template; ids 0, 1, 2 are pad, bos, eos."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=special[PAD],
        bos_token=special[BOS],
        eos_token=special[EOS],
        additional_special_tokens=special[3:],
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    folder: Path,
    *,
    family: Family = "llama",
    seed: int = 0,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_key_value_heads: int = 2,
    vocabulary_size: int = 512,
    context_length: int = 1024,
    tie_word_embeddings: bool = False,
    dtype: torch.dtype = torch.float32,
    initializer_range: float = 0.2,
) -> Path:
    """Write a random model and its tokenizer into `folder`; equal arguments give equal files.

    The weights are spread so widely that predictions are far from uniform, and a wrong log-prob shows.
    """
    kind, config_kind = {
        "llama": (LlamaForCausalLM, LlamaConfig),
        "qwen2": (Qwen2ForCausalLM, Qwen2Config),
        "qwen3": (Qwen3ForCausalLM, Qwen3Config),
        "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig),
    }[family]
    config = config_kind(
        vocab_size=vocabulary_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 3,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=context_length,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=initializer_range,
        **(FEW_EXPERTS if family == "qwen3_moe" else {}),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config).to(dtype)
    model.save_pretrained(folder)
    build_tokenizer(vocabulary_size).save_pretrained(folder)
    return folder


@functools.cache
def tiny_model(family: Family = "llama", seed: int = 0, tie_word_embeddings: bool = False) -> Path:
    """A folder with a model of some 0.2 M parameters, made once in a test run. Do not write into it."""
    folder = _scratch() / f"{family}-{seed}{'-tied' if tie_word_embeddings else ''}"
    return build_model(folder, family=family, seed=seed, tie_word_embeddings=tie_word_embeddings)


@functools.cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tiny-models-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class EngineProcess:
    """An engine as a real process on a free port of this machine."""

    computes = True
    """Whether there are weights, on which log-probs and checksums depend."""

    def __init__(self, model_folder: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "asyncrl_runtime.engine", str(model_folder), "--port", "0"]
        self.process = subprocess.Popen(
            [*command, *arguments],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", **(env or {})},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []
        self.url = self._wait_for_url()
        threading.Thread(target=self._drain, daemon=True).start()
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def _wait_for_url(self) -> str:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if " serves " in line or " serve at " in line:
                return line.split(" at ")[-1].strip()
        raise RuntimeError(f"engine ended with {self.process.wait()}: {''.join(self.log)}")

    def _drain(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.http.post(path, json={} if body is None else body, **options)

    def generate(self, **body: Any) -> Any:
        """Return the answer to one `/generate`, which must be a 200."""
        response = self.http.post("/generate", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def close(self) -> int:
        """Ask it to end, and return its exit code."""
        self.http.close()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)

    def kill(self) -> None:
        self.http.close()
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def running_engine(
    model_folder: Path, *arguments: str, env: dict[str, str] | None = None
) -> Iterator[EngineProcess]:
    """An engine for the length of a `with` block; its log is printed if it died on its own."""
    engine = EngineProcess(model_folder, *arguments, env=env)
    try:
        yield engine
    finally:
        if engine.process.poll() is not None:
            print("".join(engine.log), file=sys.stderr)
        engine.kill()
