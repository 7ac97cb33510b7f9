"""A model's folder: checked before anything is loaded from it, and made once however many ask for it."""

import errno
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_api.job import ModelSpec
from asyncrl_api.rules import MODEL_SOURCES
from asyncrl_runtime.model.source import (
    SOURCES,
    WARMUP_PROMPTS,
    ensure_model,
    load_tokenizer,
    vocab_size,
    warmup_prompts,
)
from support.engines.tiny_models import EOS, build_tokenizer

FILES = {"config.json": '{"vocab_size": 512}', "tokenizer.json": "{}", "model.safetensors": "weights"}


def fill(folder: Path, without: str = "") -> Path:
    """What looks like a Hugging Face folder, and is enough of one until it is loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in FILES.items():
        if name != without:
            (folder / name).write_text(text)
    return folder


def refusal(spec: ModelSpec, cache: Path) -> tuple[ExitCode, str]:
    with pytest.raises(ExitError) as refused:
        ensure_model(spec, cache, 1)
    return refused.value.code, str(refused.value)


# -- folders


def test_every_source_of_the_api_is_registered() -> None:
    assert set(SOURCES) == set(MODEL_SOURCES)


def test_a_folder_is_used_as_it_is(tmp_path: Path) -> None:
    folder = fill(tmp_path / "model")
    spec = ModelSpec(source=f"file://{folder}")
    assert ensure_model(spec, tmp_path / "cache", 1) == folder
    assert not (tmp_path / "cache").exists()
    assert (vocab_size(folder), warmup_prompts(folder)) == (512, [])


@pytest.mark.parametrize("name", ["tokenizer_config.json", "pytorch_model.bin"])
def test_older_forms_of_a_folder_will_do(tmp_path: Path, name: str) -> None:
    folder = fill(tmp_path, without="tokenizer.json" if "tokenizer" in name else "model.safetensors")
    (folder / name).write_text("{}")
    assert ensure_model(ModelSpec(source=f"file://{folder}"), tmp_path, 1) == folder


@pytest.mark.parametrize(
    ("without", "missing"),
    [
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer"),
        ("model.safetensors", "no weights"),
    ],
)
def test_a_folder_that_lacks_something_is_refused_by_what_it_lacks(
    tmp_path: Path, without: str, missing: str
) -> None:
    folder = fill(tmp_path / "model", without)
    code, text = refusal(ModelSpec(source=f"file://{folder}"), tmp_path)
    assert code == ExitCode.REFUSED
    assert text == (
        f"spec.model.source: file://{folder}: {missing} in {folder}; it must be a Hugging Face folder with "
        "config.json, weights and a tokenizer"
    )


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    code, text = refusal(ModelSpec(source="file:///nowhere/model"), tmp_path)
    assert code == ExitCode.REFUSED and "no config.json in /nowhere/model" in text


def test_a_vision_models_vocabulary_is_that_of_its_text_part(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 7}}))
    assert vocab_size(tmp_path) == 7


# -- tokenizers


def test_a_tokenizer_loads_with_its_end_of_sequence_token(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).eos_token_id == EOS


def test_a_tokenizer_without_an_end_of_sequence_token_is_refused(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ExitError, match=f"{tmp_path} has no end-of-sequence token: no answer would end"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        '{"version": "1.0", "mod',
        '{"model": {"type": "None"}}',
        "null",
        '{"added_tokens": [{"id": 0}]}',
    ],
)
def test_a_tokenizer_that_does_not_load_is_refused(tmp_path: Path, content: str | None) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    if content is None:
        (tmp_path / "tokenizer.json").unlink()
    else:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(
        ExitError, match=f"spec.model.source: no tokenizer loads from {tmp_path}: "
    ) as refused:
        load_tokenizer(tmp_path)
    assert refused.value.code == ExitCode.REFUSED and "\n" not in str(refused.value)


# -- factories

made: list[tuple[int, int]] = []
script: list[Callable[[Path], object]] = []
"""The actions of the factory's next calls."""


@pytest.fixture(autouse=True)
def _fresh() -> None:
    made.clear()
    script.clear()


def factory(folder: Path, /, *, seed: int, context_length: int) -> list[str] | None:
    made.append((seed, context_length))
    assert list(folder.iterdir()) == []  # whatever was left by one that died
    action = script.pop(0) if script else fill
    action(folder)
    return ["1+1="] if action is fill else None


def raise_in_the_middle(folder: Path) -> None:
    fill(folder)
    raise RuntimeError("loss is not finite")


def say_nothing_of_prompts(folder: Path) -> None:
    fill(folder)


def forget_the_tokenizer(folder: Path) -> None:
    fill(folder, without="tokenizer.json")


MADE_HERE = ModelSpec(source=f"{__name__}:factory", context_length=64)


def test_a_factory_writes_its_folder_once(tmp_path: Path) -> None:
    folder = ensure_model(MADE_HERE, tmp_path / "cache", 7)
    assert ensure_model(MADE_HERE, tmp_path / "cache", 7) == folder
    assert made == [(7, 64)]
    assert warmup_prompts(folder) == ["1+1="] and folder.parent == tmp_path / "cache"


def test_a_factory_may_have_nothing_to_say_of_its_warm_up(tmp_path: Path) -> None:
    script.append(say_nothing_of_prompts)
    assert warmup_prompts(ensure_model(MADE_HERE, tmp_path, 7)) == []


@pytest.mark.parametrize(
    ("spec", "seed"),
    [
        (MADE_HERE, 8),
        (ModelSpec(source=f"{__name__}:factory", context_length=65), 7),
        (ModelSpec(source=f"{__name__}:factory", context_length=64, dtype="Float32"), 7),
    ],
)
def test_another_seed_context_or_dtype_is_another_model(tmp_path: Path, spec: ModelSpec, seed: int) -> None:
    assert ensure_model(spec, tmp_path, seed) != ensure_model(MADE_HERE, tmp_path, 7)
    assert len(made) == 2


def test_a_factory_whose_file_was_changed_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "changing_factory.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = ModelSpec(source="changing_factory:make", context_length=64)
    folders = []
    for comment in ("", "", "# better"):
        module.write_text(f"from {__name__} import factory as make {comment}\n")
        folders.append(ensure_model(spec, tmp_path / "cache", 7))
    assert folders[0] == folders[1] != folders[2] and len(made) == 2


def test_a_factory_that_meets_a_full_disk_may_find_room_at_the_next_attempt(tmp_path: Path) -> None:
    def meet_a_full_disk(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    script.append(meet_a_full_disk)
    code, text = refusal(MADE_HERE, tmp_path)
    assert code == ExitCode.TRY_AGAIN and "factory failed: OSError: [Errno 28] No space left" in text


def test_a_factory_that_raises_leaves_no_half_and_may_be_run_again(tmp_path: Path) -> None:
    script.append(raise_in_the_middle)
    code, text = refusal(MADE_HERE, tmp_path)
    assert code == ExitCode.UNUSABLE
    assert text == f"spec.model.source: {__name__}:factory failed: RuntimeError: loss is not finite"
    assert (ensure_model(MADE_HERE, tmp_path, 1) / WARMUP_PROMPTS).exists()
    assert len(made) == 2


def test_a_folder_that_nothing_loads_from_is_not_kept(tmp_path: Path) -> None:
    """Otherwise a factory would never be asked again after it has been fixed."""
    script.append(forget_the_tokenizer)
    code, text = refusal(MADE_HERE, tmp_path)
    assert code == ExitCode.REFUSED and f"{__name__}:factory: no tokenizer in {tmp_path}" in text
    ensure_model(MADE_HERE, tmp_path, 1)
    assert len(made) == 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_module:make", "module no_such_module cannot be imported: ModuleNotFoundError"),
        (f"{__name__}:make", f"{__name__} has no make"),
    ],
)
def test_a_factory_that_cannot_be_imported_is_refused(tmp_path: Path, source: str, message: str) -> None:
    code, text = refusal(ModelSpec(source=source), tmp_path)
    assert code == ExitCode.REFUSED
    assert text.startswith(f"spec.model.source: '{source}': ") and message in text


SLOW_FACTORY = """
import os, sys, time
from pathlib import Path
from asyncrl_api.job import ModelSpec
from asyncrl_runtime.model.source import ensure_model

def until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)

def make(folder, /, *, seed, context_length):
    assert not list(folder.iterdir())
    with open("made", "a") as file:
        file.write(f"{os.getpid()}\\n")
    (folder / "config.json").write_text("{}")
    until(lambda: Path("asked").read_text().count("asked") == int(sys.argv[1]))
    if sys.argv[2] == "hang":
        print("half", flush=True)
        time.sleep(600)
    time.sleep(0.2)  # for whoever else would make it now
    (folder / "tokenizer.json").touch()
    (folder / "model.safetensors").touch()

if __name__ == "__main__":
    import slow_factory
    with open("asked", "a") as file:
        file.write("asked\\n")
    print(ensure_model(ModelSpec(source="slow_factory:make"), Path("cache"), 1))
"""


def ask(folder: Path, num_callers: int, mode: str = "make") -> subprocess.Popen[str]:
    (folder / "slow_factory.py").write_text(SLOW_FACTORY)
    command = [sys.executable, "slow_factory.py", str(num_callers), mode]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)


def test_processes_that_ask_at_once_get_one_model_and_a_kill_leaves_no_half(tmp_path: Path) -> None:
    killed = ask(tmp_path, 1, "hang")
    assert killed.stdout is not None and killed.stdout.readline() == "half\n"
    killed.kill()
    killed.communicate()
    assert [path.suffix for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [".tmp"]

    callers = [ask(tmp_path, 3) for _ in range(2)]
    folders = {caller.communicate(timeout=120)[0] for caller in callers}
    assert [caller.returncode for caller in callers] == [0, 0]
    [folder] = folders
    assert len((tmp_path / "made").read_text().splitlines()) == 2  # by the one that died, and once
    assert (tmp_path / folder.strip() / WARMUP_PROMPTS).read_text() == "[]"


# -- packages


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder `my_models` of a package `my-models`, as installed."""
    site = tmp_path / "site"
    information = site / "my_models-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: my-models\nVersion: 1.0\n")
    (site / "my_models").mkdir()
    (site / "my_models" / "__init__.py").touch()
    monkeypatch.syspath_prepend(site)
    return site / "my_models"


@pytest.mark.parametrize("source", ["package://my-models", "package://my-models/large/it"])
def test_a_folder_is_copied_out_of_an_installed_package(tmp_path: Path, installed: Path, source: str) -> None:
    fill(installed / "large" / "it")
    if source.endswith("it"):
        fill(installed / "large" / "base")  # comes first, but is not asked for
        (installed / "large" / "it" / "generation_config.json").write_text("{}")
    folder = ensure_model(ModelSpec(source=source), tmp_path / "cache", 1)
    assert {path.name for path in folder.iterdir()} >= FILES.keys()
    assert (folder / "generation_config.json").exists() == source.endswith("it")
    (installed / "large" / "it" / "config.json").unlink()  # once is enough
    assert ensure_model(ModelSpec(source=source), tmp_path / "cache", 1) == folder


@pytest.mark.parametrize(
    ("source", "where"),
    [
        ("package://my-models", ""),
        ("package://my-models/small", " in its folder small"),
    ],
)
def test_a_package_that_ships_no_model_is_refused(
    tmp_path: Path, installed: Path, source: str, where: str
) -> None:
    (installed / "weights.bin").touch()
    if where:
        fill(installed / "large")
    code, text = refusal(ModelSpec(source=source), tmp_path / "cache")
    assert code == ExitCode.REFUSED
    assert text == (
        "spec.model.source: package://my-models ships neither a folder with config.json nor a GGUF file"
        + where
    )


@pytest.mark.usefixtures("installed")
def test_a_package_whose_folder_lacks_something_is_refused_as_a_folder_is(
    tmp_path: Path, installed: Path
) -> None:
    fill(installed / "model", without="model.safetensors")
    _, text = refusal(ModelSpec(source="package://my-models"), tmp_path / "cache")
    assert "package://my-models: no weights in " in text
    fill(installed / "model")
    ensure_model(ModelSpec(source="package://my-models"), tmp_path / "cache", 1)


@pytest.mark.parametrize("missing", [{"gguf"}, {"accelerate"}, {"accelerate", "gguf"}])
def test_what_a_conversion_needs_is_named(
    tmp_path: Path, installed: Path, monkeypatch: pytest.MonkeyPatch, missing: set[str]
) -> None:
    find_spec = importlib.util.find_spec

    def find(name: str) -> object:
        return None if name in missing else True if name in ("accelerate", "gguf") else find_spec(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    (installed / "tiny.Q4_1.gguf").touch()
    code, text = refusal(ModelSpec(source="package://my-models"), tmp_path / "cache")
    names = sorted(missing)
    assert code == ExitCode.REFUSED
    assert text == (
        f"spec.model.source: converting tiny.Q4_1.gguf needs {' and '.join(names)}: "
        f"pip install {' '.join(names)}"
    )


def fake_pip(folder: Path, body: str) -> str:
    """A stand-in for the interpreter: its arguments end with `--target FOLDER PACKAGE`."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\nwhile [ $# -gt 2 ]; do shift; done\ntarget=$1; name=$2\n{body}\n")
    program.chmod(0o755)
    return str(program)


def test_a_package_that_is_not_installed_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = fill(tmp_path / "source")
    body = f'[ "$name" = a-model ] && mkdir -p "$target/a_model" && cp -r {source} "$target/a_model/"'
    monkeypatch.setattr(sys, "executable", fake_pip(tmp_path, body))
    folder = ensure_model(ModelSpec(source="package://a-model/source"), tmp_path / "cache", 1)
    assert {path.name for path in folder.iterdir()} == FILES.keys()
    assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]


def test_a_package_that_cannot_be_fetched_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = 'echo "ERROR: No matching distribution found for $name" >&2; exit 1'
    monkeypatch.setattr(sys, "executable", fake_pip(tmp_path, body))
    code, text = refusal(ModelSpec(source="package://a-model"), tmp_path / "cache")
    assert code == ExitCode.TRY_AGAIN
    assert text == (
        "spec.model.source: package://a-model is not installed, and fetching it failed: ERROR: No matching "
        "distribution found for a-model; install it with: pip install --no-deps a-model"
    )


# -- the hub


def test_a_model_that_the_hub_does_not_give_is_tried_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, text = refusal(ModelSpec(source="hf://org/name", revision="v2"), tmp_path)
    assert code == ExitCode.TRY_AGAIN
    assert text.startswith("spec.model.source: hf://org/name at v2 cannot be fetched: ")
    assert text.endswith("check the name, the network, and model.secretRef for a gated model")
    assert "\n" not in text
