"""Everything goes wrong at random while a job runs: it reaches its last step, and its books close.

Longer and with other seeds: CHAOS_SECONDS=1800 CHAOS_SEEDS=7 pytest tests/integration/test_chaos.py -s
"""

import asyncio
import collections
import json
import math
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
from asyncrl_api.run_config import RunConfig
from asyncrl_operator.local.local_run import find_program
from asyncrl_operator.local.run_folder import RunFolder
from asyncrl_runtime.history.audit import audit, render
from support.jobs.job_harness import build_job
from support.jobs.json_service import serving
from support.jobs.surroundings import Disk, ScoringService, poison, publish
from support.paths import USER_CODE

SECONDS = float(os.environ.get("CHAOS_SECONDS", "90"))
SEEDS = [int(seed) for seed in os.environ.get("CHAOS_SEEDS", "1").split(",")]
MEAN_SECONDS_BETWEEN_FAULTS = 2.0
TICK_SECONDS = 0.25
STEPS_AHEAD = 100
KILLED = {"engine": 6, "worker": 6, "rank": 2, "nats-server": 2, "nats-server and its files": 1}
"""What is killed, and how often compared with the others."""
OTHERS = {"poison": 3, "slow disk": 1, "full disk": 1, "503": 1}
"""What else goes wrong, and how often: messages that no worker sends, the disk, the reward's service."""
SPELL_SECONDS = 2.0
"""How long a disk or a service stays as it is in the mean, once something is wrong with it."""
SLOW_FLUSH_SECONDS = 1.0


def victims(runner: psutil.Process) -> dict[str, list[psutil.Process]]:
    """Return the runner's living processes by kind."""
    found: dict[str, list[psutil.Process]] = collections.defaultdict(list)
    for process in runner.children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        for kind in KILLED:
            if any(word == kind or word.endswith(f"/{kind}") for word in words[:4]):
                found[kind].append(process)
    return found


class Faults:
    """Does one thing to a running job at a time, and counts what was done.

    All times are monotonic, in seconds.
    """

    def __init__(
        self,
        folder: RunFolder,
        runner: psutil.Process,
        disk: Disk,
        service: ScoringService,
        rng: random.Random,
    ) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self._folder = folder
        self._runner = runner
        self._disk = disk
        self._service = service
        self.rng = rng
        self._disk_until = self._service_until = 0.0

    def inject(self, now: float) -> None:
        """Choose a fault and cause it, if what it needs is there."""
        kinds = KILLED | OTHERS
        kind = self.rng.choices(list(kinds), list(kinds.values()))[0]
        self.counts[kind] += self._cause(kind, now)

    def recover(self, now: float) -> None:
        """End the spells that are over."""
        if now >= self._disk_until:
            self._disk.recover()
        self._service.is_unavailable = now < self._service_until

    def _cause(self, kind: str, now: float) -> bool:
        ends = now + self.rng.expovariate(1 / SPELL_SECONDS)
        match kind:
            case "poison":
                config = RunConfig.load(self._folder.config)
                return asyncio.run(publish(config, *poison(config, self.rng)))
            case "slow disk":
                self._disk.be_slow(SLOW_FLUSH_SECONDS)
                self._disk_until = ends
            case "full disk":
                self._disk.be_full()
                self._disk_until = ends
            case "503":
                self._service_until = ends
            case _:
                return self._kill(kind)
        return True

    def _kill(self, kind: str) -> bool:
        alive = victims(self._runner)[kind.split()[0]]
        if not alive:
            return False
        victim = self.rng.choice(alive)
        victim.send_signal(signal.SIGKILL)
        if kind.endswith("files"):
            victim.wait()
            shutil.rmtree(self._folder.nats / "store", ignore_errors=True)
        return True


@pytest.mark.slow
@pytest.mark.timeout(SECONDS * 3 + 600)
@pytest.mark.parametrize("seed", SEEDS)
def test_job_survives_random_faults(tmp_path: Path, seed: int) -> None:
    disk = Disk(tmp_path)
    with serving(ScoringService()) as service:
        folder, manifest = RunFolder(tmp_path / "run"), write_manifest(tmp_path, service.url)
        command = [find_program("asyncrl"), "run", str(manifest), "--out", str(folder.path)]
        log = tmp_path / "runner.log"
        with log.open("w") as output:
            environment = os.environ | disk.environment
            runner = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            faults = Faults(folder, psutil.Process(runner.pid), disk, service, random.Random(seed))
            cause_faults(folder, runner, faults)
            assert runner.wait(300) == 0, log.read_text()[-3000:]
        finally:
            runner.terminate()
            runner.wait(60)
    result = audit(read_ledger(folder.ledger))
    print(f"\nseed {seed}: {faults.counts.total()} faults {dict(faults.counts)}\n{render(result)}")
    assert faults.counts.total() > SECONDS / MEAN_SECONDS_BETWEEN_FAULTS / 2
    assert result.is_finished and result.missing == () and result.twice == ()
    assert result.num_steps == json.loads(folder.live.read_text())["training"]["maxSteps"]


def write_manifest(folder: Path, scoring_url: str) -> Path:
    job = build_job(
        sampling={"groupSize": 2, "maxNewTokens": 16},
        reward={"type": "Service", "url": scoring_url},
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
    shutil.copy(USER_CODE / "harness_data.py", folder)  # user code lies beside the manifest
    manifest = folder / "job.yaml"
    manifest.write_text(json.dumps(to_manifest(job)))
    return manifest


def cause_faults(folder: RunFolder, runner: "subprocess.Popen[bytes]", faults: Faults) -> None:
    """Cause faults for SECONDS after the first step, and keep the job's end ahead of it meanwhile."""
    while (report := Report.load(folder.report)) is None or report.step == 0:
        assert runner.poll() is None, "the runner has ended before its first step"
        time.sleep(TICK_SECONDS)
    ends_at, fault_at = time.monotonic() + SECONDS, time.monotonic()
    while (now := time.monotonic()) < ends_at:
        assert runner.poll() is None, "the runner has ended"
        report = Report.load(folder.report)
        assert report is not None
        keep_ahead(folder, report.step)
        faults.recover(now)
        if now >= fault_at:
            fault_at = now + faults.rng.expovariate(1 / MEAN_SECONDS_BETWEEN_FAULTS)
            faults.inject(now)
        time.sleep(TICK_SECONDS)
    faults.recover(math.inf)


def keep_ahead(folder: RunFolder, step: int) -> None:
    """Raise maxSteps, as a user would: in the file of live fields."""
    live = json.loads(folder.live.read_text())
    if live["training"]["maxSteps"] < step + STEPS_AHEAD:
        live["training"]["maxSteps"] = step + STEPS_AHEAD
        scratch = folder.live.with_suffix(".new")
        scratch.write_text(json.dumps(live))
        scratch.replace(folder.live)
