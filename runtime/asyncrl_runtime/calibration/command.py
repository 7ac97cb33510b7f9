"""The command `asyncrl-runtime calibrate`: writes a device model."""

import asyncio
import json
import platform
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_api.run_config import RunConfig
from asyncrl_runtime.calibration.findings import CalibrationError, Findings, render_model
from asyncrl_runtime.calibration.measured_engine import find_in_engine
from asyncrl_runtime.calibration.measured_run import RunFacts, StepLine, find_in_run
from asyncrl_runtime.calibration.probe_http import HttpProbedEngine, open_session
from asyncrl_runtime.emulation.device import DeviceModel, DeviceModelError, load_device_model


def calibrate(run: Path | None, engine: str | None, base: str | None, now: Callable[[], datetime]) -> str:
    """Return the YAML of a device model that was measured on this machine.

    Args:
        run: the folder of a run.
        engine: the URL of an engine that nobody uses.
        base: the device model from which what cannot be derived is taken.

    Raises:
        ExitError: something is missing or makes no sense; the message names it.
    """
    if run is None and engine is None:
        raise ExitError(ExitCode.USAGE, "name the folder of a run, or an engine with --engine URL, or both")
    try:
        kept = (base, load_device_model(base)) if base else None
        place = f"measured on {platform.node()}"
        at = f"at {now().isoformat(timespec='seconds')}"
        findings = Findings()
        if engine is not None:
            findings = asyncio.run(_probe(engine, f"{place} {at}, engine {engine}"))
        else:
            findings.lacks_all("engine", "no engine was probed; name one with --engine URL")
        if run is not None:
            facts = run_facts(run, f"{place} {at}, run {run}", kept)
            findings = findings.joined(find_in_run(read_steps(run), facts))
        else:
            for block in ("responses", "trainer", "weights", "reward"):
                findings.lacks_all(block, "no run was named; name the folder of one")
        what = " and ".join(str(each) for each in (run, engine) if each is not None)
        return render_model(findings, f"{place} {at} by asyncrl calibrate, from {what}", kept)
    except (CalibrationError, DeviceModelError) as error:
        raise ExitError(ExitCode.REFUSED, str(error)) from error


async def _probe(url: str, where: str) -> Findings:
    async with open_session() as session:
        return await find_in_engine(HttpProbedEngine(url, session, time.perf_counter), where)


def run_facts(run: Path, where: str, base: tuple[str, DeviceModel] | None) -> RunFacts:
    """Return what the folder of a run says beside its metrics.

    Raises:
        ExitError: there is no run in it.
    """
    if not (run / "config.json").exists():
        raise ExitError(ExitCode.USAGE, f"{run} holds no run; name the folder of a run")
    spec = RunConfig.load(run / "config.json").spec
    num_bytes: int | None = sum(file.stat().st_size for file in (run / "export").rglob("*.safetensors"))
    bytes_source = f"{where}: the files of the export"
    if not num_bytes:  # it has not ended yet, or its trainer was emulated
        num_bytes = base[1].weights.num_bytes if base else None
        bytes_source = f"not measured; of device model {base[0]}" if base else ""
    return RunFacts(
        where=where,
        minibatches=min(spec.training.minibatches, spec.training.batch_size),
        speedup=spec.emulation.speedup if spec.trainer.backend == "Emulated" else 1.0,
        num_bytes=num_bytes,
        bytes_source=bytes_source,
    )


def read_steps(run: Path) -> list[StepLine]:
    """Return the lines of a run's metrics.jsonl; one that a crash left incomplete is passed over.

    Raises:
        ExitError: there is none.
    """
    path = run / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ExitError(ExitCode.USAGE, f"{path}: {error.strerror}; name the folder of a run") from error
    rows: list[StepLine] = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
