"""Every manifest under examples/ is valid, names code and data that are there, and trains."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncrl_api.job import AsyncRLJob
from asyncrl_api.parsing import load_documents, parse_job
from asyncrl_api.protocols import Score
from asyncrl_operator.layout import plan
from asyncrl_operator.local.local_run import LocalPlaces, find_program, local_refusals
from asyncrl_runtime.rollout.rewards.frames import ScoreRequest
from asyncrl_runtime.rollout.rewards.scorer import make_scorer
from asyncrl_runtime.rollout.workflows import make_workflow
from asyncrl_runtime.trainer.dataset import load_rows

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("**/*.yaml"))


@pytest.fixture(params=EXAMPLES, ids=lambda path: str(path.relative_to(ROOT / "examples")))
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


@pytest.fixture
def folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Provide the folder of user code, on the import path as in the processes of a run."""
    monkeypatch.syspath_prepend(str(path.parent))
    yield path.parent
    for module in path.parent.glob("*.py"):
        sys.modules.pop(module.stem, None)


@pytest.fixture
def example(path: Path, folder: Path) -> AsyncRLJob:
    [document] = load_documents(path)
    return parse_job(document)


def test_it_can_be_run_on_this_machine(example: AsyncRLJob) -> None:
    assert local_refusals(example.spec, has_sglang=False) == []
    roles = {process.role for process in plan(example, LocalPlaces("config.json", "nats.conf", {})).processes}
    assert roles == {"messaging", "rollout", "trainer"}


def test_its_rows_are_there_and_nothing_held_out_is_trained(example: AsyncRLJob) -> None:
    spec = example.spec
    rows = load_rows(spec)
    assert spec.evaluation is not None
    assert len(rows.held_out) == spec.evaluation.samples
    assert len(rows.training) >= spec.training.batch_size
    field = spec.dataset.prompt_field
    assert not {row[field] for row in rows.training} & {row[field] for row in rows.held_out}


async def test_its_reward_tells_right_from_wrong(example: AsyncRLJob, folder: Path) -> None:
    spec = example.spec
    row = load_rows(spec).held_out[0]
    prompt = row[spec.dataset.prompt_field]
    right = row["answer"] if "answer" in row else f"def f(x): return {prompt.removeprefix('f(x) = ')}"
    scorer = make_scorer(
        spec.reward, answer_field=spec.dataset.answer_field, import_paths=(folder,), num_processes=1
    )
    async with scorer:
        good, bad = await scorer.score([ScoreRequest(prompt, response, row) for response in (right, "?")])
    assert isinstance(good, Score) and good.reward == 1
    assert isinstance(bad, Score) and bad.reward < 0.5


def test_its_workflow_can_be_made(example: AsyncRLJob) -> None:
    assert callable(make_workflow(example.spec.workflow).run)


def test_there_is_one_of_each_kind() -> None:
    names = {str(path.relative_to(ROOT / "examples")) for path in EXAMPLES}
    assert {"quickstart.yaml", "reasoning_gym.yaml", "smollm2.yaml", "custom_reward/job.yaml"} <= names
    assert {"multi_turn/job.yaml", "code/job.yaml"} <= names


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of the factories' models, shared since two of them serve all examples."""
    return tmp_path_factory.mktemp("models")


@pytest.mark.slow
def test_it_trains(path: Path, cache: Path, tmp_path: Path) -> None:
    if path.stem == "smollm2":
        pytest.skip("fetches 93 MB and takes minutes a step; its run is recorded in tests/bench/RESULTS.md")
    out = tmp_path / "run"
    settings = ["--set", "spec.training.maxSteps=3", "--set", "spec.evaluation.samples=7"]
    command = [find_program("asyncrl"), "run", str(path), "--out", str(out), *settings]
    environment = {**os.environ, "ASYNCRL_CACHE": str(cache)}
    run = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "held-out accuracy: " in run.stdout
    assert "held-out prompts that occur in training: 0, in warm-up: 0" in run.stdout
    audit = subprocess.run(
        [find_program("asyncrl"), "audit", str(out)], capture_output=True, text=True, check=False
    )
    assert audit.returncode == 0 and "missing 0  twice 0" in audit.stdout
