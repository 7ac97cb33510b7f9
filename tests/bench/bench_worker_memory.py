"""Memory and start of worker processes, with one worker in each and with many (`--count`).

The command runs as in a pod, with a tokenizer, a reward in processes and a real nats-server; engines are
absent. Peak memory (VmHWM) is that of the worker's process and of the largest reward process, once the
heartbeats of all workers have arrived.

    python tests/bench/bench_worker_memory.py [--counts 1 16 128] [--reward Math]
"""

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))
from asyncrl_api.names import NatsAddress
from asyncrl_api.run_config import RunConfig
from asyncrl_operator.local.local_run import environment, find_program
from support.engines.rollout_scene import open_scene
from support.jobs.job_harness import build_job
from support.jobs.nats_server import NatsServer
from support.paths import USER_CODE

START_SECONDS = 300.0


def peak_mebibytes(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


async def measure(config: RunConfig, path: Path, count: int, port: int) -> None:
    command = [find_program("asyncrl-runtime"), "worker", "--config", str(path), "--name", "w"]
    command += ["--count", str(count), "--engine-url", "http://127.0.0.1:9", "--health-port", str(port)]
    async with open_scene(config.nats, config.names) as scene:
        began = time.monotonic()
        process = subprocess.Popen(command, env=environment())  # noqa: ASYNC220
        try:
            while len(scene.fleet.living) < count:
                assert process.poll() is None and time.monotonic() - began < START_SECONDS
                await asyncio.sleep(0.1)
            seconds = time.monotonic() - began
            own = psutil.Process(process.pid)
            times = own.cpu_times()
            rewards = [peak_mebibytes(child.pid) for child in own.children(recursive=True)]
            print(
                f"| {count} | {peak_mebibytes(process.pid):.0f} | {max(rewards):.0f} | {len(rewards)} "
                f"| {times.user + times.system:.1f} | {seconds:.0f} |",
                flush=True,
            )
        finally:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--reward", default="Math")
    parser.add_argument("--port", type=int, default=42000, help="the first of as many free ports as workers")
    options = parser.parse_args()
    overrides: dict[str, Any] = {"reward": {"type": options.reward}}
    if options.reward == "Function":
        overrides["reward"]["function"] = "harness_data:reward"
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as scratch:
        folder = Path(scratch)
        nats = NatsServer(folder / "nats")
        nats.start()
        config = RunConfig(
            namespace="bench",
            name="memory",
            uid="u",
            spec=build_job().spec.model_copy(update={"reward": build_job(**overrides).spec.reward}),
            nats=NatsAddress(url=nats.url),
            job_folder=folder,
            live_file=folder / "live",
            report_file=folder / "report",
            model_cache=folder / "cache",
            import_paths=(USER_CODE,),
        )
        config.save(folder / "config.json")
        print("| workers | worker's process, MiB | a reward process, MiB | of them | CPU s | seconds |")
        print("|---|---|---|---|---|---|")
        try:
            for count in options.counts:
                asyncio.run(measure(config, folder / "config.json", count, options.port))
        finally:
            nats.kill()


if __name__ == "__main__":
    main()
