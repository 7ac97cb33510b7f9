"""The folder of a local run: who may use it, and what a resumed run keeps."""

import json
from pathlib import Path
from typing import Any

import pytest

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_api.job import AsyncRLJob
from asyncrl_api.parsing import load_documents, parse_job
from asyncrl_api.run_config import RunConfig
from asyncrl_operator.local import run_folder
from asyncrl_operator.local.run_folder import RunFolder
from support.messages.samples import make_job


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    path = tmp_path / "run"
    path.mkdir()
    return RunFolder(path)


def write(folder: RunFolder, job: AsyncRLJob, port: int = 4222) -> RunConfig:
    places = {"cache": folder.path / "cache", "import_path": folder.path.parent}
    return run_folder.write(folder, job, nats_url=f"nats://127.0.0.1:{port}", **places)


def named(job: AsyncRLJob, **metadata: str) -> AsyncRLJob:
    return job.model_copy(update={"metadata": job.metadata.model_copy(update=metadata)})


# Who may use it


def test_a_second_run_in_the_folder_is_refused(folder: RunFolder) -> None:
    with run_folder.lock(folder), pytest.raises(ExitError) as refused, run_folder.lock(folder):
        pass
    assert refused.value.code == ExitCode.USAGE
    assert str(refused.value) == (
        f"{folder.path} is used by a run that is still going; end that one, or choose another --out"
    )


def test_a_folder_is_free_after_its_run(folder: RunFolder) -> None:
    with pytest.raises(RuntimeError), run_folder.lock(folder):
        raise RuntimeError
    with run_folder.lock(folder):
        pass


def test_a_new_run_takes_a_folder_that_is_not_there_or_empty(tmp_path: Path, folder: RunFolder) -> None:
    run_folder.check_is_new(RunFolder(tmp_path / "not-there"))
    run_folder.check_is_new(folder)


def test_a_new_run_does_not_mix_with_another(folder: RunFolder) -> None:
    write(folder, make_job())
    with pytest.raises(
        ExitError, match="exists already; add --resume to go on with its run, or choose"
    ) as refused:
        run_folder.check_is_new(folder)
    assert refused.value.code == ExitCode.USAGE


def test_a_run_that_was_refused_before_it_began_is_not_in_the_way(folder: RunFolder) -> None:
    """It has left only its lock, which must stop neither a new run nor --resume."""
    with run_folder.lock(folder):
        pass
    assert [path.name for path in folder.path.iterdir()] == [".lock"]
    run_folder.check_is_new(folder)


# Going on with it


@pytest.mark.parametrize(
    "overrides",
    [[], ["training.maxSteps=300"], ["training.learningRate=1e-5"], ["staleness.maxVersions=0"]],
)
def test_a_run_goes_on_under_a_manifest_that_differs_in_what_may_change(
    folder: RunFolder, overrides: list[str]
) -> None:
    write(folder, make_job())
    run_folder.check_may_resume(folder, make_job(*overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.source=hf://other/model", "  spec.model: model is immutable"),
        ("dataset.seed=18", "  spec.dataset: dataset is immutable"),
        (
            "training.maxSteps=100",
            "  spec.training.maxSteps: training.maxSteps is 100 and was 200, but may only",
        ),
    ],
)
def test_a_run_does_not_go_on_under_another_manifest(folder: RunFolder, override: str, message: str) -> None:
    write(folder, make_job())
    with pytest.raises(ExitError) as refused:
        run_folder.check_may_resume(folder, make_job(override))
    assert refused.value.code == ExitCode.REFUSED
    first, changed, remedy = str(refused.value).splitlines()
    assert first == f"the run in {folder.path} belongs to another manifest:"
    assert changed.startswith(message)
    assert remedy == "restore these values, or begin a new run with another --out"


def test_a_run_does_not_go_on_under_another_name(folder: RunFolder) -> None:
    """Streams are named after the job, so the run would look for its tickets where there are none."""
    write(folder, make_job())
    run_folder.check_may_resume(folder, named(make_job(), namespace="default"))
    for other, full_name in (
        (named(make_job(), name="math"), "default/math"),
        (named(make_job(), namespace="team"), "team/gsm8k"),
    ):
        with pytest.raises(
            ExitError, match=f"a run keeps its name, default/gsm8k, and this one is {full_name}"
        ):
            run_folder.check_may_resume(folder, other)


def test_there_must_be_a_run_to_go_on_with(tmp_path: Path, folder: RunFolder) -> None:
    for empty in (folder, RunFolder(tmp_path / "not-there")):
        with pytest.raises(ExitError, match="holds no run; leave --resume out to begin one") as refused:
            run_folder.check_may_resume(empty, make_job())
        assert refused.value.code == ExitCode.USAGE


def test_a_run_keeps_its_uid_and_takes_the_rest_from_now(folder: RunFolder) -> None:
    """Checkpoints of another uid are another run's, and would be set aside."""
    first = write(folder, make_job(), port=1111)
    second = write(folder, make_job("training.maxSteps=300"), port=2222)
    assert second.uid == first.uid and len(first.uid) == 36
    assert second.nats.url == "nats://127.0.0.1:2222" and second.spec.training.max_steps == 300
    assert RunConfig.load(folder.config) == second
    assert write(RunFolder(folder.path / "other"), make_job()).uid != first.uid


def test_what_is_written_is_the_manifest_as_run_its_live_values_and_the_configuration(
    folder: RunFolder,
) -> None:
    job = make_job("training.maxSteps=300", "dataset.parameters={ratio: 1e-6, text: 'yes', ü: 1}")
    config = write(folder, job)
    assert parse_job(load_documents(folder.manifest)[0]) == job
    live = json.loads(folder.live.read_text())
    assert live["training"] == {"maxSteps": 300} and "model" not in live
    assert RunConfig.load(folder.config) == config and config.spec == job.spec
    assert config.job_folder == folder.path and config.names.job == "default_gsm8k"
    assert config.import_paths == (folder.path.parent,)
    assert sorted(path.name for path in folder.path.iterdir()) == [
        "config.json",
        "job.yaml",
        "live.json",
        "logs",
    ]


class Killed(BaseException):
    """Stands for a SIGKILL, which nobody can handle."""


@pytest.mark.parametrize("file", ["job.yaml", "live.json", "config.json"])
def test_a_run_that_was_killed_while_it_wrote_goes_on(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    before = write(folder, make_job())
    write_text = Path.write_text

    def killed_halfway(path: Path, text: str, **options: Any) -> int:
        is_it = path.name.startswith(file.partition(".")[0])
        write_text(path, text[: len(text) // 2] if is_it else text, **options)
        if is_it:
            raise Killed
        return len(text)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Path, "write_text", killed_halfway)
        write(folder, make_job("training.maxSteps=300"))
    run_folder.check_may_resume(folder, make_job("training.maxSteps=300"))
    assert json.loads(folder.live.read_text())["training"]["maxSteps"] in (200, 300)
    assert write(folder, make_job("training.maxSteps=300")).uid == before.uid


def test_paths_for_processes_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes run in the manifest's folder, the user anywhere."""
    monkeypatch.chdir(tmp_path)
    config = write(RunFolder(Path("runs/gsm8k")), make_job())
    paths = [
        config.job_folder,
        config.live_file,
        config.report_file,
        config.model_cache,
        *config.import_paths,
    ]
    assert all(path.is_absolute() for path in paths)


# The number of its attempts


@pytest.mark.parametrize(
    ("ledger", "attempt"),
    [
        (b"", 0),
        (b'{"attempt":1,"uid":"u"}\n', 1),
        (b'{"attempt":1,"uid":"u"}\n{"attempt":2,"uid":"u"}\n{"attempt":2,"began":0}\n', 2),
        (b'{"attempt":3,"uid":"u"}\n{"attempt":2,"version":4}\n', 3),  # a lower attempt's line is void
        (b'{"attempt":1,"uid":"u"}\n{"attempt":2,"ui', 1),
        (b'{"attempt":1', 0),
        ('{"attempt":1,"uid":"u"}\n{"attempt":2,"live":{"a":"ü'.encode()[:-1], 1),
        ('{"attempt":1,"live":{"a":"\u2028"}}\n'.encode(), 1),  # which Python takes for the end of a line
    ],
)
def test_the_last_attempt_is_the_highest_of_the_complete_lines(
    folder: RunFolder, ledger: bytes, attempt: int
) -> None:
    folder.ledger.write_bytes(ledger)
    assert folder.last_attempt() == attempt


def test_a_run_without_a_ledger_has_had_no_attempt(folder: RunFolder) -> None:
    assert folder.last_attempt() == 0
