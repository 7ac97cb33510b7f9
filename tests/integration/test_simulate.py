"""`asyncrl simulate`, as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from asyncrl_runtime.emulation.device import MODELS
from support.manifests.smallest import SMALLEST

SHORT = ("sampling.maxNewTokens=2000", "sampling.groupSize=4", "training.batchSize=4")
FITTING = ("model.contextLength=4096", "training.tokensPerMicroBatch=8192", "gpuBudget.total=3")


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    file = tmp_path / "job.yaml"
    with file.open("w") as stream:
        YAML().dump(SMALLEST, stream)
    return file


def simulate(manifest: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = str(Path(sys.executable).with_name("asyncrl"))
    settings = [word for each in (*SHORT, *FITTING) for word in ("--set", f"spec.{each}")]
    return subprocess.run(
        [program, "simulate", str(manifest), "--steps", "2", *settings, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_one_job_is_told_in_words(manifest: Path) -> None:
    result = simulate(manifest, "--device-model", "areal-1.5b", "--price", "2.5")
    assert result.returncode == 0, result.stderr
    heads = [line.split("  ")[0] for line in result.stdout.splitlines()]
    assert heads == [
        *("GPUs", "steps per hour", "tokens/s", "bound", "trainer", "engines", "staleness", "price per step")
    ]


def test_a_sweep_is_a_table_and_json_has_a_line_for_each(manifest: Path) -> None:
    arguments = ("--device-model", "areal-1.5b", "--sweep", "maxVersions=0,2")
    result = simulate(manifest, *arguments)
    assert result.returncode == 0, result.stderr
    assert [line.split("  ")[0] for line in result.stdout.splitlines()[1:]] == [
        "maxVersions 0",
        "maxVersions 2",
    ]
    lines = [json.loads(line) for line in simulate(manifest, *arguments, "--json").stdout.splitlines()]
    assert [line["name"] for line in lines] == ["maxVersions 0", "maxVersions 2"]
    assert lines[1]["steps_per_hour"] > lines[0]["steps_per_hour"]
    assert f"{lines[0]['steps_per_hour']:.2f}" in result.stdout, "and they are the same again"


def test_what_cannot_be_simulated_is_refused_with_the_remedy(manifest: Path, tmp_path: Path) -> None:
    unknown = simulate(manifest, "--device-model", "abacus")
    assert unknown.returncode == 78
    assert "areal-1.5b" in unknown.stderr
    two_gpus = tmp_path / "two.yaml"
    two_gpus.write_text((MODELS / "areal-1.5b.yaml").read_text().replace("gpus: 1", "gpus: 2", 1))
    larger = simulate(manifest, "--device-model", str(two_gpus))
    assert larger.returncode == 78
    assert "spec.rollout.gpusPerReplica" in larger.stderr
    user_code = ("--set", "spec.workflow.type=Custom", "--set", "spec.workflow.class=a:B")
    custom = simulate(manifest, "--device-model", "areal-1.5b", *user_code)
    assert custom.returncode == 78
    assert "spec.workflow.type" in custom.stderr
