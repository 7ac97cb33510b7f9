"""The whole runtime in virtual time, over a small device model: what it does, and that it does it again."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from asyncrl_api.ledger import read_ledger
from asyncrl_runtime.emulation.device import DeviceModel, load_device_model
from asyncrl_runtime.history.audit import audit
from asyncrl_runtime.simulation.figures import Figures, figures
from asyncrl_runtime.simulation.simulated_job import Setting, SimulatedRun, simulate
from asyncrl_runtime.simulation.virtual_time import run_virtually
from support.messages.samples import make_job

replace = msgspec.structs.replace


def small(**blocks: dict[str, Any]) -> DeviceModel:
    """AReaL's 1.5B with responses a tenth as long and a trainer as much slower; `blocks` change fields."""
    model = load_device_model("areal-1.5b")
    changes: dict[str, dict[str, Any]] = {
        "responses": {"median_tokens": 700.0, "longest_tokens": 2765, "prompt_tokens": 64},
        "trainer": {"update_tokens_per_second": 3_000.0, "forward_tokens_per_second": 12_000.0},
        "weights": {"num_bytes": 300_000_000},
    }
    for block, fields in blocks.items():
        changes[block] = changes.get(block, {}) | fields
    return replace(model, **{name: replace(getattr(model, name), **each) for name, each in changes.items()})


def simulated(
    folder: Path, *overrides: str, model: DeviceModel | None = None, engines: int = 2
) -> SimulatedRun:
    folder.mkdir(exist_ok=True)
    spec = make_job(
        "training.batchSize=4",
        "sampling.groupSize=4",
        "sampling.maxNewTokens=2765",
        "model.contextLength=4096",
        "training.tokensPerMicroBatch=8192",
        "rollout.maxConcurrency=64",
        *overrides,
    ).spec
    setting = Setting(spec, num_engines=engines, trainer_gpus=1, warmup_steps=2, steps=4)
    return run_virtually(simulate(setting, model or small(), folder))


def figures_of(folder: Path, *overrides: str, **more: Any) -> Figures:
    return figures(simulated(folder, *overrides, **more), more.get("model") or small())


def history(folder: Path) -> str:
    """The ledger, which names every ticket of every step."""
    return (folder / "ledger.jsonl").read_text()


def test_the_same_seed_gives_the_same_ledger_and_another_seed_another(tmp_path: Path) -> None:
    runs = [simulated(tmp_path / name, "staleness.maxVersions=2") for name in ("a", "b")]
    assert history(tmp_path / "a") == history(tmp_path / "b") != ""
    assert runs[0].ended == runs[1].ended
    other = simulated(tmp_path / "c", "staleness.maxVersions=2", "training.seed=2")
    assert other.ended != runs[0].ended


def test_synchronous_sampling_waits_and_is_never_stale(tmp_path: Path) -> None:
    found = figures_of(tmp_path / "0", "staleness.maxVersions=0")
    assert found.staleness == {0: 1.0}
    assert found.trainer_waits > 0.3
    assert found.engines_idle > 0.3


def test_asynchrony_keeps_the_trainer_busy_within_the_bound_of_staleness(tmp_path: Path) -> None:
    synchronous = figures_of(tmp_path / "0", "staleness.maxVersions=0")
    found = figures_of(tmp_path / "4", "staleness.maxVersions=4")
    assert found.tokens_per_second > 1.3 * synchronous.tokens_per_second
    assert found.trainer_trains > 0.85
    assert max(found.staleness) <= 4
    assert found.share_of_bound <= 1


def test_shares_add_up_and_tokens_are_those_that_were_trained(tmp_path: Path) -> None:
    run = simulated(tmp_path / "run", "staleness.maxVersions=1", "checkpoint.everySteps=2")
    found = figures(run, small(), price_per_gpu_hour=3.6)
    trainer = found.trainer_trains + found.trainer_waits + found.trainer_publishes
    assert trainer + found.trainer_checkpoints + found.trainer_other == pytest.approx(1)
    assert found.trainer_other < 0.01, "nothing else takes virtual time"
    assert found.trainer_checkpoints > 0
    engines = found.engines_idle + found.engines_paused + found.engines_prefill + found.engines_decode
    assert engines == pytest.approx(1)
    assert sum(found.staleness.values()) == pytest.approx(1)
    mean_tokens = found.tokens_per_second * found.step_seconds / 16
    longest = small().responses.longest_tokens + small().responses.prompt_tokens
    assert small().responses.shortest_tokens < mean_tokens < longest
    assert found.price_per_step == pytest.approx(3 * 3.6 / found.steps_per_hour)


def test_a_trainer_that_cannot_keep_up_is_the_bound_and_so_are_engines(tmp_path: Path) -> None:
    slow_engines = small(engine={"step_seconds": 0.1})
    found = figures_of(tmp_path / "engines", "staleness.maxVersions=4", model=slow_engines)
    assert found.generation_bound < found.training_bound
    assert found.engines_idle < 0.2 < found.trainer_waits


@pytest.mark.parametrize("interrupt", ["Retract", "InPlace", "Drain"])
def test_every_way_to_interrupt_trains_each_ticket_once(tmp_path: Path, interrupt: str) -> None:
    tight = small(engine={"kv_tokens": 12_000})
    simulated(tmp_path / "run", f"rollout.interrupt={interrupt}", "staleness.maxVersions=2", model=tight)
    recorded = read_ledger(tmp_path / "run" / "ledger.jsonl")
    tickets = [ticket for step in recorded.steps for ticket in step.tickets]
    assert len(tickets) == len(set(tickets)) == 4 * len(recorded.steps)
    assert not audit(recorded).twice


def test_a_workflow_of_several_turns_is_simulated(tmp_path: Path) -> None:
    found = figures_of(tmp_path / "run", "workflow.type=MultiTurn", "workflow.maxTurns=2")
    assert found.steps_per_hour > 0


def test_a_full_cache_is_retracted_and_nothing_is_lost(tmp_path: Path) -> None:
    tight = small(engine={"kv_tokens": 6_000})
    run = simulated(tmp_path / "run", "staleness.maxVersions=4", model=tight, engines=1)
    assert run.ended.engines.retractions > 0
    assert len(read_ledger(tmp_path / "run" / "ledger.jsonl").steps) >= 6
