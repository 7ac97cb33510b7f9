"""Every reason is defined in decide/reasons.py, and no other is given anywhere."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from asyncrl_api.job_status import Phase
from asyncrl_operator.decide import reasons
from asyncrl_operator.docgen import BEGIN, END, with_tables
from support.paths import ROOT

OPERATOR = ROOT / "operator" / "asyncrl_operator"
HOME = OPERATOR / "decide" / "reasons.py"
GIVES = {"Problem": 0, "Ended": 0, "_disruption": 0, "Event": 0, "Standing": 1, "Deadline": 1}
"""The calls that give a reason, and the position of that argument."""
TRUTHS = {"True", "False", "Unknown"}
OTHER_THINGS = {*get_args(Phase), "Complete", "Degraded", "Ready", "Shared", "OOMKilled"}
"""The words that are also phases, conditions, a mode of messaging, or the kubelet's."""


def free_reasons(code: str) -> Iterator[str]:
    """Yield literals that stand where a reason is given, or are equal to one."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and (place := GIVES.get(_name(node.func))) is not None:
            yield from _literals(node.args[place]) if len(node.args) > place else ()
        elif isinstance(node, ast.Tuple) and len(node.elts) == 3 and TRUTHS & set(_literals(node.elts[0])):
            yield from set(_literals(node.elts[1])) - TRUTHS  # Literal["True", "False", "Unknown"]
        elif isinstance(node, ast.Constant) and node.value in reasons.ALL.keys() - OTHER_THINGS:
            yield str(node.value)


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _literals(node: ast.expr) -> list[str]:
    """Return the strings that an expression may evaluate to, but not those that it only compares with."""
    match node:
        case ast.Constant(value=str() as text) if text:
            return [text]
        case ast.IfExp(body=body, orelse=other):
            return [*_literals(body), *_literals(other)]
        case ast.BoolOp(values=values):
            return [text for value in values for text in _literals(value)]
        case _:
            return []


@pytest.mark.parametrize("path", sorted(OPERATOR.rglob("*.py")), ids=lambda path: path.stem)
def test_a_reason_is_never_a_free_string(path: Path) -> None:
    if path != HOME:
        assert list(free_reasons(path.read_text())) == []


@pytest.mark.parametrize(
    "code",
    [
        'Problem("Odd", text)',
        'attempts.Ended("Odd" if x else reasons.HUNG, text)',
        'Standing("Running", "Running", text)',
        'fact = ("True", "Odd", "")',
        'x = condition.reason == "Hung"',
    ],
)
def test_a_free_string_is_found(code: str) -> None:
    assert list(free_reasons(code))


def test_every_reason_is_given_somewhere() -> None:
    code = "\n".join(path.read_text() for path in OPERATOR.rglob("*.py") if path != HOME)
    names = {value: name for name, value in vars(reasons).items() if isinstance(value, str)}
    unused = {name for name in reasons.ALL if not re.search(rf"\breasons\.{names[name]}\b", code)}
    assert unused == set()


def test_words_are_camel_case_and_each_says_something() -> None:
    for each in reasons.ALL.values():
        assert re.fullmatch(r"[A-Z][A-Za-z]+", each.name) and each.meaning
        assert "|" not in each.meaning + each.remedy, "it would end the cell"


def test_a_page_without_the_marks_is_not_written() -> None:
    with pytest.raises(ValueError, match="are not there: put them back"):
        with_tables(f"{END}{BEGIN}")
    page = with_tables(f"before\n{BEGIN}OLD\n{END}after\n")
    assert page.startswith("before\n") and page.endswith("after\n") and "OLD" not in page
    assert with_tables(page) == page
