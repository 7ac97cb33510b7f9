"""Where things are in the repository: the standard library stays visible, and the operator stays light."""

import ast
import importlib
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from support.engines.tiny_models import build_tokenizer

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = [ROOT / path for path in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
HIDDEN = {"types", "queue", "logging", "operator"}
"""Modules of the standard library that one of ours would hide if a folder of ours were on the path."""


def python(*arguments: str, folder: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_repository_does_not_hide_the_standard_library() -> None:
    """Run without site-packages, which on many machines imports `operator` early and so hides the damage."""
    script = "import collections, operator; print(operator.__file__)"
    found = Path(python("-S", "-c", script).strip())
    assert found.name == "operator.py" and not found.is_relative_to(ROOT)


@pytest.mark.parametrize("folder", ["crds", "operator", "runtime", "tests/operator"])
def test_source_roots_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_no_module_of_ours_is_called_like_one_of_the_standard_library_that_it_could_hide() -> None:
    modules = [path for package in PACKAGES for path in package.rglob("*.py")]
    assert len(modules) > 50
    assert not [path for path in modules if path.stem in HIDDEN]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_every_folder_with_modules_is_a_package_with_a_sentence_on_itself(package: Path) -> None:
    for folder in {path.parent for path in package.rglob("*.py")}:
        text = (folder / "__init__.py").read_text()
        assert ast.get_docstring(ast.parse(text)), folder


LIGHT = """
import importlib, pkgutil, sys

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "nats", "transformers", "deepspeed", "asyncrl_runtime"):
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, Forbidden())
for package in map(importlib.import_module, sys.argv[1:]):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
        print(module.name)
"""


def test_types_and_operator_are_imported_without_torch_and_without_nats() -> None:
    """The operator's image has neither."""
    modules = python("-c", LIGHT, "asyncrl_api", "asyncrl_operator").split()
    assert {"asyncrl_api.job", "asyncrl_operator.layout", "asyncrl_operator.local.cli"} <= set(modules)


def test_the_forbidden_would_be_noticed() -> None:
    with pytest.raises(AssertionError, match="torch is imported"):
        python("-c", f"{LIGHT}\nimport torch")


def test_messages_are_imported_without_torch_and_without_nats() -> None:
    script = (
        "import sys, asyncrl_runtime.contract.messages, asyncrl_runtime.main; "
        "print(*{'torch', 'nats', 'transformers'} & set(sys.modules))"
    )
    assert python("-c", script).split() == []


def test_a_worker_needs_no_torch_and_one_http_client(tmp_path: Path) -> None:
    """Torch would take 240 MB and seconds of its start; httpx is slow with many streams."""
    build_tokenizer().save_pretrained(tmp_path)
    script = (
        "import sys, pathlib, asyncrl_runtime.rollout.assemble as worker; "
        "worker.load_tokenizer(pathlib.Path(sys.argv[1])); print(*{'torch', 'httpx'} & set(sys.modules))"
    )
    assert python("-c", script, str(tmp_path)).split() == []


@pytest.mark.parametrize("script", PROJECT["project"]["scripts"])
def test_every_console_script_leads_to_something(script: str) -> None:
    module, _, name = PROJECT["project"]["scripts"][script].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


CLASSES_TWICE: dict[str, str] = {}
"""The names that may stand for two things, with the reasons."""
FILES_TWICE = {
    "__init__.py": "a package's own",
    "__main__.py": "a package's own",
    "assemble.py": "puts together the worker, and the trainer",
    "broker.py": "what is asked of a broker (contract/), and the connection to NATS (transport/)",
    "command.py": "what `asyncrl-runtime engine` does, and `asyncrl-runtime sglang`",
    "main.py": "the entry point of the operator, and of the runtime",
}


def defined_names(module: Path) -> set[str]:
    """Return the classes and the aliases of types that a module defines at its top."""
    found = set()
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in found if name.lstrip("_")[:1].isupper() and not name.isupper()}


def test_no_class_and_no_file_has_the_name_of_another() -> None:
    modules = [path for package in PACKAGES for path in package.rglob("*.py")]
    classes = Counter(name for module in modules for name in defined_names(module))
    assert classes.total() > 300
    assert {name for name, count in classes.items() if count > 1} == CLASSES_TWICE.keys()
    # quickstart.py has its former name for one release more.
    files = Counter(path.name for path in modules if path.parent.name != "asyncrl_examples")
    assert {name for name, count in files.items() if count > 1} <= FILES_TWICE.keys()


PREPOSITIONS = {
    "About",
    "After",
    "As",
    "At",
    "Before",
    "Behind",
    "Between",
    "By",
    "During",
    "For",
    "From",
    "In",
    "Of",
    "On",
    "Over",
    "Per",
    "Since",
    "Under",
    "Until",
    "With",
}


def attribute_docstrings(module: Path) -> Iterator[tuple[int, str]]:
    """Yield the strings that stand below an assignment, with their lines."""
    for node in ast.walk(ast.parse(module.read_text())):
        body = getattr(node, "body", None)
        for before, after in pairwise(body if isinstance(body, list) else []):
            match before, after:
                case (ast.Assign() | ast.AnnAssign(), ast.Expr(value=ast.Constant(value=str() as text))):
                    yield after.lineno, text


def test_an_attributes_docstring_does_not_begin_with_a_preposition() -> None:
    """It would complete a sentence whose head is the name: a noun phrase stands by itself."""
    found = [
        (path, line, text)
        for package in PACKAGES
        for path in package.rglob("*.py")
        for line, text in attribute_docstrings(path)
    ]
    assert len(found) > 300
    assert not [f"{path}:{line}" for path, line, text in found if text.split()[0] in PREPOSITIONS]
