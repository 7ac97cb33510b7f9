"""The commands that a page of the docs shows, and what the page says about who runs them.

A block of commands is fenced as `console`, and the line before it is `<!-- run by FILE -->`, for a test that
runs the block as it stands, or `<!-- not run: WHY -->`.
"""

import re
from dataclasses import dataclass

from support.paths import ROOT

BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*?) -->\n)?"
    r"```(?P<language>console|bash|sh|shell)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class CommandBlock:
    """One block of commands."""

    mark: str
    """The text of the comment before it; empty if there is none."""
    commands: tuple[str, ...]
    """The commands, each with the lines that belong to it: those that do not begin with `$ `."""


def blocks_of(page: str) -> list[CommandBlock]:
    """Return the blocks of commands of a page, in order.

    Args:
        page: its path in the checkout.
    """
    found = BLOCK.finditer((ROOT / page).read_text())
    return [
        CommandBlock(block["mark"] or "", tuple(re.split(r"^\$ ", block["text"], flags=re.M)[1:]))
        for block in found
    ]
