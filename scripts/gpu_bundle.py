"""Packs what `make gpu-check` needs on a machine without a network, apart from torch and transformers.

    python scripts/gpu_bundle.py FOLDER

FOLDER is filled with wheels of the packages in gpu-bundle.txt, in the versions of constraints.txt, for Linux
on x86-64 and the Python of GPU_PYTHON_VERSION (3.12 by default). torch with CUDA, transformers and numpy must
be on the machine already: they alone would be gigabytes. The repository travels beside the folder, and both
must be under 64 MB together.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMES = ROOT / "scripts" / "gpu-bundle.txt"
MAX_BYTES = 64 * 10**6
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")
BUILT_HERE = ("deepspeed",)
"""The packages that come as sources alone; none of their operators is compiled."""
SECONDS = 900
"""How long one call of pip may take."""


def pinned(names: Sequence[str], constraints: str) -> list[str]:
    """Return `name==version` of each name.

    Raises:
        ValueError: constraints.txt has no version of one.
    """
    versions = dict(
        line.replace("_", "-").split("==", 1)
        for line in constraints.splitlines()
        if "==" in line and not line.startswith("#")
    )
    if missing := [name for name in names if name not in versions]:
        raise ValueError(f"constraints.txt has no version of {', '.join(missing)}: run make constraints")
    return [f"{name}=={versions[name]}" for name in names]


def commands(requirements: Sequence[str], folder: Path, python: str) -> list[list[str]]:
    """Return the calls of pip that fill the folder."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    built = [each for each in requirements if each.startswith(BUILT_HERE)]
    found = [each for each in requirements if each not in built]
    target = ["--python-version", python, "--implementation", "cp", "--only-binary=:all:"]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    return [
        [*pip, "download", "--no-deps", *target, *platforms, "--dest", str(folder), *found],
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), *built],
    ]


def num_bytes(paths: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    requirements = pinned(NAMES.read_text().split(), (ROOT / "constraints.txt").read_text())
    environment = {**os.environ, "DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
    for command in commands(requirements, folder, os.environ.get("GPU_PYTHON_VERSION", "3.12")):
        subprocess.run(command, check=True, env=environment, timeout=SECONDS)
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    ).stdout.splitlines()
    packed, whole = num_bytes([*folder.iterdir()]), num_bytes([ROOT / path for path in tracked])
    print(f"{folder}: {packed / 1e6:.1f} MB of wheels; with the repository {(packed + whole) / 1e6:.1f} MB")
    if packed + whole > MAX_BYTES:
        sys.exit(f"more than {MAX_BYTES / 1e6:.0f} MB: leave something out of scripts/gpu-bundle.txt")


if __name__ == "__main__":
    main()
