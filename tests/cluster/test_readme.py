"""The README's lines about a cluster, as they stand there."""

import re
import shlex
from pathlib import Path

import pytest

from support.cluster.control_plane import Cluster
from support.cluster.operator_process import make_claim, running_operator

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]


def transcript() -> list[tuple[str, str]]:
    """Return the commands of the README's transcript, each with what it prints."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- transcript -->\n```console\n(.*?)```", text, re.DOTALL)
    assert block is not None
    steps = [each.partition("\n") for each in block[1].split("$ ")[1:]]
    return [(command, output) for command, _, output in steps]


def without_what_differs(text: str) -> list[list[str]]:
    """Return the words of each line, ages aside."""
    return [[re.sub(r"^\d+[smh]$", "AGE", word) for word in line.split()] for line in text.splitlines()]


def test_the_transcript_is_what_happens(
    cluster: Cluster, namespace: str, operator_rights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    cluster.apply(*make_claim(namespace), namespace=namespace)
    with running_operator(operator_rights, tmp_path):
        for command, output in transcript():
            program, *arguments = shlex.split(command)
            done = cluster.run(program, "-n", namespace, *arguments)
            assert done.returncode == 0, f"{command}: {done.stderr}"
            printed = re.sub(r" from \S+ namespace", "", done.stdout)
            assert without_what_differs(printed) == without_what_differs(output), command
