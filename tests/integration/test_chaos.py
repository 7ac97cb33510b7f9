"""Everything is killed at random while a job runs: it reaches its last step, and its books close.

Longer and with other seeds: CHAOS_SECONDS=1800 CHAOS_SEEDS=7 pytest tests/integration/test_chaos.py -s
"""

import collections
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from asyncrl_api.job import to_manifest
from asyncrl_api.ledger import read_ledger
from asyncrl_api.report import Report
from asyncrl_operator.local.local_run import find_program
from asyncrl_operator.local.run_folder import RunFolder
from asyncrl_runtime.history.audit import audit, render
from support.jobs.job_harness import build_job
from support.paths import USER_CODE

SECONDS = float(os.environ.get("CHAOS_SECONDS", "90"))
SEEDS = [int(seed) for seed in os.environ.get("CHAOS_SEEDS", "1").split(",")]
MEAN_SECONDS_BETWEEN_KILLS = 2.5
TICK_SECONDS = 0.25
STEPS_AHEAD = 100
KINDS = {"engine": 6, "worker": 6, "rank": 2, "nats-server": 2, "nats-server and its files": 1}
"""What is killed, and how often compared with the others."""


def victims(runner: psutil.Process) -> dict[str, list[psutil.Process]]:
    """Return the runner's living processes by kind."""
    found: dict[str, list[psutil.Process]] = collections.defaultdict(list)
    for process in runner.children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        for kind in KINDS:
            if any(word == kind or word.endswith(f"/{kind}") for word in words[:4]):
                found[kind].append(process)
    return found


@pytest.mark.slow
@pytest.mark.timeout(SECONDS * 3 + 600)
@pytest.mark.parametrize("seed", SEEDS)
def test_job_survives_random_kills(tmp_path: Path, seed: int) -> None:
    job = build_job(
        sampling={"groupSize": 2, "maxNewTokens": 16},
        training={"batchSize": 4, "maxSteps": STEPS_AHEAD, "minibatches": 2, "learningRate": 1e-4},
        gpuBudget={"total": 3},
        checkpoint={"everySteps": 5},
        failurePolicy={
            "trainer": {
                "maxRestarts": 1000,
                "maxDisruptions": 1000,
                "backoffSeconds": 1,
                "maxBackoffSeconds": 4,
            }
        },
    )
    shutil.copy(USER_CODE / "harness_data.py", tmp_path)  # user code lies beside the manifest
    manifest = tmp_path / "job.yaml"
    manifest.write_text(json.dumps(to_manifest(job)))
    folder, log = RunFolder(tmp_path / "run"), tmp_path / "runner.log"
    command = [find_program("asyncrl"), "run", str(manifest), "--out", str(folder.path)]
    with log.open("w") as output:
        runner = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        kills = _kill_at_random(folder, runner, random.Random(seed))
        assert runner.wait(300) == 0, log.read_text()[-3000:]
    finally:
        runner.terminate()
        runner.wait(60)
    result = audit(read_ledger(folder.ledger))
    print(f"\nseed {seed}: {kills.total()} kills {dict(kills)}\n{render(result)}")
    assert kills.total() > SECONDS / MEAN_SECONDS_BETWEEN_KILLS / 2
    assert result.is_finished and result.missing == () and result.twice == ()
    assert result.num_steps == json.loads(folder.live.read_text())["training"]["maxSteps"]


def _kill_at_random(
    folder: RunFolder, runner: "subprocess.Popen[bytes]", rng: random.Random
) -> collections.Counter[str]:
    """Kill for SECONDS after the first step, and keep the job's end ahead of it meanwhile."""
    kills: collections.Counter[str] = collections.Counter()
    while (report := Report.load(folder.report)) is None or report.step == 0:
        assert runner.poll() is None, "the runner has ended before its first step"
        time.sleep(TICK_SECONDS)
    ends_at, kill_at = time.monotonic() + SECONDS, time.monotonic()
    while (now := time.monotonic()) < ends_at:
        assert runner.poll() is None, "the runner has ended"
        report = Report.load(folder.report)
        assert report is not None
        _keep_ahead(folder, report.step)
        if now >= kill_at:
            kill_at = now + rng.expovariate(1 / MEAN_SECONDS_BETWEEN_KILLS)
            kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
            if alive := victims(psutil.Process(runner.pid))[kind.split()[0]]:
                victim = rng.choice(alive)
                victim.send_signal(signal.SIGKILL)
                kills[kind] += 1
                if kind.endswith("files"):
                    victim.wait()
                    shutil.rmtree(folder.nats / "store", ignore_errors=True)
        time.sleep(TICK_SECONDS)
    return kills


def _keep_ahead(folder: RunFolder, step: int) -> None:
    """Raise maxSteps, as a user would: in the file of live fields."""
    live = json.loads(folder.live.read_text())
    if live["training"]["maxSteps"] < step + STEPS_AHEAD:
        live["training"]["maxSteps"] = step + STEPS_AHEAD
        scratch = folder.live.with_suffix(".new")
        scratch.write_text(json.dumps(live))
        scratch.replace(folder.live)
