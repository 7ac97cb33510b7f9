"""`/generate` of the engine as a real process: answers, log-probs, seeds, streams, refusals, disconnects."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.engines.tiny_models import EngineProcess, running_engine, tiny_model
from support.engines.weight_trainer import metric, wait_until

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    with running_engine(tiny_model(), "--max-running-requests", "8", "--max-total-tokens", "1500") as engine:
        yield engine


@pytest.fixture(autouse=True)
def _at_full_speed(engine: EngineProcess) -> Iterator[None]:
    yield
    engine.post("/slow_down", {"forward_sleep_time": None})


def plain_logprobs(ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """[tokens - 1, vocabulary] by transformers, of what follows each token."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), attn_implementation="eager")
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
        return (logits / temperature).log_softmax(-1)


def of_tokens(logprobs: torch.Tensor, ids: list[int]) -> list[float]:
    result: list[float] = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    return result


def sampling(**params: Any) -> dict[str, Any]:
    return {"max_new_tokens": 12, "ignore_eos": True, **params}


def test_the_answer_has_the_fields_of_sglang(engine: EngineProcess) -> None:
    answer = engine.generate(input_ids=PROMPT, rid="r1", sampling_params=sampling(), return_logprob=True)
    assert set(answer) == {"text", "output_ids", "meta_info"}
    meta = answer["meta_info"]
    assert set(meta) == {
        *("id", "finish_reason", "prompt_tokens", "completion_tokens", "cached_tokens"),
        *("cached_tokens_details", "reasoning_tokens", "num_retractions", "weight_version"),
        *("weight_versions", "input_token_logprobs", "output_token_logprobs", "output_token_logprobs_length"),
        *("dp_rank", "e2e_latency", "queue_time", "first_token_latency", "decode_throughput"),
        *("request_received_ts", "request_finished_ts", "forward_entry_time", "prefill_finished_time"),
    }
    assert meta["id"] == "r1" and meta["finish_reason"] == {"type": "length", "length": 12}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["num_retractions"]) == (5, 12, 0)
    assert meta["weight_versions"] == [{"version": "default", "start": 0, "end": 12}]
    assert meta["weight_version"] == "default" and meta["input_token_logprobs"] == []
    triples = meta["output_token_logprobs"]
    assert [(t[1], t[2]) for t in triples] == [(i, None) for i in answer["output_ids"]]
    without = engine.generate(input_ids=PROMPT, sampling_params=sampling())["meta_info"]
    assert not any("logprobs" in key for key in without)


def test_put_works_as_well(engine: EngineProcess) -> None:
    body = {"input_ids": PROMPT, "sampling_params": sampling()}
    assert engine.http.put("/generate", json=body).status_code == 200


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_output_logprobs_are_those_of_a_plain_forward(engine: EngineProcess, temperature: float) -> None:
    params = sampling(temperature=temperature, max_new_tokens=40)
    answer = engine.generate(input_ids=PROMPT, sampling_params=params, return_logprob=True)
    ids = PROMPT + answer["output_ids"]
    logprobs = plain_logprobs(ids, temperature or 1.0)
    found = [t[0] for t in answer["meta_info"]["output_token_logprobs"]]
    # These weights are spread ten times as wide as usual, and so is what float32 rounds.
    assert found == pytest.approx(of_tokens(logprobs, ids)[4:], abs=5e-5)
    if temperature == 0.0:
        assert answer["output_ids"] == logprobs.argmax(-1)[4:].tolist()


def test_scoring_a_text(engine: EngineProcess) -> None:
    ids = list(range(20, 60))
    params = {"max_new_tokens": 0, "temperature": 0.3}  # which does not touch the log-probs of a prompt
    answer = engine.generate(input_ids=ids, sampling_params=params, return_logprob=True, logprob_start_len=0)
    meta = answer["meta_info"]
    first, *rest = meta["input_token_logprobs"]
    assert first == [None, 20, None] and [t[1] for t in rest] == ids[1:]
    assert [t[0] for t in rest] == pytest.approx(of_tokens(plain_logprobs(ids), ids), abs=5e-5)
    assert meta["finish_reason"] == {"type": "length", "length": 0}
    assert answer["output_ids"] == [] == meta["output_token_logprobs"] == meta["weight_versions"]


def test_scoring_from_a_later_place(engine: EngineProcess) -> None:
    ids = list(range(20, 40))
    body = {"input_ids": ids, "sampling_params": sampling(), "return_logprob": True, "logprob_start_len": 15}
    triples = engine.generate(**body)["meta_info"]["input_token_logprobs"]
    assert triples[0] == [None, 35, None]
    assert [t[0] for t in triples[1:]] == pytest.approx(of_tokens(plain_logprobs(ids), ids)[15:], abs=5e-5)


def test_text_in_and_out(engine: EngineProcess) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    answer = engine.generate(text="1 + 2 =", sampling_params=sampling(), return_prompt_token_ids=True)
    assert answer["prompt_token_ids"] == tokenizer("1 + 2 =").input_ids
    assert answer["text"] == tokenizer.decode(answer["output_ids"], skip_special_tokens=True)


def test_a_list_is_answered_in_order(engine: EngineProcess) -> None:
    prompts = [[5, 6], [7], [8, 9, 10]]
    params = [sampling(max_new_tokens=n, temperature=0) for n in (9, 2, 5)]
    answers = engine.generate(input_ids=prompts, sampling_params=params, rid=["x", "y", "z"])
    assert [a["meta_info"]["id"] for a in answers] == ["x", "y", "z"]
    assert [len(a["output_ids"]) for a in answers] == [9, 2, 5]
    for prompt, param, answer in zip(prompts, params, answers, strict=True):
        assert engine.generate(input_ids=prompt, sampling_params=param)["output_ids"] == answer["output_ids"]


def test_parallel_samples(engine: EngineProcess) -> None:
    answers = engine.generate(input_ids=PROMPT, sampling_params=sampling(n=4))
    assert len({tuple(a["output_ids"]) for a in answers}) == 4
    assert len({a["meta_info"]["id"] for a in answers}) == 4


def test_seeds_decide_whatever_else_runs(engine: EngineProcess) -> None:
    params = [sampling(sampling_seed=seed, max_new_tokens=30) for seed in range(12)]
    together = engine.generate(input_ids=[PROMPT] * 12, sampling_params=params)
    for param, answer in zip(params, together, strict=True):
        alone = engine.generate(input_ids=PROMPT, sampling_params=param)
        assert alone["output_ids"] == answer["output_ids"]


def test_a_seeded_request_goes_on_where_another_engine_left_off(engine: EngineProcess) -> None:
    params = sampling(sampling_seed=77, max_new_tokens=20)
    whole = engine.generate(input_ids=PROMPT, sampling_params=params)["output_ids"]
    rest = engine.generate(input_ids=PROMPT + whole[:8], sampling_params={**params, "max_new_tokens": 12})
    assert rest["output_ids"] == whole[8:]


def test_stop_tokens_and_strings(engine: EngineProcess) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    free = engine.generate(input_ids=PROMPT, sampling_params=sampling(temperature=0))["output_ids"]
    params = {"max_new_tokens": 12, "temperature": 0}
    answer = engine.generate(
        input_ids=PROMPT, sampling_params={**params, "stop_token_ids": [free[4]]}, return_logprob=True
    )
    cut = free[: free.index(free[4]) + 1]
    assert answer["output_ids"] == cut  # the stop token is among the ids, and not in the text
    assert len(answer["meta_info"]["output_token_logprobs"]) == len(cut)
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": free[4]}
    assert answer["text"] == tokenizer.decode(cut[:-1])
    word = tokenizer.decode(free)[3:7]
    answer = engine.generate(input_ids=PROMPT, sampling_params={**params, "stop": [word, "never"]})
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": word}
    assert word not in answer["text"] and str(tokenizer.decode(free)).startswith(answer["text"])
    kept = engine.generate(input_ids=PROMPT, sampling_params={**params, "stop": word, "no_stop_trim": True})
    assert word in kept["text"] and len(kept["output_ids"]) < 12


def test_prompts_are_reused_under_equal_salts(engine: EngineProcess) -> None:
    prompt = list(range(100, 130))
    cached = [
        engine.generate(input_ids=prompt, sampling_params=sampling(), cache_salt=salt)["meta_info"][
            "cached_tokens"
        ]
        for salt in ("a", "a", "b", "b")
    ]
    assert cached == [0, 29, 0, 29]


def stream(engine: EngineProcess, **body: Any) -> list[Any]:
    with engine.http.stream("POST", "/generate", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_stream_brings_each_token_once(engine: EngineProcess) -> None:
    engine.post("/slow_down", {"forward_sleep_time": 0.02})
    body = {"input_ids": PROMPT, "sampling_params": sampling(sampling_seed=3), "return_logprob": True}
    chunks = stream(engine, **body)
    assert len(chunks) >= 9
    num_tokens = 0
    for chunk in chunks:
        meta, ids = chunk["meta_info"], chunk["output_ids"]
        num_tokens += len(ids)
        assert meta["completion_tokens"] == num_tokens and meta["weight_version"] == "default"
        assert [triple[1] for triple in meta["output_token_logprobs"]] == ids
        if chunk is not chunks[-1]:
            assert meta["finish_reason"] is None and "weight_versions" not in meta
    assert chunks[-1]["meta_info"]["weight_versions"] == [{"version": "default", "start": 0, "end": 12}]
    whole = engine.generate(**body)
    assert [token for chunk in chunks for token in chunk["output_ids"]] == whole["output_ids"]
    triples = [triple for chunk in chunks for triple in chunk["meta_info"]["output_token_logprobs"]]
    assert triples == whole["meta_info"]["output_token_logprobs"]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]


def test_only_the_last_chunk_has_a_finish_reason(engine: EngineProcess) -> None:
    """Also at full speed, where a request ends before its chunks are on their way."""
    chunks = stream(engine, input_ids=[PROMPT] * 8, sampling_params=sampling(max_new_tokens=60))
    final = [c for c in chunks if c["meta_info"]["finish_reason"] or "weight_versions" in c["meta_info"]]
    assert [c["meta_info"]["completion_tokens"] for c in final] == [60] * 8
    assert sorted(c["index"] for c in final) == list(range(8))


def test_stream_interval(engine: EngineProcess) -> None:
    engine.post("/slow_down", {"forward_sleep_time": 0.02})
    chunks = stream(engine, input_ids=PROMPT, sampling_params=sampling(stream_interval=5))
    assert [len(c["output_ids"]) for c in chunks] == [1, 4, 5, 2]


def test_a_stream_of_a_list_tells_the_index(engine: EngineProcess) -> None:
    params = [sampling(max_new_tokens=n) for n in (3, 6)]
    chunks = stream(engine, input_ids=[[5], [6]], sampling_params=params)
    counts = {c["index"]: c["meta_info"]["completion_tokens"] for c in chunks}
    assert counts == {0: 3, 1: 6}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            {"input_ids": [1], "sampling_params": {"seed": 1}},
            "unknown field `seed`, expected one of `max",
        ),
        ({"input_ids": [1], "sampling_params": {"min_p": 0.5}}, "`min_p`"),
        (
            {"input_ids": [1] * 1100},
            "(1100 tokens) is longer than the model's context length (1024",
        ),
        ({}, "Either text, input_ids or input_embeds should be provided."),
    ],
)
def test_refusals_are_400_with_sglangs_message(engine: EngineProcess, body: Any, message: str) -> None:
    response = engine.post("/generate", body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_an_id_in_use_is_refused(engine: EngineProcess) -> None:
    engine.post("/slow_down", {"forward_sleep_time": 0.05})
    body = {"input_ids": PROMPT, "rid": "twice", "sampling_params": sampling(max_new_tokens=30)}
    with ThreadPoolExecutor() as pool:
        first = pool.submit(engine.generate, **body)
        wait_until(lambda: metric(engine, "num_running_reqs") == 1)
        again = engine.post("/generate", body)
        assert again.status_code == 400
        assert again.json()["error"]["message"] == "Duplicate request ID detected: twice"
        error = stream(engine, **body)[0]["error"]
        assert error["message"] == "Duplicate request ID detected: twice" and error["code"] == 400
        assert len(first.result()["output_ids"]) == 30
    assert engine.generate(**body | {"sampling_params": sampling()})  # free again


def leave_early(engine: EngineProcess, body: dict[str, Any], moment: Callable[[], bool]) -> None:
    """Send a request and close the connection once `moment` has come."""
    host, port = engine.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /generate HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        wait_until(moment)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_aborts_its_request(engine: EngineProcess, is_stream: bool) -> None:
    engine.post("/slow_down", {"forward_sleep_time": 0.02})
    aborted = metric(engine, "num_aborted_requests_total")
    params = sampling(max_new_tokens=1000)
    body = {"input_ids": [PROMPT, PROMPT[1:]], "sampling_params": params, "stream": is_stream}
    leave_early(engine, body, lambda: metric(engine, "num_running_reqs") == 2)
    wait_until(lambda: metric(engine, "num_running_reqs") == 0)
    assert metric(engine, "num_aborted_requests_total") == aborted + 2


def test_an_abandoned_id_can_be_used_again_at_once(engine: EngineProcess) -> None:
    """What is left of the old request does not reach the new one."""
    engine.post("/slow_down", {"forward_sleep_time": 0.1})
    body = {"input_ids": PROMPT, "rid": "again", "sampling_params": sampling(max_new_tokens=300)}
    leave_early(engine, body, lambda: metric(engine, "num_running_reqs") == 1)
    response = engine.post("/generate", body | {"sampling_params": sampling(max_new_tokens=4)})
    while response.status_code == 400:  # until the engine has seen that the client is gone
        response = engine.post("/generate", body | {"sampling_params": sampling(max_new_tokens=4)})
    assert response.json()["meta_info"]["finish_reason"] == {"type": "length", "length": 4}


def test_the_youngest_are_retracted_when_the_budget_is_passed(engine: EngineProcess) -> None:
    params = [sampling(sampling_seed=i, max_new_tokens=400) for i in range(6)]
    answers = engine.generate(input_ids=[PROMPT] * 6, sampling_params=params, return_logprob=True)
    assert [len(a["output_ids"]) for a in answers] == [400] * 6
    assert sum(a["meta_info"]["num_retractions"] for a in answers) > 0
    assert answers[0]["meta_info"]["num_retractions"] == 0
    for answer in answers:
        ids = PROMPT + answer["output_ids"]
        found = [t[0] for t in answer["meta_info"]["output_token_logprobs"]]
        assert found == pytest.approx(of_tokens(plain_logprobs(ids), ids)[4:], abs=5e-5)


def test_a_row_much_longer_than_the_others_is_attended_as_it_would_be_alone(engine: EngineProcess) -> None:
    long = [3 + i % 500 for i in range(700)]
    prompts = [PROMPT, long, PROMPT[1:], PROMPT[2:]]
    answers = engine.generate(
        input_ids=prompts, sampling_params=[sampling(sampling_seed=7)] * 4, return_logprob=True
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = prompt + answer["output_ids"]
        found = [t[0] for t in answer["meta_info"]["output_token_logprobs"]]
        assert found == pytest.approx(of_tokens(plain_logprobs(ids), ids)[len(prompt) - 1 :], abs=5e-5)


def test_many_small_groups_at_once(engine: EngineProcess) -> None:
    """Every sample of 32 groups of 8 comes back to the request that asked for it."""
    answers: dict[int, Any] = {}

    def ask(group: int) -> None:
        params = [sampling(max_new_tokens=3, sampling_seed=8 * group + i) for i in range(8)]
        body = {"input_ids": [[10 + group, 5, 6, 7, 8, 9]] * 8, "sampling_params": params}
        answers[group] = httpx.post(f"{engine.url}/generate", json=body, timeout=60).json()

    threads = [threading.Thread(target=ask, args=(group,)) for group in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for group in (0, 31):
        params = sampling(max_new_tokens=3, sampling_seed=8 * group + 5)
        alone = engine.generate(input_ids=[10 + group, 5, 6, 7, 8, 9], sampling_params=params)
        assert answers[group][5]["output_ids"] == alone["output_ids"]
    assert sum(len(a["output_ids"]) for group in answers.values() for a in group) == 32 * 8 * 3
