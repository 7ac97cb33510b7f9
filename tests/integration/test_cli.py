"""The command line: what is told to a user before anything runs. Bad input never shows a traceback."""

import json
from pathlib import Path
from typing import Any

import pytest

from asyncrl_api.exits import ExitCode
from asyncrl_api.job import to_manifest
from support.jobs.cli_runs import asyncrl, write_job
from support.jobs.job_harness import build_job

SMALLEST = """\
apiVersion: asyncrl.dev/v1alpha1
kind: AsyncRLJob
metadata: {name: gsm8k}
spec:
  model: {source: "hf://Qwen/Qwen3-1.7B"}
  dataset: {source: "hf://openai/gsm8k"}
  training: {batchSize: 64, maxSteps: 200}
  gpuBudget: {total: 8}
  checkpoint: {location: {claimName: checkpoints}}
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    return write(tmp_path, "job.yaml", SMALLEST)


# asyncrl validate


def test_a_good_file_is_valid(smallest: Path) -> None:
    ended = asyncrl("validate", smallest)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{smallest}: valid\n", "")


def test_every_error_of_every_file_is_listed_at_once(tmp_path: Path, smallest: Path) -> None:
    fields = write(
        tmp_path,
        "fields.yaml",
        SMALLEST.replace("64", '"64"').replace("total: 8", "totl: 8").replace("gsm8k}", "gsm8k, a: b}"),
    )
    rules = write(tmp_path, "rules.yaml", SMALLEST.replace("maxSteps: 200", "maxSteps: 200, minibatches: 65"))
    syntax = write(tmp_path, "syntax.yaml", SMALLEST.replace("{total: 8}", "{total: 8"))
    missing = tmp_path / "missing.yaml"
    ended = asyncrl("validate", fields, smallest, rules, syntax, missing, tmp_path)
    assert ended.returncode == 1
    assert ended.stdout.splitlines() == [
        f"{fields}: metadata.a: is not a known field",
        f'{fields}: spec.training.batchSize: "64": must be an integer, without quotes',
        f"{fields}: spec.gpuBudget.total: is required",
        f"{fields}: spec.gpuBudget.totl: is not a known field; did you mean total?",
        f"{smallest}: valid",
        f"{rules}: spec.training.minibatches: training.minibatches is 65, but must be at most "
        "training.batchSize, 64, because every optimizer update needs a prompt group: lower it",
        f"{syntax}:9: expected ',' or '}}', but got ':'",
        f"{missing}: No such file or directory",
        f"{tmp_path}: Is a directory",
    ]


def test_of_several_documents_the_wrong_one_is_named(tmp_path: Path) -> None:
    wrong = SMALLEST.replace("64", "0")
    file = write(tmp_path, "jobs.yaml", f"{SMALLEST}---\n{wrong}---\n{SMALLEST}")
    ended = asyncrl("validate", file)
    message = "spec.training.batchSize: 0: must be greater than or equal to 1"
    assert (ended.returncode, ended.stdout) == (1, f"{file}, document 2: {message}\n")
    file = write(tmp_path, "jobs.yaml", f"{SMALLEST}---\n{SMALLEST}")
    assert asyncrl("validate", file).stdout == f"{file}: valid\n"


def test_a_clip_that_never_binds_is_warned_of(tmp_path: Path) -> None:
    """It is valid: an API server may have stored it as the default of an earlier version."""
    clip = "  algorithm: {policyLoss: GSPO, clip: {low: 0.2, high: 0.2}}\n"
    file = write(tmp_path, "doubtful.yaml", SMALLEST + clip)
    ended = asyncrl("validate", file)
    valid, warning = ended.stdout.splitlines()
    assert (ended.returncode, valid) == (0, f"{file}: valid")
    assert warning.startswith(f"{file}: warning: spec.algorithm.clip is 0.2 below and 0.2 above 1")


# asyncrl plan


def test_a_plan_names_groups_processes_gpus_and_commands_and_starts_nothing(tmp_path: Path) -> None:
    manifest = write_job(tmp_path, build_job(gpuBudget={"total": 3}))
    before = sorted(tmp_path.rglob("*"))
    ended = asyncrl("plan", manifest.name, cwd=tmp_path)
    assert ended.returncode == 0 and ended.stderr == ""
    assert (
        ended.stdout
        == """\
GPUs: trainer 1, rollout 2 (2 x 1), idle 0 (InitialRatio)
messaging: 1 replica(s), 0 GPU(s)
  nats: 0 GPU(s)
    nats-server -c runs/harness/nats/nats.conf -m 8222
rollout: 2 replica(s), 2 GPU(s)
  rollout-0-engine: 1 GPU(s)
    asyncrl-runtime engine --config runs/harness/config.json --host 127.0.0.1 --port 30000
  rollout-0-worker: 0 GPU(s)
    asyncrl-runtime worker --config runs/harness/config.json --name rollout-0 \
--engine-url http://127.0.0.1:30000 --host 127.0.0.1 --health-port 30001
  rollout-1-engine: 1 GPU(s)
    asyncrl-runtime engine --config runs/harness/config.json --host 127.0.0.1 --port 30002
  rollout-1-worker: 0 GPU(s)
    asyncrl-runtime worker --config runs/harness/config.json --name rollout-1 \
--engine-url http://127.0.0.1:30002 --host 127.0.0.1 --health-port 30003
trainer: 1 replica(s), 1 GPU(s)
  trainer: 1 GPU(s)
    asyncrl-runtime trainer --config runs/harness/config.json --attempt 1 --ranks 1 --host 127.0.0.1
trainer memory: the copy from which engines get weights takes as many bytes as what is trained, divided \
among its ranks (model.parameterCount tells how many)
"""
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_what_this_machine_cannot_run_can_be_planned(smallest: Path) -> None:
    ended = asyncrl("plan", smallest, "--set", "spec.gpuBudget.total=16")
    assert ended.returncode == 0
    assert ended.stdout.startswith("GPUs: trainer 4, rollout 12 (12 x 1), idle 0 (InitialRatio)\n")
    assert ended.stdout.count("asyncrl-runtime sglang --config runs/gsm8k/config.json") == 12


def test_a_plan_states_the_memory_of_the_copy_that_is_published(smallest: Path) -> None:
    sizes = ["spec.model.parameterCount=1000000000", "spec.weightSync.bucketMegabytes=100"]
    ended = asyncrl(
        "plan", smallest, "--set", "spec.gpuBudget.total=16", *[w for s in sizes for w in ("--set", s)]
    )
    assert (
        "trainer memory: the copy from which engines get weights takes 477 MiB on each rank, and up to "
        in (ended.stdout)
    ), "2 GB over 4 ranks"
    assert "300 MiB more on rank 0 for buckets" in ended.stdout


def test_a_budget_that_is_too_small_for_the_model_is_named(smallest: Path) -> None:
    sizes = ["spec.model.parameterCount=70000000000", "spec.gpuBudget.gpuMemory=80Gi"]
    ended = asyncrl("plan", smallest, "--set", sizes[0], "--set", sizes[1])
    assert ended.returncode == ExitCode.REFUSED and ended.stdout == ""
    assert ended.stderr.startswith(
        "asyncrl: spec.gpuBudget.total: 8: cannot hold a trainer and 1 engine(s) of 4: "
    )
    assert ended.stderr.endswith("are needed (BudgetTooSmall)\n")


# --set


def test_several_overrides_are_applied_in_turn(smallest: Path) -> None:
    settings = [
        "spec.gpuBudget={total: 2, allocation: None}",
        "spec.gpuBudget.total=4",
        "metadata.name=other",
    ]
    ended = asyncrl("plan", smallest, *(word for setting in settings for word in ("--set", setting)))
    assert ended.stdout.startswith("GPUs: trainer 1, rollout 3 (3 x 1), idle 0")
    assert "runs/other/config.json" in ended.stdout


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("spec.training.maxSteps", '--set: "spec.training.maxSteps": must have the form path.to.field=value'),
        ("spec.training.maxSteps=[", "--set spec.training.maxSteps:1: expected the node content"),
        (
            "spec.training.maxSteps.x=1",
            "spec.training.maxSteps.x: cannot be set: spec.training.maxSteps is a",
        ),
        ("spec.training.maxSteps=many", 'spec.training.maxSteps: "many": must be an integer'),
        ("spec.maxSteps=5", "spec.maxSteps: is not a known field; did you mean spec.training.maxSteps?"),
        (
            "spec.training.minibatches=65",
            "spec.training.minibatches: training.minibatches is 65, but must be",
        ),
    ],
)
def test_an_override_that_cannot_be_applied_says_why(smallest: Path, setting: str, message: str) -> None:
    ended = asyncrl("plan", smallest, "--set", setting)
    assert (ended.returncode, ended.stdout) == (ExitCode.REFUSED, "")
    assert ended.stderr.startswith(f"asyncrl: {message}") and ended.stderr.count("\n") == 1


# What asyncrl run refuses before it makes a folder


NOT_HERE: list[tuple[dict[str, Any], str]] = [
    (
        {"rollout": {"engine": {"type": "SGLang"}}},
        'spec.rollout.engine.type: "SGLang": ASYNCRL_SGLANG_PYTHON names no interpreter with SGLang: '
        "--set spec.rollout.engine.type=CPU",
    ),
    (
        {"gpuBudget": {"allocation": "ExtendedResource"}},
        'spec.gpuBudget.allocation: "ExtendedResource": this machine\'s processes are not GPUs: '
        "--set spec.gpuBudget.allocation=None",
    ),
    (
        {"suspend": True},
        "spec.suspend: true: a suspended job has no processes: set it to false",
    ),
]


@pytest.mark.parametrize(("change", "message"), NOT_HERE)
def test_what_cannot_run_on_this_machine_is_refused_with_the_remedy(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    manifest = write_job(tmp_path, build_job(**change))
    ended = asyncrl("run", manifest, "--out", tmp_path / "run")
    assert (ended.returncode, ended.stdout, ended.stderr) == (ExitCode.REFUSED, "", f"asyncrl: {message}\n")
    assert not (tmp_path / "run").exists()


def test_all_that_cannot_run_is_refused_at_once(tmp_path: Path) -> None:
    document = to_manifest(build_job())
    for change, _ in NOT_HERE:
        for block, values in change.items():
            document["spec"][block] = values if values is True else {**document["spec"][block], **values}
    manifest = write(tmp_path, "job.yaml", json.dumps(document))
    ended = asyncrl("run", manifest, "--out", tmp_path / "run")
    assert ended.stderr.removeprefix("asyncrl: ").splitlines() == [message for _, message in NOT_HERE]


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("", ExitCode.REFUSED, "{file}: holds no document"),
        ("- a\n- b\n", ExitCode.REFUSED, "manifest: is a list, but must be a map with apiVersion"),
        ("a: [\n", ExitCode.REFUSED, "{file}:2: expected the node content"),
        ("a: \0", ExitCode.REFUSED, "{file}: not YAML: "),
        (f"a: {'[' * 5000}", ExitCode.REFUSED, "{file}: is nested too deeply"),
        (
            SMALLEST.replace("model: {", "model: &a {b: *a, "),
            ExitCode.REFUSED,
            "spec: is nested too deeply, or an alias stands within its own anchor",
        ),
        (f"{SMALLEST}---\n{SMALLEST}", ExitCode.USAGE, "{file}: holds 2 documents; one job is run at a time"),
        (None, ExitCode.USAGE, "{file}: No such file or directory"),
    ],
    ids=["empty", "list", "syntax", "binary", "deep", "cycle", "two", "missing"],
)
def test_a_file_that_is_no_job_is_refused(
    tmp_path: Path, text: str | None, code: ExitCode, message: str
) -> None:
    file = tmp_path / "job.yaml"
    if text is not None:
        file.write_text(text)
    ended = asyncrl("run", file, "--out", tmp_path / "run")
    assert (ended.returncode, ended.stdout) == (code, "")
    assert ended.stderr.startswith(f"asyncrl: {message.format(file=file)}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("below", ["", "/run"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, below: str) -> None:
    manifest = write_job(tmp_path, build_job())
    out = write(tmp_path, "file", "")
    ended = asyncrl("run", manifest, "--out", f"{out}{below}")
    assert ended.returncode == ExitCode.TRY_AGAIN
    assert ended.stderr == f"asyncrl: {out}{below}: Not a directory\n"


# Folders that hold no run


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("eval", "asyncrl: {folder} holds no run; name the folder of a run\n"),
        ("audit", "asyncrl-runtime: {folder}/ledger.jsonl: no ledger there; name the folder of a run\n"),
    ],
)
def test_a_folder_without_a_run_is_named(tmp_path: Path, command: str, message: str) -> None:
    ended = asyncrl(command, tmp_path)
    assert (ended.returncode, ended.stdout) == (ExitCode.USAGE, "")
    assert ended.stderr == message.format(folder=tmp_path)


def test_there_must_be_a_run_to_go_on_with(tmp_path: Path) -> None:
    manifest = write_job(tmp_path, build_job())
    ended = asyncrl("run", manifest, "--out", tmp_path / "run", "--resume")
    assert ended.returncode == ExitCode.USAGE
    assert ended.stderr == f"asyncrl: {tmp_path / 'run'} holds no run; leave --resume out to begin one\n"
    assert not (tmp_path / "run").exists()


def test_a_ledger_that_is_none_is_not_guessed_at(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text('{"attempt":1,"uid":"u"}\nhello\n')
    ended = asyncrl("audit", tmp_path)
    assert ended.returncode == ExitCode.UNUSABLE
    assert ended.stderr.startswith(f"asyncrl-runtime: {tmp_path / 'ledger.jsonl'}, line 2: ")
