"""LoRA adapters on the engine as a real process: log-probs as PEFT's, mixed batches, loads and unloads."""

import functools
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from support.engines.tiny_models import EngineProcess, Family, build_model, running_engine, tiny_model
from support.engines.weight_trainer import checksum, metric, output_logprobs, wait_until

PROMPT = [5, 6, 7, 8, 9]
LONG = list(range(20, 50))
EXACT = 1e-5
PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
KINDS: dict[str, dict[str, Any]] = {
    "all-linear": PLAIN,
    "rank-stabilized": {"r": 8, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "head": {"r": 2, "lora_alpha": 2, "target_modules": ["lm_head", "down_proj"]},
    "one-layer": {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj"], "layers_to_transform": [1]},
}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def family(request: pytest.FixtureRequest) -> Family:
    result: Family = request.param
    return result


@pytest.fixture(scope="module")
def engine(family: Family) -> Iterator[EngineProcess]:
    with running_engine(tiny_model(family), "--max-running-requests", "8") as engine:
        yield engine


@pytest.fixture(autouse=True)
def _at_full_speed_without_adapters(engine: EngineProcess) -> Iterator[None]:
    yield
    engine.post("/slow_down", {"forward_sleep_time": None})
    engine.post("/continue_generation")
    for name in load(engine, "", Path("/nowhere")).json()["loaded_adapters"]:  # the refusal lists them
        assert engine.post("/unload_lora_adapter", {"lora_name": name}).status_code == 200


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


def make_adapter(folder: Path, model_folder: Path, seed: int = 0, **config: Any) -> Path:
    """Write an adapter with random weights in both halves."""
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(init_lora_weights=False, **(PLAIN | config)))
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture
def first(scratch: Path, family: Family) -> Path:
    return _kept(scratch / f"{family}-first", tiny_model(family), 1)


@pytest.fixture
def second(scratch: Path, family: Family) -> Path:
    return _kept(scratch / f"{family}-second", tiny_model(family), 2)


@functools.cache
def _kept(folder: Path, model_folder: Path, seed: int) -> Path:
    return make_adapter(folder, model_folder, seed)


def load(engine: EngineProcess, name: str, folder: Path) -> Any:
    return engine.post("/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})


def loaded(engine: EngineProcess, name: str, folder: Path) -> str:
    response = load(engine, name, folder)
    assert response.status_code == 200, response.text
    return name


@torch.inference_mode()
def peft_logprobs(model_folder: Path, adapter: Path | None, ids: list[int]) -> list[float]:
    """[tokens - 1] of a sequence, by transformers and PEFT, in fp32; None for the base model."""
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, attn_implementation="eager", dtype=torch.float32
    )
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    tokens = torch.tensor([ids])
    logprobs = model(input_ids=tokens, use_cache=False).logits[0, :-1].log_softmax(-1)
    result: list[float] = logprobs.gather(1, tokens[0, 1:, None])[:, 0].tolist()
    return result


def assert_sampled_from(answer: Any, prompt: list[int], model_folder: Path, adapter: Path | None) -> None:
    expected = peft_logprobs(model_folder, adapter, prompt + answer["output_ids"])
    assert output_logprobs(answer) == pytest.approx(expected[len(prompt) - 1 :], abs=EXACT)


def body(prompt: Any = PROMPT, max_new_tokens: int = 12, **fields: Any) -> dict[str, Any]:
    params = {"max_new_tokens": max_new_tokens, "ignore_eos": True, "sampling_seed": 1}
    return {"input_ids": prompt, "sampling_params": params, "return_logprob": True, **fields}


def ask(pool: ThreadPoolExecutor, engine: EngineProcess, **fields: Any) -> "Future[Any]":
    return pool.submit(engine.generate, **body(**fields))


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_outputs_are_scored_as_by_peft(
    engine: EngineProcess, family: Family, kind: str, tmp_path: Path
) -> None:
    base = tiny_model(family)
    adapter = make_adapter(tmp_path, base, **KINDS[kind])
    name = loaded(engine, "a", adapter)
    answer = engine.generate(**body(LONG, 30, lora_path=name, logprob_start_len=0))
    expected = peft_logprobs(base, adapter, LONG + answer["output_ids"])
    plain = peft_logprobs(base, None, LONG + answer["output_ids"])
    assert max(abs(a - b) for a, b in zip(expected, plain, strict=True)) > 0.1  # it shows in what follows
    scored = [t[0] for t in answer["meta_info"]["input_token_logprobs"][1:]]
    assert scored == pytest.approx(expected[: len(LONG) - 1], abs=EXACT)
    assert output_logprobs(answer) == pytest.approx(expected[len(LONG) - 1 :], abs=EXACT)


def test_after_a_retraction_the_adapter_is_still_there(
    engine: EngineProcess, family: Family, first: Path, pool: ThreadPoolExecutor
) -> None:
    name = loaded(engine, "a", first)
    engine.post("/slow_down", {"forward_sleep_time": 0.1})
    answer = ask(pool, engine, max_new_tokens=60, lora_path=name)
    wait_until(lambda: metric(engine, "num_used_tokens") >= 12)
    engine.post("/pause_generation", {"mode": "retract"})
    assert engine.post("/flush_cache").status_code == 200
    engine.post("/slow_down", {"forward_sleep_time": None})
    engine.post("/continue_generation")
    result = answer.result()
    assert result["meta_info"]["num_retractions"] == 1
    assert_sampled_from(result, PROMPT, tiny_model(family), first)


def test_rows_of_one_batch_have_their_own_adapters(
    engine: EngineProcess, family: Family, first: Path, second: Path, pool: ThreadPoolExecutor
) -> None:
    """Three rows decode while prompts of all three kinds come along, one of them twice."""
    base = tiny_model(family)
    names: list[str | None] = [loaded(engine, "a", first), None, loaded(engine, "b", second)]
    folders = [first, None, second]
    engine.post("/slow_down", {"forward_sleep_time": 0.1})
    earlier = ask(pool, engine, prompt=[PROMPT, LONG, PROMPT[1:]], max_new_tokens=60, lora_path=names)
    wait_until(lambda: metric(engine, "num_running_reqs") == 3)
    later = ask(pool, engine, prompt=[LONG, LONG, PROMPT, LONG], lora_path=["b", None, "a", "b"])
    wait_until(lambda: metric(engine, "num_running_reqs") == 7)
    engine.post("/slow_down", {"forward_sleep_time": None})
    for answer, prompt, folder in zip(earlier.result(), [PROMPT, LONG, PROMPT[1:]], folders, strict=True):
        assert_sampled_from(answer, prompt, base, folder)
    answers = later.result()
    for answer, prompt, folder in zip(
        answers, [LONG, LONG, PROMPT, LONG], [second, None, first, second], strict=True
    ):
        assert_sampled_from(answer, prompt, base, folder)
    assert answers[0]["output_ids"] == answers[3]["output_ids"]


def test_one_name_holds_for_all_prompts_and_samples(
    engine: EngineProcess, family: Family, first: Path
) -> None:
    fields = body([PROMPT, LONG], lora_path=loaded(engine, "a", first))
    fields["sampling_params"] = {"max_new_tokens": 8, "ignore_eos": True, "n": 2}
    answers = engine.generate(**fields)
    for answer, prompt in zip(answers, [PROMPT, PROMPT, LONG, LONG], strict=True):
        assert_sampled_from(answer, prompt, tiny_model(family), first)


def test_the_cache_is_not_shared_between_adapters(
    engine: EngineProcess, family: Family, first: Path, second: Path
) -> None:
    base = tiny_model(family)
    loaded(engine, "a", first)
    loaded(engine, "b", second)
    engine.post("/flush_cache")
    for name, folder in ((None, None), ("a", first), ("b", second)):
        answer = engine.generate(**body(LONG, lora_path=name))
        assert answer["meta_info"]["cached_tokens"] == 0
        assert_sampled_from(answer, LONG, base, folder)
    for name, folder in (("b", second), ("a", first), (None, None)):
        answer = engine.generate(**body([*LONG, 7], lora_path=name))
        assert answer["meta_info"]["cached_tokens"] == len(LONG)
        assert_sampled_from(answer, [*LONG, 7], base, folder)


def test_a_name_given_to_other_weights_finds_nothing_in_the_cache(
    engine: EngineProcess, family: Family, first: Path, second: Path
) -> None:
    loaded(engine, "a", first)
    engine.generate(**body(LONG, lora_path="a"))
    assert engine.post("/unload_lora_adapter", {"lora_name": "a"}).json()["success"]
    loaded(engine, "a", second)
    answer = engine.generate(**body(LONG, lora_path="a"))
    assert answer["meta_info"]["cached_tokens"] == 0
    assert_sampled_from(answer, LONG, tiny_model(family), second)


def test_a_name_never_loaded_is_refused(engine: EngineProcess, first: Path) -> None:
    loaded(engine, "a", first)
    for fields in (body(lora_path="other"), body([PROMPT, LONG], lora_path=["a", "other"])):
        response = engine.post("/generate", fields)
        assert response.status_code == 400
        assert "never been loaded: other" in response.json()["error"]["message"]
    response = engine.post("/generate", body(lora_path="other", stream=True))
    event, done = response.text.strip().split("\n\n")
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == 400 and done == "data: [DONE]"
    assert engine.post("/generate", body([PROMPT, LONG], lora_path=["a"])).status_code == 400
    response = engine.post("/unload_lora_adapter", {"lora_name": "other"})
    assert response.status_code == 400 and "does not exist" in response.json()["error_message"]
    assert engine.post("/unload_lora_adapter", {"lora_name": "a"}).json()["loaded_adapters"] == {}


def test_a_name_is_loaded_once(engine: EngineProcess, family: Family, first: Path, second: Path) -> None:
    answer = load(engine, "a", first).json()
    assert answer == {"success": True, "error_message": "", "loaded_adapters": {"a": str(first)}}
    response = load(engine, "a", second)
    assert response.status_code == 400
    answer = response.json()
    assert not answer["success"] and answer["loaded_adapters"] == {"a": str(first)}
    assert answer["error_message"] == "Failed to load LoRA adapter a because it is already loaded"
    assert load(engine, "b", second).json()["loaded_adapters"] == {"a": str(first), "b": str(second)}
    assert_sampled_from(engine.generate(**body(lora_path="a")), PROMPT, tiny_model(family), first)


def test_unloading_waits_for_requests(
    engine: EngineProcess, family: Family, first: Path, pool: ThreadPoolExecutor
) -> None:
    loaded(engine, "a", first)
    engine.post("/slow_down", {"forward_sleep_time": 0.1})
    answer = ask(pool, engine, max_new_tokens=60, lora_path="a")
    wait_until(lambda: metric(engine, "num_running_reqs") == 1)
    engine.post("/slow_down", {"forward_sleep_time": 0.02})
    response = engine.post("/unload_lora_adapter", {"lora_name": "a"})
    assert metric(engine, "num_running_reqs") == 0
    assert response.json() == {"success": True, "error_message": "", "loaded_adapters": {}}
    assert len(answer.result()["output_ids"]) == 60
    assert_sampled_from(answer.result(), PROMPT, tiny_model(family), first)


def test_an_unload_is_not_held_up_by_a_client_that_left(
    engine: EngineProcess, first: Path, pool: ThreadPoolExecutor
) -> None:
    loaded(engine, "a", first)
    engine.post("/slow_down", {"forward_sleep_time": 0.05})
    with engine.http.stream("POST", "/generate", json=body(max_new_tokens=900, lora_path="a", stream=True)):
        wait_until(lambda: metric(engine, "num_running_reqs") == 1)
    assert engine.post("/unload_lora_adapter", {"lora_name": "a"}).status_code == 200
    wait_until(lambda: metric(engine, "num_running_reqs") == 0)


def test_a_request_for_an_unloaded_adapter_loads_its_folder_again(
    engine: EngineProcess, family: Family, first: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(first, tmp_path / "copy"))
    loaded(engine, "a", folder)
    engine.post("/unload_lora_adapter", {"lora_name": "a"})
    assert_sampled_from(engine.generate(**body(lora_path="a")), PROMPT, tiny_model(family), first)
    engine.post("/unload_lora_adapter", {"lora_name": "a"})
    shutil.rmtree(folder)
    response = engine.post("/generate", body(lora_path="a"))
    assert response.status_code == 400 and "adapter_config.json" in response.json()["error"]["message"]


def test_loading_does_not_disturb_requests_nor_the_weights(
    engine: EngineProcess, first: Path, pool: ThreadPoolExecutor
) -> None:
    weights = checksum(engine)
    alone = engine.generate(**body(max_new_tokens=30))
    engine.post("/slow_down", {"forward_sleep_time": 0.1})
    answer = ask(pool, engine, max_new_tokens=30)
    wait_until(lambda: metric(engine, "num_running_reqs") == 1)
    loaded(engine, "a", first)
    assert not answer.done()
    engine.post("/slow_down", {"forward_sleep_time": None})
    adapted = ask(pool, engine, lora_path="a").result()
    assert adapted["output_ids"] != alone["output_ids"][:12]
    assert answer.result()["output_ids"] == alone["output_ids"]
    assert checksum(engine) == weights


def test_an_adapter_goes_on_over_new_weights_of_the_base(
    engine: EngineProcess, family: Family, first: Path
) -> None:
    loaded(engine, "a", first)
    for folder in (tiny_model(family, 1), tiny_model(family)):
        response = engine.post("/update_weights_from_disk", {"model_path": str(folder)})
        assert response.status_code == 200, response.text
        assert_sampled_from(engine.generate(**body(lora_path="a")), PROMPT, folder, first)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"target_modules": ["embed_tokens", "q_proj"]}, "model.embed_tokens is not a linear layer"),
        ({"use_dora": True}, "use_dora not implemented"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern not implemented"),
        ({"modules_to_save": ["norm"], "target_modules": ["q_proj"]}, "modules_to_save not implemented"),
        ({"bias": "all", "target_modules": ["q_proj"]}, "bias not implemented"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(
    engine: EngineProcess, family: Family, config: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    response = load(engine, "a", make_adapter(tmp_path, tiny_model(family), **config))
    answer = response.json()
    assert response.status_code == 400 and answer["loaded_adapters"] == {} and not answer["success"]
    assert complaint in answer["error_message"]


def test_an_adapter_for_another_model_is_refused(engine: EngineProcess, tmp_path: Path) -> None:
    wide = make_adapter(tmp_path / "wide", build_model(tmp_path / "model", hidden_size=32))
    deep = make_adapter(tmp_path / "deep", build_model(tmp_path / "deep model", num_layers=3))
    assert "has shape [4, 96], expected [4, 192]" in load(engine, "a", wide).json()["error_message"]
    assert "model.layers.2." in load(engine, "a", deep).json()["error_message"]


def test_a_broken_folder_is_refused(engine: EngineProcess, first: Path, tmp_path: Path) -> None:
    for path in ("", str(tmp_path), "no\0path", "x" * 5000):
        response = engine.post("/load_lora_adapter", {"lora_name": "a", "lora_path": path})
        assert response.status_code == 400 and not response.json()["success"]
    folder = Path(shutil.copytree(first, tmp_path / "cut"))
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert load(engine, "a", folder).status_code == 400
    for config in ("[]", "{", '{"peft_type": "IA3"}', '{"peft_type": "LORA", "r": 0, "lora_alpha": 1}'):
        (folder / "adapter_config.json").write_text(config)
        assert load(engine, "a", folder).status_code == 400
    assert engine.post("/load_lora_adapter", {"lora_name": "a"}).status_code == 400
    assert engine.generate(**body())["output_ids"]
