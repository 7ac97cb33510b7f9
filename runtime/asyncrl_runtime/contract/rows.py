"""What a row of a data set says as a prompt, the same for whoever excludes it and whoever renders it."""

from collections.abc import Mapping, Sequence
from typing import Any


class PromptError(ValueError):
    """The row cannot be made a prompt; names the field."""


def prompt_text(row: Mapping[str, Any], field: str) -> str:
    """Return a row's prompt as text, without template: of a conversation its last message.

    Raises:
        PromptError: the row has no such field, or it is neither text nor a list of messages.
    """
    if field not in row:
        raise PromptError(f"field {field!r} is missing; the row has {', '.join(sorted(row)) or 'no fields'}")
    value = row[field]
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and value and isinstance(value[-1], Mapping):
        return str(value[-1].get("content", ""))
    raise PromptError(f"field {field!r} is {type(value).__name__}; must be text or a list of messages")
