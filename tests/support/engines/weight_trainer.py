"""Rank 0 of a weight group for tests of engines, and what they check in an engine's answers."""

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from asyncrl_runtime.weights.group import host_group, leave_group, open_store
from support.engines.tiny_models import EngineProcess, Family, tiny_model

PROMPT = [5, 6, 7, 8, 9]
NUM_DRAWN_IDS = 512 - 8
"""From how many ids an emulated engine of the tiny models draws."""
DYING_TRAINER = """
import os, sys, torch, torch.distributed as dist
from asyncrl_runtime.weights.group import host_group, open_store
store = open_store("127.0.0.1")
print(store.port, flush=True)
group = host_group(store, 2, "dying", "gloo", 20)
sys.stdin.readline()
dist.broadcast(torch.full((64,), 7.0), src=0, group=group)  # model.norm.weight, and not the next
os._exit(1)
"""


class Trainer:
    """Rank 0 of a weight group, in this process, as the trainer will be.

    Engines without weights are in no collective: they are told of each bucket, and none is sent.

    Args:
        tp_size: the number of ranks of each engine.
    """

    def __init__(
        self, engines: list[EngineProcess], name: str, pool: ThreadPoolExecutor, tp_size: int = 1
    ) -> None:
        self.engines, self.name, self._pool = engines, name, pool
        self._computes = all(engine.computes for engine in engines)
        world_size = 1 + tp_size * len(engines)
        store = open_store("127.0.0.1")
        joins = [
            pool.submit(
                engine.post,
                "/init_weights_update_group",
                {
                    "master_address": "127.0.0.1",
                    "master_port": store.port,
                    "rank_offset": rank,
                    "world_size": world_size,
                    "group_name": name,
                    "backend": "gloo",
                },
            )
            for rank, engine in zip(range(1, world_size, tp_size), engines, strict=True)
        ]
        self.group = (
            host_group(store, world_size, name, "gloo", timeout_seconds=20) if self._computes else None
        )
        self.store = store
        for join in joins:
            assert join.result().json() == {
                "success": True,
                "message": "Succeeded to initialize custom process group.",
            }

    def send(
        self, tensors: Mapping[str, Tensor], *, flat: bool = False, shapes: Any = None, **body: Any
    ) -> list[httpx.Response]:
        """Announce and broadcast one bucket; return the engines' answers."""
        announced = {
            "names": list(tensors),
            "dtypes": [str(t.dtype).removeprefix("torch.") for t in tensors.values()],
            "shapes": shapes or [list(t.shape) for t in tensors.values()],
            "group_name": self.name,
            "load_format": "flattened_bucket" if flat else None,
            **body,
        }
        posts = [
            self._pool.submit(e.post, "/update_weights_from_distributed", announced) for e in self.engines
        ]
        parts = [t.contiguous() for t in tensors.values()]
        if flat:
            parts = [torch.cat([t.flatten().view(torch.uint8) for t in parts])]
        for part in parts if self._computes else []:
            dist.broadcast(part, src=0, group=self.group)
        return [post.result() for post in posts]

    def control(self, path: str, body: Any = None) -> None:
        for engine in self.engines:
            response = engine.post(path, body)
            assert response.status_code == 200, response.text

    def leave(self) -> None:
        self.control("/destroy_weights_update_group", {"group_name": self.name})
        if self.group is not None:
            leave_group(self.group)
        self.store.close()


def weights_of(seed: int, family: Family = "llama", **kind: bool) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family, seed, **kind))
    return {name: p.data for name, p in model.named_parameters()}


def load(weights: Mapping[str, Tensor]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), attn_implementation="eager")
    model.load_state_dict(dict(weights))
    return model


@torch.inference_mode()
def logprobs_under(
    weights: Mapping[str, Tensor],
    ids: list[int],
    older: Mapping[str, Tensor] | None = None,
    kept: int = 0,
    temperature: float = 1.0,
) -> list[float]:
    """[tokens - 1] of a sequence, by transformers.

    Args:
        older: weights under which the keys and values of the first `kept` tokens were computed.
    """
    tokens = torch.tensor([ids])
    past = load(older)(tokens[:, :kept], use_cache=True).past_key_values if older else None
    logits = load(weights)(tokens[:, kept:], past_key_values=past, use_cache=True).logits
    return _logprobs_of(logits[0] / temperature, tokens[0, kept:])


def logprobs_from(
    engine: EngineProcess, weights: Mapping[str, Tensor], ids: list[int], temperature: float = 1.0
) -> list[float]:
    """[tokens - 1] of a sequence, if this engine has sampled it with these weights.

    One without weights draws from all ids but the special ones alike, at any temperature.
    """
    if engine.computes:
        return logprobs_under(weights, ids, temperature=temperature)
    return [-math.log(NUM_DRAWN_IDS)] * (len(ids) - 1)


@torch.inference_mode()
def logprobs_of_model(folder: Path, ids: list[int]) -> list[float]:
    """[tokens - 1] of a sequence, by transformers, in fp32."""
    tokens = torch.tensor(ids)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return _logprobs_of(model(tokens[None]).logits[0], tokens)


def _logprobs_of(logits: Tensor, tokens: Tensor) -> list[float]:
    logprobs = logits[:-1].log_softmax(-1)
    result: list[float] = logprobs.gather(1, tokens[1:, None])[:, 0].tolist()
    return result


def metric(engine: EngineProcess, name: str) -> float:
    lines = engine.http.get("/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"sglang:{name}{{"))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def checksum(engine: EngineProcess) -> str:
    result: str = engine.post("/weights_checker", {"action": "checksum"}).json()["per_engine_checksum"]
    return result


def ask(pool: ThreadPoolExecutor, engine: EngineProcess, max_new_tokens: int, **body: Any) -> "Future[Any]":
    params = {"max_new_tokens": max_new_tokens, "ignore_eos": True, "sampling_seed": 1}
    body = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True, **body}
    return pool.submit(engine.generate, **body)


def spans_of(answer: Any) -> list[tuple[str, int, int]]:
    return [tuple(s.values()) for s in answer["meta_info"]["weight_versions"]]


def output_logprobs(answer: Any) -> list[float]:
    return [t[0] for t in answer["meta_info"]["output_token_logprobs"]]
