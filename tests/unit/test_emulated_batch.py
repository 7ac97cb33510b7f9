"""The batch of an emulated engine, against stepping through every token."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl_runtime.emulation.decode_batch import DecodeBatch, Sequence
from asyncrl_runtime.emulation.device import EngineModel

MODEL = EngineModel(
    gpus=1,
    step_seconds=0.01,
    step_seconds_per_token=1e-5,
    prefill_tokens_per_second=10_000,
    kv_tokens=100_000,
    max_running=64,
)


def run_out(batch: DecodeBatch, now: float = 0.0) -> dict[Sequence, float]:
    """Let everything end; return when each sequence did."""
    ended = {}
    batch.advance(now)
    for sequence in batch.take_finished():
        ended[sequence] = now
    while (seconds := batch.next_event()) is not None:
        now += seconds
        batch.advance(now)
        for sequence in batch.take_finished():
            ended[sequence] = now
    return ended


def stepped(model: EngineModel, sizes: list[tuple[int, int]]) -> list[float]:
    """When each of (prompt, response) ends if all begin at once, found by making one step after the other."""
    now = sum(prompt for prompt, _ in sizes) / model.prefill_tokens_per_second
    ends, step = [0.0] * len(sizes), 0
    while any(wanted > step for _, wanted in sizes):
        # The time of a step grows within it, as the tokens do: the middle of it is exact for a quadratic.
        running = [(prompt, wanted) for prompt, wanted in sizes if wanted > step]
        tokens = sum(prompt + step for prompt, _ in running) + len(running) / 2
        now += model.step_seconds + model.step_seconds_per_token * tokens
        step += 1
        for place, (_, wanted) in enumerate(sizes):
            if wanted == step:
                ends[place] = now
    return ends


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 60)), min_size=1, max_size=12))
def test_sequences_end_when_stepping_says(sizes: list[tuple[int, int]]) -> None:
    batch = DecodeBatch(MODEL)
    sequences = [Sequence(prompt, wanted, prefix=place) for place, (prompt, wanted) in enumerate(sizes)]
    for sequence in sequences:
        batch.submit(sequence)
    ended = run_out(batch)
    assert [ended[sequence] for sequence in sequences] == pytest.approx(stepped(MODEL, sizes), rel=1e-6)
    assert batch.totals.tokens == pytest.approx(sum(wanted for _, wanted in sizes))
    assert batch.num_used_tokens == 0


@given(st.integers(0, 10_000))
def test_whatever_happens_every_token_is_sampled_once_and_all_time_is_accounted_for(seed: int) -> None:
    noise = random.Random(seed)
    tight = EngineModel(
        gpus=1,
        step_seconds=0.01,
        step_seconds_per_token=1e-5,
        prefill_tokens_per_second=10_000,
        kv_tokens=noise.randint(60, 400),
        max_running=noise.randint(1, 6),
    )
    batch, now = DecodeBatch(tight, headroom=1), 0.0
    ended: list[Sequence] = []
    sequences = [Sequence(noise.randint(1, 50), noise.randint(1, 50), prefix=n) for n in range(8)]
    waiting, updates = list(sequences), 0
    while len(ended) < len(sequences):
        event = batch.next_event()
        now += min(noise.random() * 0.5, event if event is not None else 1.0)
        batch.advance(now)
        ended += batch.take_finished()
        match noise.randrange(4):
            case 0 if waiting:
                batch.submit(waiting.pop())
            case 1 if not batch.is_paused:
                batch.pause(retract=noise.random() < 0.5)
            case _ if batch.is_paused:
                updates += 1
                batch.set_label(str(updates))
                batch.resume()
        ended += batch.take_finished()
        assert batch.num_running <= tight.max_running
    totals = batch.totals
    assert totals.seconds == pytest.approx(now)
    spent = totals.idle + totals.paused + totals.prefill + totals.decode
    assert spent == pytest.approx(totals.seconds)
    assert totals.tokens == pytest.approx(sum(sequence.wanted for sequence in sequences), abs=1e-2)
    for sequence in sequences:
        ends = [end for _, end in sequence.spans]
        assert all(earlier <= later + 1e-9 for earlier, later in pairwise(ends))
        assert all(end <= sequence.wanted for end in ends)


def test_a_full_cache_retracts_the_youngest_which_is_prefilled_again() -> None:
    tight = EngineModel(
        gpus=1,
        step_seconds=0.01,
        step_seconds_per_token=0.0,
        prefill_tokens_per_second=1_000,
        kv_tokens=100,
        max_running=8,
    )
    batch = DecodeBatch(tight, headroom=0)
    older, younger = Sequence(40, 30, prefix=1), Sequence(40, 30, prefix=2)
    batch.submit(older)
    batch.submit(younger)
    ended = run_out(batch)
    assert batch.totals.retractions == 1
    assert ended[older] < ended[younger]
    assert batch.totals.prefill == pytest.approx((40 + 40 + 40 + 10) / 1_000, abs=1e-3)


def test_a_pause_takes_time_and_no_token_of_it_is_sampled() -> None:
    batch = DecodeBatch(MODEL)
    sequence = Sequence(10, 20)
    batch.submit(sequence)
    batch.advance(0.0)
    batch.take_finished()
    batch.advance(0.1)
    batch.pause(retract=False)
    before = batch.produced(sequence)
    batch.advance(5.0)
    assert batch.produced(sequence) == before > 0
    assert batch.next_event() is None
    batch.set_label("1.1")
    batch.resume()
    batch.advance(100.0)
    assert batch.take_finished() == [sequence]
    assert sequence.spans == [("default", before)]


@pytest.mark.parametrize(("retract", "more"), [(True, True), (False, False)])
def test_only_a_retraction_computes_the_cache_anew(retract: bool, more: bool) -> None:
    batch = DecodeBatch(MODEL)
    batch.submit(Sequence(1_000, 50))
    batch.advance(0.0)
    batch.take_finished()
    batch.advance(0.3)
    before = batch.totals.prefill
    batch.pause(retract=retract)
    batch.resume()
    batch.take_finished()
    run_out(batch, 0.3)
    assert (batch.totals.prefill > before + 1e-9) == more


def test_samples_of_one_prompt_share_its_prefill() -> None:
    batch = DecodeBatch(MODEL)
    for _ in range(4):
        batch.submit(Sequence(1_000, 5, prefix=7))
    run_out(batch)
    assert batch.totals.prefill == pytest.approx(1_000 / MODEL.prefill_tokens_per_second)
