"""Counts what arrives and is not taken, and logs it seldom: whoever sends it may send it without end."""

import logging
from collections import Counter

log = logging.getLogger(__name__)

LONGEST_DETAIL = 300


class Refusals:
    """What one process has refused, by kind.

    A kind is one of our own words, so there are few; what came from outside belongs into the detail.
    """

    def __init__(self) -> None:
        self.by_kind: Counter[str] = Counter()

    @property
    def num(self) -> int:
        """The number of all that were refused."""
        return self.by_kind.total()

    def add(self, kind: str, detail: str) -> None:
        """Count one; log the first of its kind, the tenth, the hundredth and so on."""
        self.by_kind[kind] += 1
        number = self.by_kind[kind]
        if set(str(number)[1:]) <= {"0"} and str(number)[0] == "1":
            log.warning("refused: %s, %d so far; the last: %s", kind, number, one_line(detail))


def one_line(text: str, longest: int = LONGEST_DETAIL) -> str:
    """Return a foreign text as it may stand in a log or a message: on one line, and not too long."""
    words = "".join(char if char.isprintable() else " " for char in text[: 4 * longest]).split()
    line = " ".join(words)
    return line if len(line) <= longest else f"{line[: longest - 4]} ..."
