"""The folder of a local run: its files, its creation, its lock, and whether a run in it may be resumed."""

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_api.job import AsyncRLJob, to_manifest
from asyncrl_api.ledger import LedgerError, read_ledger
from asyncrl_api.names import NatsAddress
from asyncrl_api.parsing import load_documents, parse_job, render_yaml
from asyncrl_api.rules import Violation, violations
from asyncrl_api.run_config import RunConfig, live_values

DEFAULT_NAMESPACE = "default"
LOCK = ".lock"


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run."""

    path: Path

    @property
    def manifest(self) -> Path:
        """The manifest as it was run: the user's, with `--set` applied."""
        return self.path / "job.yaml"

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def live(self) -> Path:
        """The file with the fields marked L; users may edit it while the job runs."""
        return self.path / "live.json"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def nats(self) -> Path:
        return self.path / "nats"

    def log(self, process: str) -> Path:
        return self.path / "logs" / f"{process}.log"

    def last_attempt(self) -> int:
        """Return the highest attempt that the ledger has seen; 0 if none.

        Raises:
            ExitError: a line of the ledger is none; the message names it.
        """
        try:
            return read_ledger(self.ledger).attempt
        except LedgerError as error:
            raise ExitError(ExitCode.UNUSABLE, str(error)) from error


@contextmanager
def lock(folder: RunFolder) -> Iterator[None]:
    """Hold the folder for this process; the kernel frees it when the process dies, however it dies.

    Raises:
        ExitError: another run holds it.
    """
    try:
        held = FileLock(folder.path / LOCK).acquire(timeout=0)
    except Timeout as error:
        raise ExitError(
            ExitCode.USAGE,
            f"{folder.path} is used by a run that is still going; end that one, or choose another --out",
        ) from error
    with held:
        yield


def check_is_new(folder: RunFolder) -> None:
    """Refuse to mix two runs. A folder with only a lock is fine: a run left it that was refused at its start.

    Raises:
        ExitError: the folder holds anything else.
    """
    if folder.path.exists() and any(entry.name != LOCK for entry in folder.path.iterdir()):
        raise ExitError(
            ExitCode.USAGE,
            f"{folder.path} exists already; add --resume to go on with its run, or choose another --out",
        )


def check_may_resume(folder: RunFolder, job: AsyncRLJob) -> None:
    """Check that the run in the folder can go on with this manifest.

    Raises:
        ExitError: there is no run, or a field has changed that must not change.
    """
    if not folder.manifest.exists():
        raise ExitError(ExitCode.USAGE, f"{folder.path} holds no run; leave --resume out to begin one")
    before = parse_job(load_documents(folder.manifest)[0])
    changed = [
        v for v in violations(to_manifest(job), to_manifest(before)) if v not in violations(to_manifest(job))
    ]
    if (was := _full_name(before)) != (now := _full_name(job)):
        changed.insert(0, Violation("metadata", f"a run keeps its name, {was}, and this one is {now}"))
    if changed:
        listed = "\n".join(f"  {violation.path}: {violation.message}" for violation in changed)
        raise ExitError(
            ExitCode.REFUSED,
            f"the run in {folder.path} belongs to another manifest:\n{listed}\n"
            "restore these values, or begin a new run with another --out",
        )


def write(folder: RunFolder, job: AsyncRLJob, *, nats_url: str, cache: Path, import_path: Path) -> RunConfig:
    """Write the files that the processes read. A run keeps its uid for its whole life."""
    (folder.path / "logs").mkdir(parents=True, exist_ok=True)
    uid = str(uuid.uuid4())
    if folder.config.exists():
        uid = RunConfig.load(folder.config).uid
    _replace(folder.manifest, render_yaml(to_manifest(job)))
    _replace(folder.live, json.dumps(live_values(job.spec), indent=1) + "\n")
    config = RunConfig(
        namespace=job.metadata.namespace or DEFAULT_NAMESPACE,
        name=job.metadata.name,
        uid=uid,
        spec=job.spec,
        nats=NatsAddress(url=nats_url),
        job_folder=folder.path.absolute(),
        live_file=folder.live.absolute(),
        report_file=folder.report.absolute(),
        model_cache=cache.absolute(),
        import_paths=(import_path.absolute(),),
    )
    config.save(folder.config)
    return config


def _full_name(job: AsyncRLJob) -> str:
    return f"{job.metadata.namespace or DEFAULT_NAMESPACE}/{job.metadata.name}"


def _replace(path: Path, text: str) -> None:
    """Replace a file atomically, so that a run that is killed meanwhile can still be resumed."""
    scratch = path.with_name(f"{path.name}.tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
