"""Held-out accuracy of the quickstart: before, after five minutes of training, at the end; per seed.

Each run is `asyncrl run examples/quickstart.yaml --set spec.training.seed=N`, which draws another model,
another order of prompts, and other samples; the 500 held-out prompts stay. The clock of "five minutes" starts
with the first step; the accuracy then is the latest that had been measured (every 50 steps here), or that at
the end where a run ends before.

    python tests/bench/bench_quickstart.py [--seeds 1 2 3]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

MANIFEST = Path(__file__).parents[2] / "examples" / "quickstart.yaml"
FIVE_MINUTES = 300.0
EVERY_STEPS = 50


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def measure(seed: int, folder: Path) -> str:
    """Train with one seed and return its line of the table."""
    settings = [f"spec.training.seed={seed}", f"spec.evaluation.everySteps={EVERY_STEPS}"]
    words = [word for setting in settings for word in ("--set", setting)]
    command = [
        str(Path(sys.executable).with_name("asyncrl")),
        "run",
        str(MANIFEST),
        "--out",
        str(folder),
        *words,
    ]
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=sys.stderr)
    total = time.monotonic() - began
    accuracy = {line["step"]: line["accuracy"] for line in read_lines(folder / "evaluations.jsonl")}
    steps = read_lines(folder / "metrics.jsonl")
    at = [datetime.fromisoformat(line["time"]).timestamp() for line in steps]
    first = at[0] - steps[0]["step_seconds"]
    within = [line["step"] for line, when in zip(steps, at, strict=True) if when - first <= FIVE_MINUTES]
    reached = max(step for step in accuracy if step <= within[-1])
    last = max(accuracy)
    staleness = sum(line["staleness_mean"] for line in steps) / len(steps)
    return (
        f"| {seed} | {accuracy[0]:.1%} | {accuracy[reached]:.1%} (step {reached}) "
        f"| {accuracy[last]:.1%} (step {last}) | {at[-1] - first:.0f} s | {total:.0f} s | {staleness:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    print("| seed | before | after 300 s | at the end | training | whole run | mean staleness |")
    print("|---|---|---|---|---|---|---|")
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            print(measure(seed, Path(folder) / "run"), flush=True)


if __name__ == "__main__":
    main()
