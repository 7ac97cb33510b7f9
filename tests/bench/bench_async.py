"""Whether asynchrony pays at the size of clusters: the real runtime in virtual time, on emulated devices.

Each cell of the tables in RESULTS.md is one simulation; batches are scaled with the GPUs, as AReaL's. A cell
that has a line in async.jsonl is not simulated again: delete the line, or the file, to see it anew.

    python tests/bench/bench_async.py [ROW ...]
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asyncrl_api.parsing import apply_overrides, parse_job
from asyncrl_api.simulation import SimulatedJob
from asyncrl_runtime.emulation.device import load_device_model
from asyncrl_runtime.simulation.command import simulate_job

RESULTS = Path(__file__).with_name("async.jsonl")
JOB = {
    "apiVersion": "asyncrl.dev/v1alpha1",
    "kind": "AsyncRLJob",
    "metadata": {"name": "areal"},
    "spec": {
        "model": {"source": "hf://org/name", "contextLength": 32_768},
        "dataset": {"source": "package:rows"},
        "reward": {"type": "Math"},
        "sampling": {"groupSize": 16, "maxNewTokens": 27_648},
        "training": {"batchSize": 4, "maxSteps": 250, "minibatches": 4, "tokensPerMicroBatch": 32_768},
        "gpuBudget": {"total": 8},
        "checkpoint": {"location": {"claimName": "none"}, "everySteps": 10_000, "everySeconds": 86_400},
    },
}
GROUPS_PER_GPU = {"areal-1.5b": 4.0, "areal-7b": 512 / 192, "areal-14b": 2.0, "areal-32b": 512 / 384}
"""AReaL's batch of 512 prompts over the GPUs of its table 1."""
GPUS = {"areal-1.5b": (6, 2), "areal-7b": (6, 2), "areal-14b": (12, 4), "areal-32b": (24, 8)}
"""Those of engines and trainer, in the paper's proportion: six engines each."""
LARGER = {"areal-1.5b": 24, "areal-7b": 24, "areal-14b": 24}
"""The GPUs of the engines in a larger cluster of the same proportion."""
BALANCED = {"areal-1.5b": (5, 3), "areal-7b": (4, 4), "areal-14b": (8, 8), "areal-32b": (12, 20)}
"""As many GPUs in all, but split so that engines and trainer can do about the same."""
GENERATION_BOUND = {"areal-1.5b": (3, 5), "areal-7b": (3, 5), "areal-14b": (6, 8), "areal-32b": (12, 36)}
"""Three engines each, and a trainer that waits for them."""
FULL_CACHE = {"areal-1.5b": 208, "areal-7b": 96, "areal-14b": 48, "areal-32b": 80}
"""As many samples as fill an engine's cache once they have grown."""
ETAS = (0, 1, 2, 4)
SEEDS = (1, 2, 3, 4, 5)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One simulation."""

    row: str
    profile: str
    eta: int
    rollout_gpus: int
    trainer_gpus: int
    batch_size: int
    interrupt: str = "Retract"
    concurrency: int = 512
    steps: int = 6
    seed: int = 1

    def job(self, gpus_per_engine: int) -> SimulatedJob:
        overrides = {
            "staleness.maxVersions": self.eta,
            "staleness.target": self.eta,  # the gate alone bounds what is open
            "training.batchSize": self.batch_size,
            "training.seed": self.seed,
            "rollout.interrupt": self.interrupt,
            "rollout.maxConcurrency": self.concurrency,
        }
        document = apply_overrides(JOB, [f"spec.{name}={value}" for name, value in overrides.items()])
        return SimulatedJob(
            name=self.row,
            spec=parse_job(document).spec,
            num_engines=self.rollout_gpus // gpus_per_engine,
            gpus_per_engine=gpus_per_engine,
            trainer_gpus=self.trainer_gpus,
        )


def cells() -> Iterator[Cell]:
    """Yield all cells, one seed of everything first."""
    for eta in ETAS:
        yield Cell("as sketched", "areal-1.5b", eta, 3, 1, 16)
    for seed in SEEDS:
        for profile in GPUS:
            yield from throughput_cells(profile, seed)
        for profile in GPUS:
            yield from interrupt_cells(profile, seed)
    for profile in ("areal-1.5b", "areal-7b"):
        yield from concurrency_cells(profile)


def throughput_cells(profile: str, seed: int) -> Iterator[Cell]:
    """Yield what is compared with the bound, and with synchronous systems."""
    rollout, trainer = GPUS[profile]
    both = rollout + trainer
    batch = batch_size(profile, both)
    for eta in reversed(ETAS):
        if seed == 1 or eta in (0, 4):
            yield Cell("bound", profile, eta, rollout, trainer, batch, seed=seed)
    yield Cell("all GPUs take turns", profile, 0, both, both, batch, "Drain", steps=4, seed=seed)
    yield Cell("balanced", profile, 4, *BALANCED[profile], batch, seed=seed)
    if seed == 1 and (rollout := LARGER.get(profile, 0)):
        trainer = rollout // 3
        yield Cell("larger", profile, 4, rollout, trainer, batch_size(profile, rollout + trainer))


def interrupt_cells(profile: str, seed: int) -> Iterator[Cell]:
    """Yield the three ways to treat samples in flight where engines are the bound, and one seed elsewhere."""
    rollout, trainer = GENERATION_BOUND[profile]
    batch = batch_size(profile, rollout + trainer)
    for interrupt in ("Retract", "InPlace", "Drain"):
        yield Cell("interrupt", profile, 4, rollout, trainer, batch, interrupt, FULL_CACHE[profile], 10, seed)
    for interrupt in ("InPlace", "Drain") if seed == 1 else ():
        rollout, trainer = GPUS[profile]
        batch = batch_size(profile, rollout + trainer)
        yield Cell("interrupt elsewhere", profile, 4, rollout, trainer, batch, interrupt)


def concurrency_cells(profile: str) -> Iterator[Cell]:
    """Yield adaptive concurrency (0), and fixed limits around a full cache, where engines are the bound."""
    rollout, trainer = GENERATION_BOUND[profile]
    batch, full = batch_size(profile, rollout + trainer), FULL_CACHE[profile]
    for limit in (0, full - 48, full + 48, full + 96):
        yield Cell("concurrency", profile, 4, rollout, trainer, batch, "Retract", limit, 10)


def batch_size(profile: str, gpus: int) -> int:
    return round(gpus * GROUPS_PER_GPU[profile])


def run(cell: Cell) -> dict[str, Any]:
    model = load_device_model(cell.profile)
    began = time.process_time()
    found = simulate_job(cell.job(model.engine.gpus), model, cell.steps)
    seconds = time.process_time() - began
    return {**dataclasses.asdict(cell), "cpu_seconds": round(seconds, 1), "figures": found.to_json()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("rows", nargs="*", help="rows to simulate; by default all")
    rows = parser.parse_args().rows
    text = RESULTS.read_text() if RESULTS.exists() else ""
    known = [json.loads(line) for line in text.splitlines()]
    for cell in cells():
        named = dataclasses.asdict(cell)
        done = next((line for line in known if {name: line[name] for name in named} == named), None)
        if done is None and rows and cell.row not in rows:
            continue
        if done is None:
            done = run(cell)
            with RESULTS.open("a") as file:
                file.write(json.dumps(done) + "\n")
        print(render(done), flush=True)


def render(line: dict[str, Any]) -> str:
    """Return a cell's figures as a row of a table in RESULTS.md."""
    found = line["figures"]
    numbers = [
        f"{line['profile']}",
        f"{line['rollout_gpus']}+{line['trainer_gpus']}",
        f"{line['batch_size']}",
        f"{line['eta']}",
        f"{line['interrupt']}",
        f"{found['tokens_per_second'] / 1e3:.2f}k",
        f"{found['share_of_bound']:.3f}",
        f"{found['trainer_waits']:.3f}",
        f"{found['trainer_publishes']:.3f}",
        f"{found['engines_idle']:.2f}",
        f"{found['staleness_mean']:.2f}",
        f"{found['live_tokens_per_second'] / 1e3:.2f}k",
        f"{found['masked_tokens']:.3f}",
        f"{line['cpu_seconds']:.0f}",
    ]
    return f"| {line['row']} | {' | '.join(numbers)} |"


if __name__ == "__main__":
    main()
