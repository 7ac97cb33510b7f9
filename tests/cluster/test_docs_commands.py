"""The commands of docs/kubernetes.md that name this test, run in order as they are there."""

import shutil
import subprocess
from pathlib import Path

import pytest

from support.cluster.control_plane import Cluster, claim_of_folder
from support.cluster.operator_process import running_operator
from support.doc_commands import blocks_of
from support.paths import ROOT

pytestmark = pytest.mark.e2e

PAGE = "docs/kubernetes.md"
MARK = "run by tests/cluster/test_docs_commands.py"
NAMESPACE = "team"
"""The page's own."""


def test_what_the_page_says_works(cluster: Cluster, operator_rights: Path, tmp_path: Path) -> None:
    commands = [command for block in blocks_of(PAGE) if block.mark == MARK for command in block.commands]
    assert len(commands) >= 10
    volume, _ = claim_of_folder(NAMESPACE, "checkpoints", "/tmp", ["ReadWriteMany"])
    volume["spec"]["capacity"] = {"storage": "20Gi"}
    cluster.apply(volume)
    config = tmp_path / "kubeconfig"  # of its own, for the page sets a namespace in it
    shutil.copy(cluster.kubeconfig, config)
    environment = {**cluster.environment, "KUBECONFIG": str(config)}
    try:
        with running_operator(operator_rights, tmp_path):
            for command in commands:
                done = subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", command],
                    cwd=ROOT,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=240,
                    check=False,
                )
                assert done.returncode == 0, f"{command}: {done.stderr}"
    finally:
        cluster.run("kubectl", "delete", "namespace", NAMESPACE, "--wait=false")
