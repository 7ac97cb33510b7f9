"""The scheduler's bookkeeping, on a tiny model in this process: rows, retraction, spans, reuse of prompts."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from asyncrl_runtime.engine.batch import RunningRows
from asyncrl_runtime.engine.cache import KvCache, PrefixCache
from asyncrl_runtime.engine.fields import SamplingParams
from asyncrl_runtime.engine.model import CausalModel
from asyncrl_runtime.engine.requests import Request
from asyncrl_runtime.engine.responses import build_response
from asyncrl_runtime.engine.scheduler import Progress, Scheduler, SchedulerLimits
from support.engines.tiny_models import Family, tiny_model


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> CausalModel:
    family: Family = request.param
    return CausalModel(tiny_model(family), torch.float32)


@pytest.fixture(scope="module")
def llama() -> CausalModel:
    return CausalModel(tiny_model(), torch.float32)


@pytest.fixture(autouse=True)
def _one_thread_without_gradients() -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield


class Engine:
    """A scheduler that is stepped by the test."""

    def __init__(self, model: CausalModel, **limits: int) -> None:
        settings = {
            "max_running_requests": 4,
            "max_total_tokens": 4096,
            "context_length": 256,
            "max_cached_tokens": 512,
            "stream_interval": 1,
        }
        self.updates: list[Progress] = []
        rng = np.random.default_rng(0)
        self.scheduler = Scheduler(model, SchedulerLimits(**(settings | limits)), rng, self.updates.extend)

    def run(self, *requests: Request) -> None:
        """Submit and step until all have finished."""
        self.scheduler.submit(list(requests))
        self.until(lambda: all(r.finish_reason for r in requests))

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert not self.scheduler.is_idle
            self.scheduler.step()
            self.scheduler.publish()


def make_request(
    rid: str = "r",
    prompt: list[int] | None = None,
    max_new_tokens: int = 8,
    *,
    salt: str = "",
    logprob_start: int = -1,
    **params: Any,
) -> Request:
    return Request(
        rid=rid,
        prompt=np.array(prompt or [5, 6, 7, 8], dtype=np.int64),
        params=SamplingParams(**({"ignore_eos": True, "sampling_seed": 1} | params)),
        max_new_tokens=max_new_tokens,
        salt=salt,
        return_logprob=True,
        logprob_start=logprob_start,
    )


def many_requests(count: int = 12) -> list[Request]:
    rng = np.random.default_rng(1)
    return [
        make_request(
            str(i),
            rng.integers(3, 500, rng.integers(1, 30)).tolist(),
            int(rng.integers(1, 60)),
            temperature=float(rng.choice([0.0, 0.7, 1.0])),
            sampling_seed=i,
        )
        for i in range(count)
    ]


def reference_logprobs(model: CausalModel, request: Request) -> NDArray[np.float32]:
    """[output] by transformers' own forward over the whole sequence, without any cache."""
    ids = torch.from_numpy(request.tokens)[None]
    model.module.set_attn_implementation("eager")
    logits = model.module(ids, use_cache=False).logits[0, :-1]
    model.module.set_attn_implementation("asyncrl_slots")
    temperature = 1.0 if request.params.is_greedy else request.params.temperature
    logprobs = (logits / temperature).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    result: NDArray[np.float32] = logprobs[len(request.prompt) - 1 :].numpy()
    return result


def test_logprobs_are_those_of_a_plain_forward(model: CausalModel) -> None:
    requests = many_requests()
    Engine(model).run(*requests)
    for request in requests:
        assert len(request.output_ids) == request.max_new_tokens
        assert abs(request.output_logprobs - reference_logprobs(model, request)).max() < 1e-5


def test_a_response_outgrows_its_slot(llama: CausalModel) -> None:
    long, short = make_request("long", max_new_tokens=200), make_request("short", [9], 100)
    Engine(llama).run(long, short)
    for request in (long, short):
        assert abs(request.output_logprobs - reference_logprobs(llama, request)).max() < 1e-5


def test_greedy_output_is_the_likeliest_token_at_each_place(llama: CausalModel) -> None:
    request = make_request(max_new_tokens=40, temperature=0.0)
    Engine(llama).run(request)
    ids = torch.from_numpy(request.tokens)[None]
    llama.module.set_attn_implementation("eager")
    best = llama.module(ids, use_cache=False).logits[0].argmax(-1)
    llama.module.set_attn_implementation("asyncrl_slots")
    assert request.output_ids.tolist() == best[len(request.prompt) - 1 : -1].tolist()


def test_seeded_output_does_not_depend_on_the_batch(llama: CausalModel) -> None:
    together, alone = many_requests(), many_requests()
    Engine(llama, max_running_requests=8).run(*together)
    for a, b in zip(together, alone, strict=True):
        Engine(llama).run(b)
        assert a.output_ids.tolist() == b.output_ids.tolist()


def test_a_request_continued_elsewhere_samples_the_same_tokens(llama: CausalModel) -> None:
    whole = make_request(max_new_tokens=30)
    Engine(llama).run(whole)
    begun = [*whole.prompt.tolist(), *whole.output_ids[:11].tolist()]
    rest = make_request(prompt=begun, max_new_tokens=19)
    Engine(llama).run(rest)
    assert rest.output_ids.tolist() == whole.output_ids[11:].tolist()


def test_the_token_budget_is_kept_by_retracting_the_youngest(llama: CausalModel) -> None:
    free, tight = many_requests(), many_requests()
    Engine(llama).run(*free)
    engine = Engine(llama, max_total_tokens=100)
    most_tokens = 0

    def look() -> bool:
        nonlocal most_tokens
        most_tokens = max(most_tokens, engine.scheduler.batch.num_tokens)
        return all(r.finish_reason for r in tight)

    engine.scheduler.submit(tight)
    engine.until(look)
    assert 80 < most_tokens <= 100
    assert sum(r.num_retractions for r in tight) == engine.scheduler.num_retracted > 0
    for a, b in zip(free, tight, strict=True):
        assert a.output_ids.tolist() == b.output_ids.tolist()
        assert abs(a.output_logprobs - b.output_logprobs).max() < 1e-5


def test_equal_prompts_are_computed_once(llama: CausalModel) -> None:
    engine = Engine(llama, max_running_requests=8)
    group = [make_request(str(i), sampling_seed=i) for i in range(8)]
    engine.run(*group)
    assert [r.cached_tokens for r in group] == [0] + [3] * 7
    for request in group:
        assert abs(request.output_logprobs - reference_logprobs(llama, request)).max() < 1e-5
    assert len({tuple(r.output_ids) for r in group}) > 1


def test_prompts_are_found_again_until_the_cache_is_flushed(llama: CausalModel) -> None:
    engine = Engine(llama)
    prompt = list(range(10, 30))
    longer = [*prompt, 40, 41, 42]
    first, again, extended = (
        make_request(prompt=prompt),
        make_request(prompt=prompt),
        make_request(prompt=longer),
    )
    engine.run(first)
    engine.run(again)
    engine.run(extended)
    assert (first.cached_tokens, again.cached_tokens, extended.cached_tokens) == (0, 19, 20)
    assert again.output_ids.tolist() == first.output_ids.tolist()
    assert abs(extended.output_logprobs - reference_logprobs(llama, extended)).max() < 1e-5
    salted = make_request(prompt=prompt, salt="v2")
    engine.run(salted)
    assert salted.cached_tokens == 0
    assert engine.scheduler.flush_cache()
    flushed = make_request(prompt=prompt)
    engine.run(flushed)
    assert flushed.cached_tokens == 0


@pytest.mark.parametrize("start", [0, 3, 19])
def test_logprobs_of_the_prompt(llama: CausalModel, start: int) -> None:
    engine = Engine(llama)
    engine.run(make_request(prompt=list(range(10, 30))))  # is in the cache, and must not be used
    request = make_request(prompt=list(range(10, 30)), max_new_tokens=0, logprob_start=start)
    engine.run(request)
    ids = torch.from_numpy(request.prompt)[None]
    llama.module.set_attn_implementation("eager")
    logprobs = llama.module(ids, use_cache=False).logits[0].log_softmax(-1)
    llama.module.set_attn_implementation("asyncrl_slots")
    expected = logprobs[start:-1].gather(1, ids[0, start + 1 :, None])[:, 0].numpy()
    assert request.input_logprobs is not None and len(request.input_logprobs) == 19 - start
    assert abs(request.input_logprobs - expected).max(initial=0) < 1e-5
    assert request.finish_reason == {"type": "length", "length": 0} and len(request.output_ids) == 0


def test_length_goes_before_a_stop_token(llama: CausalModel) -> None:
    free = make_request(max_new_tokens=6, temperature=0.0)
    Engine(llama).run(free)
    last, before = int(free.output_ids[5]), int(free.output_ids[4])
    assert last != before
    for stop, length, reason in (
        (last, 6, {"type": "length", "length": 6}),
        (before, 5, {"type": "stop", "matched": before}),
    ):
        request = make_request(max_new_tokens=6, temperature=0.0, ignore_eos=False, stop_token_ids=[stop])
        Engine(llama).run(request)
        assert (request.finish_reason, len(request.output_ids)) == (reason, length)


def test_no_stop_token_before_the_minimum(llama: CausalModel) -> None:
    stop_ids = list(range(3, 400))  # nearly everything stops
    short = make_request(max_new_tokens=30, ignore_eos=False, stop_token_ids=stop_ids)
    long = make_request(max_new_tokens=30, ignore_eos=False, stop_token_ids=stop_ids, min_new_tokens=12)
    Engine(llama).run(short, long)
    assert len(short.output_ids) < 12 <= len(long.output_ids)
    assert not set(long.output_ids[:12].tolist()) & {2, *stop_ids}


def test_retraction_in_a_pause_keeps_tokens_and_order(llama: CausalModel) -> None:
    engine = Engine(llama)
    requests = [make_request(str(i), [5 + i], 20, sampling_seed=i) for i in range(6)]
    plain = [make_request(str(i), [5 + i], 20, sampling_seed=i) for i in range(6)]
    Engine(llama).run(*plain)
    engine.scheduler.submit(requests)
    engine.until(lambda: engine.scheduler.num_steps == 7)
    engine.scheduler.pause(retract=True)
    assert [r.rid for r in engine.scheduler.waiting] == ["0", "1", "2", "3", "4", "5"]
    assert [len(r.output_ids) for r in requests] == [7, 7, 7, 7, 0, 0]
    assert engine.scheduler.flush_cache()
    engine.scheduler.resume()
    engine.until(lambda: all(r.finish_reason for r in requests))
    assert [r.output_ids.tolist() for r in requests] == [r.output_ids.tolist() for r in plain]
    assert [r.num_retractions for r in requests] == [1, 1, 1, 1, 0, 0]


def test_spans_change_with_the_label_alone(llama: CausalModel) -> None:
    engine = Engine(llama, max_running_requests=2)
    requests = [make_request(str(i), [5 + i], 10) for i in range(3)]
    engine.scheduler.submit(requests)
    engine.until(lambda: engine.scheduler.num_steps == 4)
    engine.scheduler.pause(retract=False)
    engine.scheduler.set_version("0.1")
    engine.scheduler.resume()
    engine.until(lambda: engine.scheduler.num_steps == 6)
    engine.scheduler.pause(retract=True)
    engine.scheduler.set_version("0.1")  # the same again makes no new span
    engine.scheduler.set_version("0.2")
    engine.scheduler.resume()
    engine.until(lambda: all(r.finish_reason for r in requests))
    assert requests[0].spans == [("default", 0, 4), ("0.1", 4, 6), ("0.2", 6, 10)]
    assert requests[1].spans == requests[0].spans
    assert requests[2].spans == [("0.2", 0, 10)]
    assert {r.weight_version for r in requests} == {"0.2"}


def test_abort_ends_rows_and_queued_requests_with_what_they_have(llama: CausalModel) -> None:
    engine = Engine(llama, max_running_requests=3)
    requests = [make_request(rid, max_new_tokens=20) for rid in ("ab-1", "ab-12", "cd", "ab-13")]
    engine.scheduler.submit(requests)
    engine.until(lambda: engine.scheduler.num_steps == 5)
    engine.scheduler.abort(lambda rid: rid.startswith("ab-1"))
    engine.until(lambda: bool(requests[2].finish_reason))
    reasons = [(r.finish_reason or {}).get("message") for r in requests]
    assert reasons == ["Aborted", "Aborted", None, "Abort in waiting queue"]
    assert [len(r.output_ids) for r in requests] == [5, 5, 20, 0]
    assert requests[0].spans == [("default", 0, 5)]
    assert [u.request.rid for u in engine.updates if u.is_last][-1] == "cd"


def test_weights_that_have_diverged_end_requests_with_an_error(llama: CausalModel) -> None:
    engine = Engine(llama)
    head = llama.parameters()["lm_head.weight"]
    saved = head.clone()
    request = make_request(max_new_tokens=10)
    engine.scheduler.submit([request])
    engine.until(lambda: engine.scheduler.num_steps == 3)
    head[:] = float("nan")
    engine.until(lambda: bool(request.finish_reason))
    head.copy_(saved)
    assert request.finish_reason is not None and request.finish_reason["status_code"] == 500
    assert len(request.output_ids) == 4  # at once


def test_streams_are_published_at_their_interval(llama: CausalModel) -> None:
    engine = Engine(llama)
    request = make_request(max_new_tokens=10, stream_interval=4)
    request.stream = True
    engine.run(request)
    assert [len(u.output_ids) for u in engine.updates] == [1, 4, 8, 10]
    assert [u.is_last for u in engine.updates] == [False, False, False, True]


def test_a_chunk_stays_one_although_its_request_has_ended(llama: CausalModel) -> None:
    """Answers are built on another thread, later."""
    engine = Engine(llama)
    request = make_request(max_new_tokens=3)
    request.stream = True
    engine.run(request)
    metas = [build_response(update, llama, "now")["meta_info"] for update in engine.updates]
    assert [m["finish_reason"] for m in metas] == [None, None, {"type": "length", "length": 3}]
    assert [m["weight_version"] for m in metas] == ["now", "now", "default"]
    assert ["weight_versions" in m for m in metas] == [False, False, True]


def test_a_token_outside_the_vocabulary_is_fatal(llama: CausalModel) -> None:
    with pytest.raises(IndexError):
        Engine(llama).run(make_request(prompt=[5, 512]))


def test_rows_keep_their_content_when_others_leave() -> None:
    rng = np.random.default_rng(0)
    cache = KvCache(2, 1, 3, torch.float32)
    batch = RunningRows(cache, 6, 40, frozenset({2}))
    expected: dict[str, tuple[list[int], torch.Tensor]] = {}
    for number in range(200):
        if len(batch) == 6 or (len(batch) and rng.random() < 0.5):
            index = int(rng.integers(len(batch)))
            rid = batch.requests[index].rid
            length = int(batch.rows["length"][index])
            tokens, kv = expected.pop(rid)
            assert batch.tokens[index, :length].tolist() == tokens
            assert torch.equal(cache.export_row(index, length), kv)
            assert batch.remove(index).rid == rid
        else:
            prompt = rng.integers(3, 500, rng.integers(1, 30))
            cache.reserve(len(batch) + 1, len(prompt), len(batch), 30)
            row = batch.add(make_request(str(number), prompt.tolist()))
            cache.kv[:, :, row, : len(prompt)] = torch.rand(2, 2, len(prompt), 1, 3)
            expected[str(number)] = (prompt.tolist(), cache.export_row(row, len(prompt)))
    assert len(batch) == len(expected)


def test_prefix_cache_drops_the_least_recently_used() -> None:
    cache = PrefixCache(max_tokens=10)
    keys = {length: np.full(length, length).tobytes() for length in (3, 4, 5)}
    for length in (3, 4):
        cache.put("", keys[length], torch.zeros(1, 2, length, 1, 1))
    assert cache.find("", keys[3]) is not None
    cache.put("", keys[5], torch.zeros(1, 2, 5, 1, 1))
    assert cache.find("", keys[4]) is None
    assert cache.find("", keys[3]) is not None and cache.find("other", keys[3]) is None
    assert (cache.num_tokens, len(cache)) == (8, 2)
