"""The cases that parsers of the past did not survive, one a line in base64, by parser."""

import base64
from pathlib import Path

from support.fuzz import operator_targets, runtime_targets
from support.fuzz.staging_targets import staging_targets
from support.fuzz.target import Target
from support.paths import ROOT

CORPUS = ROOT / "tests" / "fuzz" / "corpus"


def all_targets(folder: Path) -> list[Target]:
    ours = [*runtime_targets.targets(folder), *staging_targets(folder)]
    return [*ours, *operator_targets.targets(folder)]


def corpus_file(name: str) -> Path:
    return CORPUS / f"{name}.txt"


def corpus(name: str) -> list[bytes]:
    path = corpus_file(name)
    return [base64.b64decode(line) for line in path.read_text().splitlines()] if path.exists() else []
