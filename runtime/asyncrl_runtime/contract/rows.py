"""The text of a row's prompt, which must be the same for all who exclude prompts and all who render them."""

from collections.abc import Mapping, Sequence
from typing import Any


class PromptError(ValueError):
    """A row holds no usable prompt; the message names the field."""


def prompt_text(row: Mapping[str, Any], field: str) -> str:
    """Return a row's prompt as text, without a chat template; for a conversation, its last message.

    Raises:
        PromptError: the row has no such field, or the field is neither text nor a list of messages.
    """
    if field not in row:
        raise PromptError(f"field {field!r} is missing; the row has {', '.join(sorted(row)) or 'no fields'}")
    value = row[field]
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and value and isinstance(value[-1], Mapping):
        return str(value[-1].get("content", ""))
    raise PromptError(f"field {field!r} is {type(value).__name__}; must be text or a list of messages")
