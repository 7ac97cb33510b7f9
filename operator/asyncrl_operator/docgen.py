"""Writes the tables of reasons into docs/kubernetes.md: part of `make crd`."""

import argparse
from pathlib import Path

from asyncrl_operator.decide.reasons import render_tables

PAGE = Path("docs") / "kubernetes.md"
BEGIN = "<!-- Made from operator/asyncrl_operator/decide/reasons.py by `make crd`. -->\n"
END = "<!-- The end of what is made. -->\n"


def with_tables(page: str) -> str:
    """Return the page with the tables as they are now.

    Raises:
        ValueError: the page does not have both marks, in their order.
    """
    before, found, rest = page.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not (found and found_end):
        raise ValueError(f"{PAGE}: the lines {BEGIN.strip()} and {END.strip()} are not there: put them back")
    return f"{before}{BEGIN}\n{render_tables()}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tables of reasons.")
    parser.add_argument("root", type=Path, nargs="?", default=Path(), help="The repository's root.")
    path = parser.parse_args().root / PAGE
    path.write_text(with_tables(path.read_text()))
    print(f"{path}: written")


if __name__ == "__main__":
    main()
