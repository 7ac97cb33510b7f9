"""The GPU image holds trainer and SGLang in one environment: what they require of each package must agree."""

import importlib.metadata
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from asyncrl_api.run_config import SGLANG_PYTHON

ROLES = ("runtime", "sglang", "hub")
"""Extras that images/runtime/Dockerfile installs for GPUs, beside what is always required."""


def test_sglangs_versions_are_among_those_that_the_runtime_allows() -> None:
    if SGLANG_PYTHON not in os.environ:
        pytest.skip(f"{SGLANG_PYTHON} is not set: no SGLang whose requirements could be read")
    ours = {each.name: each for each in requirements_of("asyncrl", *ROLES)}
    [sglang] = ours["sglang"].specifier
    installed = ask_sglangs_python("importlib.metadata.version('sglang')")
    assert sglang.version == installed, "what is tried on CPUs is what the image has"
    pinned = {}
    for text in ask_sglangs_python("importlib.metadata.requires('sglang')"):
        theirs = Requirement(text)
        pins = [each.version for each in theirs.specifier if each.operator == "=="]
        if applies(theirs) and pins and theirs.name in ours:
            [pinned[theirs.name]] = pins
    assert {"torch", "transformers"} <= pinned.keys()
    for name, version in pinned.items():
        assert ours[name].specifier.contains(version), f"SGLang has {name} {version}, not {ours[name]}"


def test_deepspeed_allows_the_torch_that_both_use() -> None:
    [torch] = [each for each in requirements_of("asyncrl", "runtime") if each.name == "torch"]
    [pin] = torch.specifier
    for each in requirements_of("deepspeed"):
        assert each.name != "torch" or each.specifier.contains(pin.version), str(each)


def requirements_of(package: str, *extras: str) -> Iterator[Requirement]:
    for text in importlib.metadata.requires(package) or ():
        requirement = Requirement(text)
        if applies(requirement, *extras):
            yield requirement


def applies(requirement: Requirement, *extras: str) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def ask_sglangs_python(expression: str) -> Any:
    code = f"import importlib.metadata, json; print(json.dumps({expression}))"
    python = Path(os.environ[SGLANG_PYTHON])
    return json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)
