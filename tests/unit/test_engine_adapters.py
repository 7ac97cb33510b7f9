"""Adapters within the engine: who waits for whom at loads and unloads, and what they leave behind."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from asyncrl_runtime.engine.adapter_registry import AdapterRegistry
from asyncrl_runtime.engine.fields import BadRequest, SamplingParams
from asyncrl_runtime.engine.lora import PREFIX, LoadedAdapter, read_adapter, split
from asyncrl_runtime.engine.model import CausalModel
from asyncrl_runtime.engine.requests import Request
from asyncrl_runtime.engine.scheduler import Scheduler, SchedulerLimits
from asyncrl_runtime.engine.slot_attention import Segment, Window
from support.engines.tiny_models import tiny_model

TARGET = "model.layers.0.self_attn.q_proj"
CONFIG = '{"peft_type": "LORA", "r": 4, "lora_alpha": 16, "use_rslora": %s}'


@pytest.fixture(scope="module")
def model() -> CausalModel:
    return CausalModel(tiny_model(), torch.float32)


@pytest.fixture
def registry(model: CausalModel) -> Iterator[AdapterRegistry]:
    limits = SchedulerLimits(4, 4096, 256, 512, 1)
    scheduler = Scheduler(model, limits, np.random.default_rng(0), lambda _: None)
    thread = threading.Thread(target=scheduler.run)
    thread.start()
    yield AdapterRegistry(scheduler)
    scheduler.post(scheduler.stop)
    thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    halves = {
        "A": torch.randn(4, 64, generator=generator),
        "B": torch.randn(64, 4, generator=generator),
    }
    tensors = {f"{PREFIX}{TARGET}.lora_{letter}.weight": half for letter, half in halves.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(CONFIG % "false")
    return tmp_path


def naming(*names: str | None) -> list[Request]:
    prompt, params = np.array([5, 6, 7]), SamplingParams()
    return [
        Request(rid=str(i), prompt=prompt, params=params, max_new_tokens=1, lora_path=name)
        for i, name in enumerate(names)
    ]


def run(model: CausalModel, adapters: list[LoadedAdapter | None]) -> torch.Tensor:
    """Hidden states of a prompt whose tokens have these adapters."""
    cache = model.new_cache()
    cache.reserve(1, len(adapters), 0, 0)
    window = Window(cache, torch.empty(0, dtype=torch.int64), [Segment(0, 0, len(adapters))])
    with torch.inference_mode():
        return model.hidden(torch.arange(5, 5 + len(adapters)), window, split(adapters))


async def test_unloading_waits_for_all_users_and_newcomers_wait_for_it(
    registry: AdapterRegistry, folder: Path
) -> None:
    await registry.load("a", str(folder))
    users, base = naming("a", None, "a"), naming(None)
    await registry.lend(users)
    unload = asyncio.create_task(registry.unload("a"))
    await asyncio.sleep(0)
    assert registry.loaded == {}
    newcomers = naming("a")
    late = asyncio.create_task(registry.lend(newcomers))
    await registry.lend(base)
    registry.give_back(users[:1])
    registry.give_back(base)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not unload.done() and not late.done()
    registry.give_back(users[1:])
    await unload
    await late
    assert users[0].adapter is users[2].adapter is not newcomers[0].adapter
    assert users[0].cache_salt != newcomers[0].cache_salt != base[0].cache_salt
    assert registry.loaded == {"a": str(folder)}


async def test_who_waits_for_one_adapter_holds_no_other(registry: AdapterRegistry, folder: Path) -> None:
    """Otherwise the second unload would wait for the request, which waits behind that unload."""
    for name in ("a", "b"):
        await registry.load(name, str(folder))
    users = naming("b")
    await registry.lend(users)
    unload = asyncio.create_task(registry.unload("b"))
    await asyncio.sleep(0)
    second = asyncio.create_task(registry.unload("a"))
    await asyncio.sleep(0)
    both = asyncio.create_task(registry.lend(naming("a", "b")))
    await asyncio.sleep(0)
    registry.give_back(users)
    async with asyncio.timeout(10):
        await asyncio.gather(unload, second, both)
    assert set(registry.loaded) == {"a", "b"}


async def test_nothing_is_lent_where_one_name_is_unknown(registry: AdapterRegistry, folder: Path) -> None:
    await registry.load("a", str(folder))
    requests = naming("a", "unknown")
    with pytest.raises(BadRequest, match="never been loaded: unknown"):
        await registry.lend(requests)
    assert [request.adapter for request in requests] == [None, None]
    registry.give_back(requests)
    await registry.unload("a")


def test_the_scale_is_that_of_the_config(model: CausalModel, folder: Path) -> None:
    assert read_adapter(folder, model.linear_layers, model.dtype).scale == 4
    (folder / "adapter_config.json").write_text(CONFIG % "true")
    assert read_adapter(folder, model.linear_layers, model.dtype).scale == 8


def test_a_forward_without_adapters_has_no_hooks_after_one_with_them(
    model: CausalModel, folder: Path
) -> None:
    adapter = read_adapter(folder, model.linear_layers, model.dtype)
    base = run(model, [None] * 6)
    assert not torch.allclose(run(model, [adapter] * 6), base)
    mixed = run(model, [None, None, None, None, adapter, adapter])
    assert torch.allclose(mixed[:4], base[:4]) and not torch.allclose(mixed[4:], base[4:])
    assert len(model.linear_layers[TARGET]._forward_hooks) == 1
    assert torch.equal(run(model, [None] * 6), base)
    assert not any(layer._forward_hooks for layer in model.linear_layers.values())
