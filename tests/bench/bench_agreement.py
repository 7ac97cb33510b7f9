"""One emulated job in real processes and in virtual time: do both say the same number of steps per hour?

The real side is `asyncrl run` with NATS, two engines, two workers and a trainer as processes, sped up; the
virtual side simulates the same manifest with the same device model. A pair is one run of each with one seed;
the mean of three pairs is to agree within 3 %. It wants a machine that is otherwise idle: what its processes
wait for a core is time that the devices did not take.

    python tests/bench/bench_agreement.py [--pairs 3] [--steps 12] [--speedup 5]
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from asyncrl_api.job import AsyncRLJob
from asyncrl_api.simulation import SimulatedJob
from asyncrl_runtime.emulation.device import MODELS, DeviceModel, load_device_model
from asyncrl_runtime.simulation.command import simulate_job

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.jobs.cli_runs import CliRun, write_job
from support.jobs.job_harness import build_job

NUM_ENGINES = 2
WARMUP_STEPS = 3
"""The steps after which the queues have filled, as in a simulation with `maxVersions: 1`."""
CHANGES = {
    "stepSeconds: 0.010": "stepSeconds: 0.2",
    "medianTokens: 7000, sigma: 0.85, longestTokens: 27648, shortestTokens: 64": (
        "medianTokens: 120, sigma: 0.6, longestTokens: 380, shortestTokens: 8"
    ),
    "updateTokensPerSecond: 14725, forwardTokensPerSecond: 58900": (
        "updateTokensPerSecond: 150, forwardTokensPerSecond: 600"
    ),
    "numBytes: 3090000000": "numBytes: 1000000000",
    "seconds: 0.5}\nsources": "seconds: 0}\nsources",
}
"""What makes AReaL's 1.5B so slow that a step takes most of a minute, beside which processes take little."""


@dataclass(frozen=True)
class Pair:
    """The steps per hour of one seed, on both sides, in the devices' hours."""

    seed: int
    real: float
    virtual: float
    real_seconds: float
    """How long the real side took."""

    @property
    def ratio(self) -> float:
        return self.real / self.virtual


def device_model(folder: Path) -> Path:
    text = (MODELS / "areal-1.5b.yaml").read_text()
    for before, after in CHANGES.items():
        assert before in text, before
        text = text.replace(before, after, 1)
    file = folder / "device.yaml"
    file.write_text(text)
    return file


def make_job(model: Path, seed: int, steps: int, speedup: float) -> AsyncRLJob:
    """Return the job of both sides. An entropy term lets no sample be left out, whatever its reward."""
    return build_job(
        model={"contextLength": 1024},
        sampling={"groupSize": 4, "maxNewTokens": 380},
        training={
            "batchSize": 8,
            "minibatches": 4,
            "tokensPerMicroBatch": 2048,
            "maxSteps": WARMUP_STEPS + steps,
            "seed": seed,
        },
        algorithm={"entropyCoefficient": 0.001},
        staleness={"maxVersions": 1},
        trainer={"backend": "Emulated"},
        rollout={"engine": {"type": "Emulated"}, "maxConcurrency": 32},
        emulation={"deviceModel": str(model), "speedup": speedup},
        checkpoint={"everySteps": 10_000, "everySeconds": 86_400},
        gpuBudget={
            "total": 1 + NUM_ENGINES,
            "mode": "Manual",
            "split": {"trainer": 1, "rollout": NUM_ENGINES},
        },
    )


def run_real(job: AsyncRLJob, folder: Path, deadline_seconds: float) -> list[dict[str, Any]]:
    """Run the job to its end; return its lines of metrics."""
    with CliRun(write_job(folder, job), folder / "run") as run:
        code = run.process.wait(timeout=deadline_seconds)
        assert code == 0, run.output
        return run.steps


def run_virtual(job: AsyncRLJob, model: DeviceModel, lines: Sequence[dict[str, Any]], steps: int) -> float:
    """Simulate the same job; return its steps per hour. Prompts are as long as the real ones were."""
    tokens = round(statistics.fmean(line["prompt_tokens_mean"] for line in lines))
    responses = msgspec.structs.replace(model.responses, prompt_tokens=tokens)
    simulated = SimulatedJob(
        name="", spec=job.spec, num_engines=NUM_ENGINES, gpus_per_engine=1, trainer_gpus=1
    )
    return simulate_job(simulated, msgspec.structs.replace(model, responses=responses), steps).steps_per_hour


def run_pair(seed: int, steps: int, speedup: float) -> Pair:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        path = device_model(folder)
        job = make_job(path, seed, steps, speedup)
        began = time.monotonic()
        lines = run_real(job, folder, deadline_seconds=300 + (WARMUP_STEPS + steps) * 300 / speedup)
        took = time.monotonic() - began
        measured = lines[WARMUP_STEPS:]
        assert len(measured) == steps, len(lines)
        real = 3600 * steps / (sum(line["step_seconds"] for line in measured) * speedup)
        return Pair(seed, real, run_virtual(job, load_device_model(str(path)), lines, steps), took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="steps that are measured")
    parser.add_argument("--speedup", type=float, default=5.0, help="of the real side, 10 at most")
    arguments = parser.parse_args()
    if not 0 < arguments.speedup <= 10:
        parser.error(f"--speedup is {arguments.speedup}: it must be above 0 and at most 10")
    print("| seed | real, steps/h | virtual, steps/h | real over virtual | the real side took |")
    print("|---|---|---|---|---|")
    pairs = []
    for seed in range(1, arguments.pairs + 1):
        pairs.append(run_pair(seed, arguments.steps, arguments.speedup))
        pair = pairs[-1]
        print(
            f"| {seed} | {pair.real:.2f} | {pair.virtual:.2f} | {pair.ratio:.3f} | "
            f"{pair.real_seconds:.0f} s |",
            flush=True,
        )
    mean = statistics.fmean(pair.ratio for pair in pairs)
    print(json.dumps({"mean_ratio": round(mean, 4), "agrees_within_3_percent": abs(mean - 1) <= 0.03}))


if __name__ == "__main__":
    main()
