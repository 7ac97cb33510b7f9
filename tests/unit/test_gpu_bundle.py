"""What `make gpu-bundle` packs: everything in the pinned version, and nothing that is gigabytes."""

import importlib.util
from pathlib import Path

import pytest

from support.paths import ROOT

SPEC = importlib.util.spec_from_file_location("gpu_bundle", ROOT / "scripts" / "gpu_bundle.py")
assert SPEC is not None and SPEC.loader is not None
gpu_bundle = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gpu_bundle)


def test_every_package_has_a_pinned_version_and_torch_is_not_among_them() -> None:
    requirements = gpu_bundle.pinned(
        gpu_bundle.NAMES.read_text().split(), (ROOT / "constraints.txt").read_text()
    )
    names = {each.split("==")[0] for each in requirements}
    assert {"deepspeed", "msgspec", "pydantic"} <= names
    assert names.isdisjoint({"torch", "transformers", "numpy"})


def test_a_package_without_a_version_is_named() -> None:
    with pytest.raises(ValueError, match="no version of b: run make constraints"):
        gpu_bundle.pinned(["a", "b"], "# b==2\na==1\n")


def test_wheels_are_fetched_for_the_target_and_sources_are_built_here() -> None:
    fetch, build = gpu_bundle.commands(["msgspec==1", "deepspeed==2"], Path("wheels"), "3.12")
    assert fetch[-1] == "msgspec==1"
    assert fetch[fetch.index("--python-version") + 1] == "3.12"
    assert build[-1] == "deepspeed==2"
    assert "--no-deps" in fetch and "--no-deps" in build
