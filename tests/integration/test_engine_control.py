"""Pause, abort, cache, health and metrics of the engine as a real process, with requests in flight."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from support.engines.tiny_models import EngineProcess, running_engine, tiny_model
from support.engines.weight_trainer import metric, wait_until

PROMPT = [5, 6, 7, 8, 9]
STEP_SECONDS = 0.04


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    arguments = ("--max-running-requests", "3")
    with running_engine(tiny_model(), *arguments, env={"SGLANG_HEALTH_CHECK_TIMEOUT": "1"}) as engine:
        yield engine


@pytest.fixture(autouse=True)
def _slow_and_running(engine: EngineProcess) -> Iterator[None]:
    """Steps last long enough to act between them; whatever a test leaves is aborted."""
    engine.post("/slow_down", {"forward_sleep_time": STEP_SECONDS})
    engine.post("/flush_cache")
    yield
    engine.post("/continue_generation")
    engine.post("/abort_request", {"abort_all": True})


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def ask(
    pool: ThreadPoolExecutor, engine: EngineProcess, max_new_tokens: int = 40, **body: Any
) -> "Future[Any]":
    """Send a request and return the answer to come."""
    params = {"max_new_tokens": max_new_tokens, "ignore_eos": True, "sampling_seed": 1}
    body = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True, **body}
    return pool.submit(engine.generate, **body)


def running(engine: EngineProcess, count: int) -> Callable[[], bool]:
    return lambda: metric(engine, "num_running_reqs") == count


def is_steady(engine: EngineProcess) -> bool:
    """Whether nothing is sampled. Each flush runs between two steps, if there are steps."""
    before = metric(engine, "num_used_tokens")
    for _ in range(5):
        engine.post("/flush_cache")
    return metric(engine, "num_used_tokens") == before


def test_pause_abort_ends_requests_with_what_they_have(
    engine: EngineProcess, pool: ThreadPoolExecutor
) -> None:
    answers = [ask(pool, engine) for _ in range(2)]
    wait_until(lambda: metric(engine, "num_used_tokens") >= 20)
    response = engine.post("/pause_generation")
    assert response.json() == {"message": "Generation paused successfully.", "status": "ok"}
    for answer in answers:
        meta = answer.result(timeout=10)["meta_info"]
        reason = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
        assert meta["finish_reason"] == reason
        num = meta["completion_tokens"]
        assert 0 < num < 40
        assert len(answer.result()["output_ids"]) == len(meta["output_token_logprobs"]) == num
        assert meta["weight_versions"] == [{"version": "default", "start": 0, "end": num}]
    held = ask(pool, engine, 3)
    assert engine.post("/flush_cache").status_code == 200
    assert not held.done()
    assert engine.http.get("/ready").status_code == 503
    engine.post("/continue_generation")
    assert len(held.result()["output_ids"]) == 3
    assert engine.http.get("/ready").status_code == 200


def test_pause_retract_requeues_and_goes_on(engine: EngineProcess, pool: ThreadPoolExecutor) -> None:
    plain = ask(pool, engine, 30).result()
    answer = ask(pool, engine, 30)
    wait_until(lambda: metric(engine, "num_used_tokens") >= 10)
    engine.post("/pause_generation", {"mode": "retract"})
    assert (metric(engine, "num_running_reqs"), metric(engine, "num_queue_reqs")) == (0, 1)
    assert metric(engine, "num_paused_reqs") == 1
    assert engine.post("/flush_cache").status_code == 200
    held = ask(pool, engine, 3)
    assert is_steady(engine)
    assert not answer.done() and not held.done()
    engine.post("/continue_generation")
    result = answer.result()
    assert result["meta_info"]["num_retractions"] == 1
    assert result["meta_info"]["finish_reason"] == {"type": "length", "length": 30}
    assert result["output_ids"] == plain["output_ids"]
    assert len(held.result()["output_ids"]) == 3


def test_pause_in_place_freezes(engine: EngineProcess, pool: ThreadPoolExecutor) -> None:
    plain = ask(pool, engine, 30).result()
    answer = ask(pool, engine, 30)
    wait_until(running(engine, 1))
    engine.post("/pause_generation", {"mode": "in_place"})
    assert is_steady(engine)
    assert metric(engine, "num_running_reqs") == 1
    response = engine.post("/flush_cache")
    assert (response.status_code, response.text) == (400, "Flush cache failed.\n")
    assert not answer.done()
    engine.post("/continue_generation")
    assert answer.result()["output_ids"] == plain["output_ids"]
    assert answer.result()["meta_info"]["num_retractions"] == 0


def test_a_held_request_can_leave(engine: EngineProcess) -> None:
    engine.post("/pause_generation", {"mode": "in_place"})
    with pytest.raises(httpx.ReadTimeout):
        engine.http.post("/generate", json={"input_ids": PROMPT, "rid": "left"}, timeout=0.2)
    engine.post("/continue_generation")
    wait_until(running(engine, 0))
    assert engine.generate(input_ids=PROMPT, rid="left", sampling_params={"max_new_tokens": 1})


def test_continue_wants_a_body_and_pause_a_known_mode(engine: EngineProcess) -> None:
    assert engine.http.post("/continue_generation").status_code == 400
    response = engine.post("/continue_generation", {"torch_empty_cache": True})
    assert response.json() == {"message": "Generation continued successfully.", "status": "ok"}
    assert engine.post("/pause_generation", {"mode": "softly"}).status_code == 400
    assert engine.http.get("/ready").status_code == 200


def test_abort_takes_the_prefix_of_a_live_id(engine: EngineProcess, pool: ThreadPoolExecutor) -> None:
    answers = {rid: ask(pool, engine, 60, rid=rid) for rid in ("ab-1", "ab-12", "cd-1")}
    wait_until(running(engine, 3))
    for rid in ("ab-", "ab-123", ""):  # not live
        response = engine.post("/abort_request", {"rid": rid})
        assert (response.status_code, response.content) == (200, b"")
    assert metric(engine, "num_running_reqs") == 3
    engine.post("/abort_request", {"rid": "ab-1"})
    reasons = {rid: a.result()["meta_info"]["finish_reason"]["type"] for rid, a in answers.items()}
    assert reasons == {"ab-1": "abort", "ab-12": "abort", "cd-1": "length"}


def test_abort_all_reaches_the_queue(engine: EngineProcess, pool: ThreadPoolExecutor) -> None:
    answers = [ask(pool, engine) for _ in range(5)]
    wait_until(lambda: metric(engine, "num_queue_reqs") == 2)
    engine.post("/abort_request", {"abort_all": True})
    messages = sorted(a.result()["meta_info"]["finish_reason"]["message"] for a in answers)
    assert messages == ["Abort in waiting queue"] * 2 + ["Aborted"] * 3


def test_flush_is_refused_while_something_runs_and_can_wait(
    engine: EngineProcess, pool: ThreadPoolExecutor
) -> None:
    answer = ask(pool, engine, 20)
    wait_until(running(engine, 1))
    assert engine.post("/flush_cache").status_code == 400
    assert engine.http.get("/flush_cache?timeout=20").status_code == 200
    assert answer.done() or answer.result(timeout=10)
    assert ask(pool, engine, 1).result()["meta_info"]["cached_tokens"] == 0
    assert ask(pool, engine, 1).result()["meta_info"]["cached_tokens"] == 4


def test_health(engine: EngineProcess) -> None:
    assert engine.http.get("/health").status_code == 200
    engine.post("/pause_generation", {"mode": "in_place"})
    response = engine.http.get("/health_generate")
    assert (response.status_code, response.content) == (503, b"")
    assert engine.http.get("/model_info").json()["weight_version"] == "default"  # answers all the same
    engine.post("/continue_generation")
    assert engine.http.get("/ready").status_code == 503  # until a health check has passed
    assert engine.http.get("/health").status_code == 200
    assert engine.http.get("/ready").status_code == 200


def test_health_is_good_while_all_rows_are_taken(engine: EngineProcess, pool: ThreadPoolExecutor) -> None:
    answers = [ask(pool, engine, 80) for _ in range(4)]
    wait_until(running(engine, 3))
    assert engine.http.get("/health_generate").status_code == 200
    assert not any(a.done() for a in answers)
    engine.post("/abort_request", {"abort_all": True})


def test_infos(engine: EngineProcess) -> None:
    info = engine.http.get("/model_info").json()
    assert info == engine.http.get("/get_model_info").json()
    assert (info["model_type"], info["is_generation"]) == ("llama", True)
    info = engine.http.get("/server_info").json()
    assert (info["version"], info["max_total_num_tokens"]) == ("0.5.21", 65536)
    assert {"last_gen_throughput", "memory_usage"} <= set(info["internal_states"][0])


def test_metrics_count(engine: EngineProcess, pool: ThreadPoolExecutor) -> None:
    names = ("num_requests_total", "prompt_tokens_total", "generation_tokens_total")
    before = [metric(engine, name) for name in names]
    answers = [ask(pool, engine, 50) for _ in range(2)]
    wait_until(running(engine, 2))
    assert 0 < metric(engine, "token_usage") < 0.01
    wait_until(lambda: metric(engine, "gen_throughput") > 0)
    for answer in answers:
        answer.result()
    after = [metric(engine, name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [2, 10, 100]
    assert metric(engine, "gen_throughput") == 0
    text = engine.http.get("/metrics").text
    for name in (
        "num_retracted_reqs",
        "e2e_request_latency_seconds_count",
        "time_to_first_token_seconds_sum",
    ):
        assert f"sglang:{name}{{" in text
