"""What docs/kubernetes.md says of reasons is made from the module that has them all."""

from asyncrl_operator.docgen import PAGE, with_tables
from support.paths import ROOT


def test_the_tables_of_reasons_are_those_of_the_code() -> None:
    page = (ROOT / PAGE).read_text()
    assert with_tables(page) == page, "make crd writes them anew"
