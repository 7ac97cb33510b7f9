"""`asyncrl simulate`, as a user types it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from asyncrl_runtime.emulation.device import MODELS
from support.doc_commands import blocks_of
from support.manifests.smallest import SMALLEST
from support.paths import ROOT

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


@pytest.mark.parametrize("name", ["h100", "h200"])
def test_public_gpus_can_be_simulated(manifest: Path, name: str) -> None:
    result = simulate(manifest, "--device-model", name, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["share_of_bound"] > 0


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


@pytest.mark.slow
def test_what_the_page_shows_can_be_typed(tmp_path: Path) -> None:
    """docs/simulate.md: the manifest as it stands there, and each command after it."""
    page = "docs/simulate.md"
    manifest = re.search(r"^```yaml\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
    assert manifest is not None
    (tmp_path / "areal.yaml").write_text(manifest[1])
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": programs}
    [block] = [block for block in blocks_of(page) if not block.mark.startswith("not run")]
    for command in block.commands:
        result = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert "6+2" in result.stdout or "trainer 2, 6 engine(s)" in result.stdout
