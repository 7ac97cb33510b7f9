"""New weights for a running engine: broadcast over gloo from this process, and from a folder."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from asyncrl_runtime.weights.group import host_group, open_store
from support.engines.tiny_models import EngineProcess, running_engine, tiny_model
from support.engines.weight_trainer import (
    DYING_TRAINER,
    PROMPT,
    Trainer,
    ask,
    checksum,
    logprobs_under,
    metric,
    output_logprobs,
    spans_of,
    wait_until,
    weights_of,
)

STEP_SECONDS = 0.06


@pytest.fixture(scope="module", autouse=True)
def _gloo_on_loopback() -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"


@pytest.fixture(scope="module")
def engines() -> Iterator[list[EngineProcess]]:
    with running_engine(tiny_model()) as first, running_engine(tiny_model()) as second:
        yield [first, second]


@pytest.fixture
def engine(engines: list[EngineProcess]) -> Iterator[EngineProcess]:
    """A running engine, slow enough to act between steps, with the weights of seed 0, labeled `default`."""
    engine = engines[0]
    engine.post("/slow_down", {"forward_sleep_time": STEP_SECONDS})
    yield engine
    engine.post("/abort_request", {"abort_all": True})
    engine.post("/continue_generation")
    engine.post("/end_weight_update")
    answer = engine.post(
        "/update_weights_from_disk", {"model_path": str(tiny_model()), "weight_version": "default"}
    )
    assert answer.status_code == 200


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.mark.parametrize("flat", [False, True])
def test_update_in_a_retracting_pause(engine: EngineProcess, pool: ThreadPoolExecutor, flat: bool) -> None:
    """The rest of a response has the log-probs of the new weights over its whole prefix."""
    old, new = weights_of(0), weights_of(1)
    trainer = Trainer([engine], f"retract-{flat}", pool)
    in_flight = ask(pool, engine, 40)
    wait_until(lambda: metric(engine, "num_used_tokens") >= 15)
    trainer.control("/pause_generation", {"mode": "retract"})
    trainer.control("/begin_weight_update")
    names = list(new)
    for part, body in (
        (names[:9], {"flush_cache": False}),
        (names[9:], {"flush_cache": True, "weight_version": "0.1"}),
    ):
        assert engine.http.get("/model_info").json()["weight_version"] == "default"
        (answer,) = trainer.send({name: new[name] for name in part}, flat=flat, **body)
        assert answer.status_code == 200, answer.text
    assert answer.json()["message"].endswith("Weight version updated to 0.1.")
    assert engine.http.get("/model_info").json()["weight_version"] == "0.1"
    trainer.control("/end_weight_update")
    trainer.control("/continue_generation")

    result = in_flight.result()
    (_, _, cut), *_ = spans = spans_of(result)
    assert spans == [("default", 0, cut), ("0.1", cut, 40)] and 5 < cut < 40
    assert result["meta_info"]["weight_version"] == "0.1"
    assert result["meta_info"]["num_retractions"] == 1
    ids, found = PROMPT + result["output_ids"], output_logprobs(result)
    assert found[:cut] == pytest.approx(logprobs_under(old, ids)[4 : 4 + cut], abs=1e-4)
    assert found[cut:] == pytest.approx(logprobs_under(new, ids)[4 + cut :], abs=1e-4)
    trainer.leave()


def test_update_in_place_keeps_what_was_computed(engine: EngineProcess, pool: ThreadPoolExecutor) -> None:
    """Old keys and values stay, and what comes after is computed from them under the new weights.

    That is not what the new weights alone would say. The bound is of this step: where weights move by
    1 % of their spread, log-probs (around -4) are off by less than 0.1 on average.
    """
    old = weights_of(0)
    noise = torch.Generator().manual_seed(5)
    new = {n: w + 0.01 * w.std() * torch.randn(w.shape, generator=noise) for n, w in old.items()}
    trainer = Trainer([engine], "in-place", pool)
    in_flight = ask(pool, engine, 40)
    wait_until(lambda: metric(engine, "num_used_tokens") >= 15)
    trainer.control("/pause_generation", {"mode": "in_place"})
    trainer.control("/begin_weight_update")
    (answer,) = trainer.send(new, flush_cache=False, weight_version="0.1", flat=True)
    assert answer.status_code == 200
    trainer.control("/end_weight_update")
    trainer.control("/continue_generation")

    result = in_flight.result()
    (_, _, cut), *_ = spans = spans_of(result)
    assert spans == [("default", 0, cut), ("0.1", cut, 40)] and 5 < cut < 40
    assert result["meta_info"]["num_retractions"] == 0
    ids, found = PROMPT + result["output_ids"], output_logprobs(result)
    assert found[:cut] == pytest.approx(logprobs_under(old, ids)[4 : 4 + cut], abs=1e-4)
    kept = len(PROMPT) + cut - 1  # the last token of the old version was not computed any further
    mixed = logprobs_under(new, ids, older=old, kept=kept)
    assert found[cut:] == pytest.approx(mixed, abs=1e-4)
    recomputed = logprobs_under(new, ids)[kept:]
    errors = [abs(a - b) for a, b in zip(found[cut:], recomputed, strict=True)]
    assert 1e-3 < sum(errors) / len(errors) < 0.1
    # A new sample under another salt does not touch the old keys; under the same salt it does.
    assert ask(pool, engine, 1, cache_salt="0.1").result()["meta_info"]["cached_tokens"] == 0
    assert ask(pool, engine, 1).result()["meta_info"]["cached_tokens"] == 4
    trainer.leave()


def test_in_place_with_a_flush_updates_and_says_400(engine: EngineProcess, pool: ThreadPoolExecutor) -> None:
    new = weights_of(1)
    before = checksum(engine)
    trainer = Trainer([engine], "in-place-flush", pool)
    in_flight = ask(pool, engine, 40)
    wait_until(lambda: metric(engine, "num_running_reqs") == 1)
    trainer.control("/pause_generation", {"mode": "in_place"})
    trainer.control("/begin_weight_update")
    (answer,) = trainer.send(new, weight_version="0.1")
    assert answer.status_code == 400
    assert answer.json()["message"].startswith("Weights were updated, but the cache was not flushed")
    assert checksum(engine) != before
    assert engine.http.get("/model_info").json()["weight_version"] == "default"
    trainer.control("/end_weight_update")
    trainer.control("/continue_generation")
    assert spans_of(in_flight.result()) == [("default", 0, 40)]
    trainer.leave()


def test_two_engines_in_one_group_end_up_equal(
    engine: EngineProcess, engines: list[EngineProcess], pool: ThreadPoolExecutor
) -> None:
    trainer = Trainer(engines, "two", pool)
    before = {checksum(e) for e in engines}
    trainer.control("/pause_generation", {"mode": "retract"})
    trainer.control("/begin_weight_update")
    assert [r.status_code for r in trainer.send(weights_of(1), flat=True)] == [200, 200]
    trainer.control("/end_weight_update")
    trainer.control("/continue_generation")
    after = {checksum(e) for e in engines}
    assert len(before) == len(after) == 1 and before != after
    trainer.leave()
    folder = {"model_path": str(tiny_model())}
    assert engines[1].post("/update_weights_from_disk", folder).status_code == 200
    assert {checksum(engines[1])} == before


def test_a_group_can_be_made_again_under_a_new_or_the_same_name(
    engine: EngineProcess, pool: ThreadPoolExecutor
) -> None:
    for name in ("again", "again", "other"):
        trainer = Trainer([engine], name, pool)
        engine.post("/begin_weight_update")
        assert trainer.send({"unknown.weight": torch.zeros(3)})[0].status_code == 200
        engine.post("/end_weight_update")
        trainer.leave()
    response = engine.post("/destroy_weights_update_group", {"group_name": "again"})
    assert response.status_code == 400
    assert response.json()["message"] == "The group to be destroyed does not exist."


def test_updates_need_a_session(engine: EngineProcess, pool: ThreadPoolExecutor) -> None:
    body = {"names": ["x"], "dtypes": ["float32"], "shapes": [[3]], "group_name": "none"}
    response = engine.post("/update_weights_from_distributed", body)  # and nothing is received
    assert response.status_code == 400
    assert "must run between begin_weight_update() and end_weight_update()" in response.json()["message"]
    assert engine.post("/end_weight_update").status_code == 400
    assert engine.post("/begin_weight_update", {"selector": "all"}).status_code == 200
    assert engine.post("/begin_weight_update").status_code == 400
    response = engine.post("/update_weights_from_distributed", body)
    assert response.status_code == 400 and "Group none not in []" in response.json()["message"]
    assert engine.post("/end_weight_update").status_code == 200


def test_unknown_names_are_accepted_and_wrong_shapes_are_not(
    engine: EngineProcess, pool: ThreadPoolExecutor
) -> None:
    before = checksum(engine)
    new = weights_of(1)
    trainer = Trainer([engine], "names", pool)
    engine.post("/begin_weight_update")
    (answer,) = trainer.send({"model.no_such.weight": torch.ones(3, 2)}, weight_version="0.9")
    assert answer.status_code == 200
    assert checksum(engine) == before
    assert engine.http.get("/model_info").json()["weight_version"] == "0.9"
    norm, head = "model.norm.weight", "lm_head.weight"
    (answer,) = trainer.send({norm: new[norm] + 1, head: new[head][:-1]}, weight_version="1.0")
    assert answer.status_code == 400
    message = answer.json()["message"]
    assert "partially updated. Please discard the whole weights." in message and head in message
    assert checksum(engine) != before  # what stood before it is loaded
    assert engine.http.get("/model_info").json()["weight_version"] == "0.9"
    engine.post("/end_weight_update")
    trainer.leave()


def test_dtypes_are_converted_and_may_be_mixed_at_odd_offsets(
    engine: EngineProcess, pool: ThreadPoolExecutor
) -> None:
    new = weights_of(1)
    sent: dict[str, Tensor] = {"filler": torch.zeros(3, dtype=torch.uint8)}
    for i, (name, weight) in enumerate(new.items()):
        sent[name] = weight.bfloat16() if i % 2 else weight
    trainer = Trainer([engine], "dtypes", pool)
    engine.post("/begin_weight_update")
    assert trainer.send(sent, flat=True)[0].status_code == 200
    for name in ("model.norm.weight", "lm_head.weight", "model.layers.1.mlp.down_proj.weight"):
        body = {"name": name, "truncate_size": 2}
        found = engine.post("/get_weights_by_name", body).json()
        assert found == sent[name][:2].float().tolist()
    assert engine.post("/get_weights_by_name", {"name": "no"}).status_code == 400
    engine.post("/end_weight_update")
    trainer.leave()


def test_without_a_pause_an_update_waits_for_running_requests(
    engine: EngineProcess, pool: ThreadPoolExecutor
) -> None:
    running = ask(pool, engine, 30)
    wait_until(lambda: metric(engine, "num_running_reqs") == 1)
    begin = pool.submit(engine.post, "/begin_weight_update")
    late = ask(pool, engine, 1)  # waits behind the update, although there are free rows
    assert begin.result().status_code == 200
    ended = running.result()["meta_info"]["request_finished_ts"]
    assert late.result()["meta_info"]["forward_entry_time"] >= ended
    engine.post("/end_weight_update")


def test_a_trainer_that_dies_within_a_bucket(engine: EngineProcess, pool: ThreadPoolExecutor) -> None:
    before = checksum(engine)
    command = [sys.executable, "-c", DYING_TRAINER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdin is not None and trainer.stdout is not None
        group = {"master_address": "127.0.0.1", "master_port": int(trainer.stdout.readline())}
        group |= {"rank_offset": 1, "world_size": 2, "group_name": "dying", "backend": "gloo"}
        assert engine.post("/init_weights_update_group", group).status_code == 200
        in_flight = ask(pool, engine, 60)
        wait_until(lambda: metric(engine, "num_running_reqs") == 1)
        engine.post("/pause_generation", {"mode": "retract"})
        engine.post("/begin_weight_update")
        body = {
            "names": ["model.norm.weight", "lm_head.weight"],
            "dtypes": ["float32"] * 2,
            "shapes": [[64], [512, 64]],
            "group_name": "dying",
            "weight_version": "0.1",
        }
        trainer.stdin.write("go\n")
        trainer.stdin.flush()
        response = engine.post("/update_weights_from_distributed", body)
    assert response.status_code == 400
    assert "Failed to update parameter online" in response.json()["message"]
    assert checksum(engine) == before  # a bucket is loaded when all of it has come
    assert engine.http.get("/model_info").json()["weight_version"] == "default"
    engine.post("/continue_generation")
    assert spans_of(in_flight.result()) == [("default", 0, 60)]
    assert engine.post("/end_weight_update").status_code == 200
    assert engine.post("/destroy_weights_update_group", {"group_name": "dying"}).status_code == 200
    Trainer([engine], "after-death", pool).leave()


def test_joining_blocks_the_scheduler_until_the_store_is_dropped(
    engine: EngineProcess, pool: ThreadPoolExecutor
) -> None:
    store = open_store("127.0.0.1")
    body = {"master_address": "127.0.0.1", "master_port": store.port, "rank_offset": 1, "world_size": 3}
    join = pool.submit(engine.post, "/init_weights_update_group", {**body, "backend": "gloo"})
    answer = ask(pool, engine, 3)
    assert engine.http.get("/model_info").status_code == 200
    with pytest.raises(TimeoutError):
        answer.result(timeout=10)
    with pytest.raises(RuntimeError):  # the third member never comes
        host_group(store, 3, "weight_update_group", "gloo", timeout_seconds=1)
    assert not join.done()
    store.close()
    response = join.result(timeout=10)
    assert response.status_code == 400
    assert response.json()["message"].startswith("Failed to initialize custom process group: ")
    assert len(answer.result()["output_ids"]) == 3


def test_update_from_a_folder(engine: EngineProcess, pool: ThreadPoolExecutor) -> None:
    before = checksum(engine)
    for folder in ("/nowhere", str(tiny_model("qwen3"))):
        response = engine.post("/update_weights_from_disk", {"model_path": folder})
        assert response.status_code == 400 and response.json()["message"].startswith("Failed to update")
    assert checksum(engine) == before
    in_flight = ask(pool, engine, 30)
    wait_until(lambda: metric(engine, "num_running_reqs") == 1)
    engine.post("/pause_generation", {"mode": "retract"})
    body = {"model_path": str(tiny_model(seed=1)), "weight_version": "disk"}
    response = engine.post("/update_weights_from_disk", body).json()
    assert response["success"] and response["num_paused_requests"] == 0
    assert engine.http.get("/model_info").json()["model_path"] == str(tiny_model(seed=1))
    engine.post("/continue_generation")
    answer = in_flight.result()
    cut = spans_of(answer)[0][2]
    expected = logprobs_under(weights_of(1), PROMPT + answer["output_ids"])[4 + cut :]
    assert output_logprobs(answer)[cut:] == pytest.approx(expected, abs=1e-4)


def test_the_label_alone_can_move(engine: EngineProcess, pool: ThreadPoolExecutor) -> None:
    kept = ask(pool, engine, 40)
    wait_until(lambda: metric(engine, "num_used_tokens") >= 10)
    body = {"new_version": "x", "abort_all_requests": False}
    response = engine.post("/update_weight_version", body).json()
    assert response == {"success": True, "message": "Weight version updated to x", "new_version": "x"}
    assert [s[0] for s in spans_of(kept.result())] == ["default", "x"]
    aborted = ask(pool, engine, 40)
    wait_until(lambda: metric(engine, "num_running_reqs") == 1)
    engine.post("/update_weight_version", {"new_version": "y"})
    assert aborted.result()["meta_info"]["finish_reason"]["type"] == "abort"
    assert aborted.result()["meta_info"]["weight_version"] == "x"


def test_checksums_name_every_weight(engine: EngineProcess) -> None:
    answer = engine.post("/weights_checker", {"action": "checksum"}).json()
    assert answer["success"] and answer["message"] == "Success."
    (rank,) = answer["ranks"]
    assert set(rank["checksums"]) == set(weights_of(0))
    assert rank["per_gpu_checksum"] == answer["per_engine_checksum"]
    assert engine.post("/weights_checker", {"action": "compare"}).status_code == 400


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tied_weights_follow_either_name(pool: ThreadPoolExecutor, dtype: str) -> None:
    folder = tiny_model(tie_word_embeddings=True)
    with running_engine(folder, "--dtype", dtype) as engine:
        trainer = Trainer([engine], f"tied-{dtype}", pool)
        engine.post("/begin_weight_update")
        weight = torch.randn(512, 64).to(getattr(torch, dtype))
        for sent, other in (
            ("model.embed_tokens.weight", "lm_head.weight"),
            ("lm_head.weight", "model.embed_tokens.weight"),
        ):
            weight = weight + 1
            assert trainer.send({sent: weight})[0].status_code == 200
            found = engine.post("/get_weights_by_name", {"name": other, "truncate_size": 3}).json()
            assert found == weight[:3].float().tolist()
        trainer.leave()
