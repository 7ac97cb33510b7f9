"""`make gpu-check`, where there is no GPU: that it says so, and all of it on the CPU with tiny shapes."""

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from asyncrl_runtime.emulation.device import load_device_model
from support.paths import ROOT

SCRIPT = "tests/bench/bench_gpu.py"
SPEC = importlib.util.spec_from_file_location("bench_gpu", ROOT / SCRIPT)
assert SPEC is not None and SPEC.loader is not None
bench_gpu = importlib.util.module_from_spec(SPEC)
sys.modules["bench_gpu"] = bench_gpu  # dataclasses look their module up
SPEC.loader.exec_module(bench_gpu)


def gpu_check(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path: Path) -> None:
    assert gpu_check("--out", str(tmp_path / "out")).startswith("skipped: no GPU")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_everything_that_it_measures_can_be_measured(tmp_path: Path) -> None:
    table = gpu_check("--rehearse", "--out", str(tmp_path))
    cells = json.loads((tmp_path / "results.json").read_text())
    assert not [cell for cell in cells if "not_run" in cell]
    steps = {
        (cell["model"], cell["what"], cell["batch"], cell["activations"]) for cell in cells if "batch" in cell
    }
    assert steps == set(
        itertools.product(
            ("135M", "1.5B"), ("asyncrl", "plain loop"), ("dense", "long-tailed"), ("recompute", "keep")
        )
    )
    assert all(cell["update_tokens_per_second"] > 0 for cell in cells if "batch" in cell)
    for size in ("135M", "1.5B"):
        apart = {cell["what"]: cell for cell in cells if cell["model"] == size and "batch" not in cell}
        assert apart["snapshot copy"]["seconds"] > 0
        assert apart["checkpoint"]["bytes"] > apart["snapshot copy"]["bytes"]
        assert apart["checkpoint"]["step_seconds_beside"] > 0
        model = load_device_model(str(tmp_path / f"device-model-{size}.yaml"))
        assert model.trainer.update_tokens_per_second > 0
        assert "as a rehearsal" in model.sources["trainer.updateTokensPerSecond"]
        assert model.sources["engine.stepSeconds"].startswith("not measured; of device model h200")
        assert model.responses == load_device_model("h200").responses
    assert (tmp_path / "results.txt").read_text().strip() in table


def test_no_more_is_begun_once_the_time_is_up_and_what_fails_for_memory_is_noted(tmp_path: Path) -> None:
    def too_large() -> dict[str, float]:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    for ends_at in (float("inf"), 0.0):
        check = bench_gpu.Check(torch.device("cpu"), tmp_path, ends_at)
        check.measure({"what": "a"}, too_large)
        check.measure({"what": "b"}, lambda: {"seconds": 1.0})
        found = json.loads((tmp_path / "results.json").read_text())
        if ends_at:
            assert found == [
                {"what": "a", "not_run": "out of memory: tried to allocate 2 GiB"},
                {"what": "b", "seconds": 1.0},
            ]
        else:
            assert [cell["not_run"] for cell in found] == ["the time was up"] * 2
