"""One parser of foreign data, and what it may do with a case."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A parser under test."""

    name: str
    seeds: Sequence[bytes]
    """Real messages, from which cases are made."""
    run: Callable[[bytes], None]
    refuses_with: tuple[type[BaseException], ...] = ()
    """What its caller catches, counts and goes on after; anything else that it raises is a fault."""

    cases: int = 1000
    """The cases in CI; fewer for a parser that is slow."""

    def check(self, case: bytes) -> None:
        """Hand it a case; raises whatever would end the process, or a loop of it."""
        with contextlib.suppress(*self.refuses_with):
            self.run(case)


def parts(case: bytes, count: int) -> list[bytes]:
    """Return the parts of a case that has several, such as a subject and a message, parted by empty lines."""
    found = case.split(b"\n\n", count - 1)
    return [*[b""] * (count - len(found)), *found]
