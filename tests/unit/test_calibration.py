"""Calibration: the numbers of a device model are found again in virtual time, and what lacks is named."""

import asyncio
import json
import re
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from asyncrl_runtime.calibration.findings import CalibrationError, Findings, render_model
from asyncrl_runtime.calibration.measured_engine import (
    EngineFacts,
    ProbedBatch,
    choose_probes,
    find_in_engine,
    fit,
)
from asyncrl_runtime.calibration.measured_run import RunFacts, StepLine, find_in_run
from asyncrl_runtime.emulation.device import NUMBERS, DeviceModel, load_device_model, parse_device_model
from asyncrl_runtime.emulation.emulated_server import EmulatedRequest, EmulatedServer, Pace
from asyncrl_runtime.simulation.simulated_job import Setting, simulate
from asyncrl_runtime.simulation.virtual_time import run_virtually
from support.messages.samples import make_job

MODEL = load_device_model("areal-7b")
HERE = "measured on a machine at a time"


class VirtualProbed:
    """An emulated engine in virtual time. Implements ProbedEngine."""

    def __init__(self, model: DeviceModel) -> None:
        self._model = model
        self._clock = asyncio.get_running_loop().time
        self._server = EmulatedServer(model, Pace(self._clock), vocabulary_size=1000)
        self._num_prompts = 0

    async def facts(self) -> EngineFacts:
        engine = self._model.engine
        return EngineFacts(engine.gpus, engine.kv_tokens, engine.max_running, 8192, "emulated")

    async def seconds(self, probe: ProbedBatch) -> float:
        began = self._clock()
        requests = []
        for _ in range(probe.num_prompts):
            self._num_prompts += 1
            prompt = [self._num_prompts, *[1] * (probe.prompt_tokens - 1)]
            requests.append(EmulatedRequest(prompt, probe.new_tokens, 0, ignores_end=True))
        await asyncio.gather(*map(self._server.sample, requests))
        return self._clock() - began


async def probed(model: DeviceModel) -> Findings:
    return await find_in_engine(VirtualProbed(model), HERE)


@pytest.mark.parametrize("name", ["areal-1.5b", "areal-7b", "areal-32b"])
def test_an_engines_rates_are_found_again(name: str) -> None:
    model = load_device_model(name)
    found = run_virtually(probed(model)).numbers
    engine = model.engine
    assert found == {
        "engine.stepSeconds": pytest.approx(engine.step_seconds, rel=0.02),
        "engine.stepSecondsPerToken": pytest.approx(engine.step_seconds_per_token, rel=0.05),
        "engine.prefillTokensPerSecond": pytest.approx(engine.prefill_tokens_per_second, rel=0.02),
        "engine.gpus": engine.gpus,
        "engine.kvTokens": engine.kv_tokens,
        "engine.maxRunning": engine.max_running,
    }


def test_probes_fit_the_engine_and_one_without_room_is_refused() -> None:
    probes = choose_probes(EngineFacts(1, 4_000, 8, 1024, ""))
    assert {probe.num_prompts for probe in probes} == {1, 4}
    assert all(probe.num_prompts * (probe.prompt_tokens + probe.new_tokens) <= 3_600 for probe in probes)
    with pytest.raises(CalibrationError, match="no room for two batch sizes"):
        choose_probes(EngineFacts(1, 4_000, 1, 1024, ""))


def test_what_noise_makes_negative_is_left_out_and_what_makes_no_sense_is_refused() -> None:
    probes = choose_probes(EngineFacts(1, 10**6, 64, 1024, ""))
    flat = fit(probes, [0.01 * probe.new_tokens for probe in probes], HERE)
    assert flat.numbers["engine.stepSeconds"] == pytest.approx(0.01, rel=0.01)
    assert flat.numbers["engine.stepSecondsPerToken"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(CalibrationError, match="longer answers do not take longer"):
        fit(probes, [1 / probe.new_tokens for probe in probes], HERE)


def short_model() -> DeviceModel:
    """One whose responses are so short that a token of the simulation is one of the model's."""
    model = load_device_model("areal-1.5b")
    responses = msgspec.structs.replace(
        model.responses,
        median_tokens=90.0,
        sigma=0.5,
        longest_tokens=380,
        shortest_tokens=8,
        prompt_tokens=24,
    )
    trainer = msgspec.structs.replace(
        model.trainer, update_tokens_per_second=900.0, forward_tokens_per_second=3_600.0
    )
    return msgspec.structs.replace(model, responses=responses, trainer=trainer)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[StepLine]:
    """The metrics of a simulated run, which the real loop wrote in virtual time."""
    folder = tmp_path_factory.mktemp("run")
    spec = make_job(
        *(
            "training.batchSize=8",
            "sampling.groupSize=8",
            "training.minibatches=4",
            "staleness.maxVersions=1",
        ),
        *("sampling.maxNewTokens=380", "model.contextLength=512", "training.tokensPerMicroBatch=4096"),
        *("rollout.maxConcurrency=256", "checkpoint.everySteps=5"),
    ).spec
    setting = Setting(spec, num_engines=2, trainer_gpus=1, warmup_steps=2, steps=14)
    run_virtually(simulate(setting, short_model(), folder))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_runs_numbers_are_found_again(rows: list[StepLine]) -> None:
    model = short_model()
    found = find_in_run(rows, RunFacts(HERE, 4, num_bytes=model.weights.num_bytes, bytes_source="given"))
    wanted = {
        "responses.medianTokens": (model.responses.median_tokens, 0.05),
        "responses.sigma": (model.responses.sigma, 0.1),
        "responses.promptTokens": (model.responses.prompt_tokens, 0.01),
        "trainer.updateTokensPerSecond": (model.trainer.update_tokens_per_second, 0.03),
        "trainer.forwardTokensPerSecond": (model.trainer.forward_tokens_per_second, 0.03),
        "trainer.secondsPerUpdate": (model.trainer.seconds_per_update, 0.2),
        "trainer.checkpointSeconds": (model.trainer.checkpoint_seconds, 0.01),
        "weights.numBytes": (model.weights.num_bytes, 0),
        "weights.bytesPerSecond": (model.weights.bytes_per_second, 0.05),
    }
    numbers = {path: value for path, value in found.numbers.items() if path in wanted}
    assert numbers == {path: pytest.approx(value, rel=rel) for path, (value, rel) in wanted.items()}
    assert set(found.reasons) == {"reward.seconds", "weights.joinSeconds"}


def test_a_run_that_was_sped_up_counts_in_the_devices_seconds(rows: list[StepLine]) -> None:
    slow = find_in_run(rows, RunFacts(HERE, 4, speedup=1.0)).numbers
    fast = find_in_run(rows, RunFacts(HERE, 4, speedup=10.0)).numbers
    assert fast["trainer.updateTokensPerSecond"] == pytest.approx(slow["trainer.updateTokensPerSecond"] / 10)
    assert fast["trainer.secondsPerUpdate"] == pytest.approx(slow["trainer.secondsPerUpdate"] * 10)


def test_responses_that_are_cut_are_judged_by_their_lower_half() -> None:
    noise = np.random.default_rng(1)
    lengths = [np.minimum(noise.lognormal(np.log(90), 0.8, 512), 130) for _ in range(20)]
    found = find_in_run([row_of(each) for each in lengths], RunFacts(HERE, 2)).numbers
    assert found["responses.sigma"] == pytest.approx(0.8, rel=0.05)
    assert found["responses.longestTokens"] == 130


def row_of(lengths: Any, **changes: Any) -> StepLine:
    quantiles = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "max": 1.0}
    told = {f"response_tokens_{name}": float(np.quantile(lengths, at)) for name, at in quantiles.items()}
    rest = {"num_pass_tokens": 100, "num_ranks": 1, "proximal_seconds": 1.0, "train_seconds": 3.0}
    return {**told, **rest, "prompt_tokens_mean": 5.0, **changes}


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([row_of([1, 2])] * 9, "9 steps, and at least 10"),
        ([row_of([1, 2], is_repeat=True)] * 12, "0 steps"),
        ([{"step": 1}] * 10, "has no num_pass_tokens"),
    ],
)
def test_too_few_steps_and_old_ones_are_refused(steps: Sequence[StepLine], said: str) -> None:
    with pytest.raises(CalibrationError, match=said):
        find_in_run(steps, RunFacts(HERE, 2))


def test_what_a_run_does_not_show_is_named() -> None:
    one_pass = find_in_run([row_of([1, 2], proximal_seconds=0.0)] * 10, RunFacts(HERE, 1))
    assert "training.minibatches" in one_pass.reasons["trainer.forwardTokensPerSecond"]
    assert "no checkpoint" in one_pass.reasons["trainer.checkpointSeconds"]
    assert "no export" in one_pass.reasons["weights.numBytes"]
    assert one_pass.numbers["trainer.secondsPerUpdate"] == 0
    assert "about as many tokens" in one_pass.sources["trainer.secondsPerUpdate"]


def test_a_model_says_of_each_number_whether_it_was_measured() -> None:
    findings = Findings()
    findings.found("engine.stepSecondsPerToken", 1.23456789e-8, HERE)
    findings.lacks("reward.seconds", "nobody asked")
    with pytest.raises(CalibrationError) as error:
        render_model(findings, "mine", None)
    missing = re.findall(r"^  (\S+): ", str(error.value), re.M)
    assert missing == [path for path in NUMBERS if path != "engine.stepSecondsPerToken"]
    assert "reward.seconds: nobody asked" in str(error.value)
    model = parse_device_model(render_model(findings, "mine", ("areal-7b", MODEL)), "mine")
    assert model.engine.step_seconds_per_token == 1.23457e-8
    assert model.sources["engine.stepSecondsPerToken"] == HERE
    assert model.reward == MODEL.reward
    assert model.sources["reward.seconds"].startswith("not measured; of device model areal-7b: ")


def test_of_two_findings_the_first_ones_word_is_kept() -> None:
    mine, other = Findings(), Findings()
    mine.found("engine.gpus", 2, "mine")
    other.found("engine.gpus", 1, "other")
    other.found("reward.seconds", 3, "other")
    joined = mine.joined(other)
    assert joined.numbers == {"engine.gpus": 2, "reward.seconds": 3}
    assert joined.sources == {"engine.gpus": "mine", "reward.seconds": "other"}
