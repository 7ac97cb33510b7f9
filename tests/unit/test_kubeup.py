"""`scripts/kubeup.py` says what it lacks, and docs/kube-kit.md what a kit must answer."""

import os
import re
import subprocess
import sys
from pathlib import Path

from support.paths import ROOT

KUBEUP = ROOT / "scripts" / "kubeup.py"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(KUBEUP), *arguments]
    return subprocess.run(
        command, check=False, text=True, capture_output=True, timeout=60, env={"PATH": "", **environment}
    )


def test_a_program_that_is_missing_is_named() -> None:
    done = run("tools")
    assert done.returncode == 1 and done.stdout == ""
    assert "# kube-apiserver: not there" in done.stderr
    assert "kubeup.py: etcd is neither in KUBEBUILDER_ASSETS nor on PATH: see docs/kube-kit.md" in done.stderr


def test_programs_that_are_there_are_all_that_is_to_be_set(tmp_path: Path) -> None:
    for name in ("etcd", "kube-apiserver", "kubectl"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    done = run("tools", KUBEBUILDER_ASSETS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"export KUBEUP={KUBEUP} KUBEBUILDER_ASSETS={tmp_path}\n"


def test_nodes_are_refused_and_a_control_plane_that_is_not_there_can_be_stopped(tmp_path: Path) -> None:
    done = run("kwok", "start", "--nodes", "4", "--dir", str(tmp_path / "none"))
    assert done.returncode == 2 and "has no nodes" in done.stderr
    assert run("stop", "--dir", str(tmp_path / "none")).returncode == 0


def test_the_command_can_be_run_as_it_is() -> None:
    assert os.access(KUBEUP, os.X_OK)


def test_all_that_the_tests_ask_of_a_kit_is_in_its_page() -> None:
    page = (ROOT / "docs" / "kube-kit.md").read_text()
    cells = re.findall(r"^\| (.+?) \|", page, re.M)
    told = {word for cell in cells for word in re.findall(r"`([a-z]+)", cell)}
    tests = [path.read_text() for path in (ROOT / "tests").rglob("*.py")]
    calls = {call for text in tests for call in re.findall(r'kubeup\(\s*"([a-z]+)"', text)}
    assert {"start", "stop", "kubeconfig", "kwok", "node", "volumes", "restart"} <= calls <= told
    annotations = {name for text in tests for name in re.findall(r"kubeup/([a-z][a-z-]*[a-z])", text)}
    assert {"exit-code", "start"} <= annotations
    assert all(f"`kubeup/{name}:" in page for name in annotations), annotations
