"""What worker and weight sync rely on in an engine, over HTTP, for all three kinds of engine alike.

An emulated engine has no weights. What is asked of them is skipped there, with the reason.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import pytest

from asyncrl_runtime.rollout.engine_answers import parse_load
from support.engines.tiny_models import EngineProcess
from support.engines.weight_trainer import (
    DYING_TRAINER,
    PROMPT,
    Trainer,
    ask,
    checksum,
    logprobs_from,
    metric,
    output_logprobs,
    spans_of,
    wait_until,
    weights_of,
)

NEEDS_WEIGHTS = {
    "stop tokens": "an emulated response ends where its length is drawn, whatever its tokens are",
    "checksums": "an emulated engine has no weights: equal labels are all that can be equal",
    "collectives": "an emulated engine is in no collective, so nobody can die within a broadcast to it",
}
"""What is skipped on an emulated engine, and why."""
LONG = 100
"""Tokens of an answer that is still under way when something happens to it."""


def sampling(tokens: int, **values: Any) -> dict[str, Any]:
    return {"max_new_tokens": tokens, "temperature": 1.0, "ignore_eos": True, **values}


def skip_without_weights(engine: EngineProcess, what: str) -> None:
    if not engine.computes:
        pytest.skip(NEEDS_WEIGHTS[what])


def begin(engine: EngineProcess, pool: ThreadPoolExecutor) -> Any:
    """Ask for a long answer, and return once some of it is there."""
    before = metric(engine, "num_used_tokens")
    if not engine.computes:  # its first token comes a step after its prompt
        before += len(PROMPT)
    answer = ask(pool, engine, LONG)
    wait_until(
        lambda: metric(engine, "num_running_reqs") == 1 and metric(engine, "num_used_tokens") != before
    )
    return answer


# -- samples


def test_several_prompts_are_answered_in_order_with_the_logprob_of_each_token(engine: EngineProcess) -> None:
    prompts = [PROMPT, PROMPT[::-1], PROMPT[:2]]
    answers = engine.generate(
        input_ids=prompts,
        rid=[f"{index:032x}" for index in range(3)],
        sampling_params=[sampling(6, sampling_seed=index) for index in range(3)],
        return_logprob=True,
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        meta, ids = answer["meta_info"], answer["output_ids"]
        assert meta["finish_reason"] == {"type": "length", "length": 6} and len(ids) == 6
        assert spans_of(answer) == [("default", 0, 6)]
        assert [entry[1] for entry in meta["output_token_logprobs"]] == ids
        expected = logprobs_from(engine, weights_of(0), [*prompt, *ids])[-6:]
        assert output_logprobs(answer) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_logprobs_are_those_of_the_distribution_that_was_sampled(
    engine: EngineProcess, temperature: float
) -> None:
    """They are divided by the temperature, because the trainer must know the behavior policy."""
    params = sampling(8, temperature=temperature)
    answer = engine.generate(input_ids=PROMPT, sampling_params=params, return_logprob=True)
    ids = [*PROMPT, *answer["output_ids"]]
    expected = logprobs_from(engine, weights_of(0), ids, temperature=temperature)[-8:]
    assert output_logprobs(answer) == pytest.approx(expected, abs=1e-3)


def test_the_token_that_ends_an_answer_is_part_of_it(engine: EngineProcess) -> None:
    skip_without_weights(engine, "stop tokens")
    first = engine.generate(input_ids=PROMPT, sampling_params=sampling(4, temperature=0))["output_ids"]
    params = sampling(4, temperature=0, ignore_eos=False, stop_token_ids=[first[1]])
    answer = engine.generate(input_ids=PROMPT, sampling_params=params, return_logprob=True)
    end = first.index(first[1]) + 1
    assert answer["output_ids"] == first[:end] and len(output_logprobs(answer)) == end
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": first[1]}


def test_a_stream_brings_each_token_once_and_attests_versions_at_its_end(engine: EngineProcess) -> None:
    params = sampling(40, stream_interval=16)
    body = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True, "stream": True}
    with engine.http.stream("POST", "/generate", json=body) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    lengths = [len(chunk["output_ids"]) for chunk in chunks]
    # An emulated engine sends a stream as one chunk: what comes before is of use only if an engine dies.
    assert len(chunks) >= (3 if engine.computes else 1) and sum(lengths) == 40
    assert [len(output_logprobs(chunk)) for chunk in chunks] == lengths
    assert [chunk["meta_info"]["completion_tokens"] for chunk in chunks] == list(accumulate(lengths))
    assert [bool(chunk["meta_info"]["finish_reason"]) for chunk in chunks] == [False] * (len(chunks) - 1) + [
        True
    ]
    assert spans_of(chunks[-1]) == [("default", 0, 40)]
    whole = [*PROMPT, *(token for chunk in chunks for token in chunk["output_ids"])]
    logprobs = [each for chunk in chunks for each in output_logprobs(chunk)]
    assert logprobs == pytest.approx(logprobs_from(engine, weights_of(0), whole)[-40:], abs=1e-3)


@pytest.mark.parametrize(
    "body",
    [
        {"sampling_params": {}},
        {"input_ids": [5] * 1030},
    ],
    ids=["no input", "too long"],
)
def test_what_can_never_work_is_a_400(engine: EngineProcess, body: dict[str, Any]) -> None:
    response = engine.post("/generate", body)
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_salted_prompts_are_taken(engine: EngineProcess) -> None:
    answer = engine.generate(input_ids=PROMPT, sampling_params=sampling(2), cache_salt="1.2")
    assert len(answer["output_ids"]) == 2


# -- control


def test_abort_answers_each_request_with_what_it_has(engine: EngineProcess, pool: ThreadPoolExecutor) -> None:
    answer = begin(engine, pool)
    assert engine.post("/abort_request", {"abort_all": True}).status_code == 200
    found = answer.result()
    assert found["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(found["output_ids"]) < LONG
    assert len(output_logprobs(found)) == len(found["output_ids"])


def test_while_paused_the_model_is_described_and_new_requests_are_held(
    engine: EngineProcess, pool: ThreadPoolExecutor
) -> None:
    assert engine.post("/pause_generation", {"mode": "retract"}).status_code == 200
    held = ask(pool, engine, 3)
    info = engine.http.get("/model_info", timeout=5).json()
    assert info["weight_version"] == "default"
    assert not held.done()
    assert engine.post("/continue_generation", {}).status_code == 200
    assert len(held.result()["output_ids"]) == 3


def test_the_load_can_be_read(engine: EngineProcess, pool: ThreadPoolExecutor) -> None:
    answer = begin(engine, pool)
    load = parse_load(engine.http.get("/metrics").text)
    assert 0 <= load.kv_usage <= 1 and load.num_queued == 0 and load.num_used_tokens > 0
    engine.post("/abort_request", {"abort_all": True})
    answer.result()


# -- weights


def test_new_weights_come_while_an_answer_is_under_way(
    engine: EngineProcess, pool: ThreadPoolExecutor
) -> None:
    """A retracted answer goes on under the new weights, and each token says which version it comes from."""
    old, new = weights_of(0), weights_of(1)
    trainer = Trainer([engine], "contract-retract", pool)
    answer = begin(engine, pool)
    trainer.control("/pause_generation", {"mode": "retract"})
    trainer.control("/begin_weight_update", {"selector": "all"})
    names = list(new)
    last = {"flush_cache": True, "weight_version": "3.7"}
    for part, body in ((names[:9], {"flush_cache": False}), (names[9:], last)):
        [response] = trainer.send({name: new[name] for name in part}, flat=True, **body)
        assert response.status_code == 200 and response.json()["success"], response.text
    trainer.control("/end_weight_update")
    assert engine.http.get("/model_info").json()["weight_version"] == "3.7"
    trainer.control("/continue_generation", {})
    found = answer.result()
    [(_, _, cut), *_] = spans = spans_of(found)
    assert spans == [("default", 0, cut), ("3.7", cut, LONG)] and 0 < cut < LONG
    ids, logprobs = PROMPT + found["output_ids"], output_logprobs(found)
    assert logprobs[:cut] == pytest.approx(logprobs_from(engine, old, ids)[4 : 4 + cut], abs=1e-3)
    assert logprobs[cut:] == pytest.approx(logprobs_from(engine, new, ids)[4 + cut :], abs=1e-3)
    trainer.leave()


def test_in_place_an_answer_keeps_its_cache(engine: EngineProcess, pool: ThreadPoolExecutor) -> None:
    new = weights_of(1)
    trainer = Trainer([engine], "contract-in-place", pool)
    answer = begin(engine, pool)
    trainer.control("/pause_generation", {"mode": "in_place"})
    assert engine.http.get("/flush_cache").status_code == 400, "the answer holds its part of it"
    trainer.control("/begin_weight_update", {"selector": "all"})
    [response] = trainer.send(new, flat=True, flush_cache=False, weight_version="3.8")
    assert response.status_code == 200, response.text
    trainer.control("/end_weight_update")
    trainer.control("/continue_generation", {})
    found = answer.result()
    assert [version for version, _, _ in spans_of(found)] == ["default", "3.8"]
    assert found["meta_info"]["num_retractions"] == 0
    trainer.leave()


def test_equal_weights_have_equal_checksums(engine: EngineProcess, pool: ThreadPoolExecutor) -> None:
    skip_without_weights(engine, "checksums")
    if "CUDA" in engine.post("/weights_checker", {"action": "checksum"}).text:
        pytest.skip("SGLang 0.5.21 computes checksums on GPUs alone")
    before = checksum(engine)
    trainer = Trainer([engine], "contract-sums", pool)
    trainer.control("/pause_generation", {"mode": "retract"})
    found = []
    for seed in (1, 0):
        trainer.control("/begin_weight_update", {"selector": "all"})
        trainer.send(weights_of(seed), flat=True, flush_cache=True, weight_version=f"1.{seed}")
        trainer.control("/end_weight_update")
        found.append(checksum(engine))
    trainer.control("/continue_generation", {})
    assert found[1] == before != found[0]
    trainer.leave()


def test_buckets_need_a_session(engine: EngineProcess, pool: ThreadPoolExecutor) -> None:
    trainer = Trainer([engine], "contract-session", pool)
    body = {"names": [], "dtypes": [], "shapes": [], "group_name": trainer.name}
    assert engine.post("/update_weights_from_distributed", body).status_code == 400
    assert engine.post("/end_weight_update").status_code == 400
    trainer.leave()
    assert engine.post("/destroy_weights_update_group", {"group_name": trainer.name}).status_code == 400


def test_an_engine_outlives_a_trainer_that_dies_within_a_bucket(
    engine: EngineProcess, pool: ThreadPoolExecutor
) -> None:
    skip_without_weights(engine, "collectives")
    command = [sys.executable, "-c", DYING_TRAINER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdin is not None and trainer.stdout is not None
        group = {"master_address": "127.0.0.1", "master_port": int(trainer.stdout.readline())}
        group |= {"rank_offset": 1, "world_size": 2, "group_name": "dying", "backend": "gloo"}
        assert engine.post("/init_weights_update_group", group).status_code == 200
        engine.post("/pause_generation", {"mode": "retract"})
        engine.post("/begin_weight_update", {"selector": "all"})
        body = {
            "names": ["model.norm.weight", "lm_head.weight"],
            "dtypes": ["float32"] * 2,
            "shapes": [[64], [512, 64]],
            "group_name": "dying",
        }
        trainer.stdin.write("go\n")
        trainer.stdin.flush()
        assert engine.post("/update_weights_from_distributed", body).status_code == 400
    engine.post("/continue_generation", {})
    answer = engine.generate(input_ids=PROMPT, sampling_params=sampling(4), return_logprob=True)
    expected = logprobs_from(engine, weights_of(0), [*PROMPT, *answer["output_ids"]])[-4:]
    assert output_logprobs(answer) == pytest.approx(expected, abs=1e-3), "a bucket is loaded as a whole"
    assert engine.post("/end_weight_update").status_code == 200
    assert engine.post("/destroy_weights_update_group", {"group_name": "dying"}).status_code == 200
    Trainer([engine], "contract-after-death", pool).leave()
