"""The values that the API lets a field have, with which the runtime's tables are compared."""

from typing import get_args

from asyncrl_api.base import ApiType


def values_of(block: type[ApiType], field: str) -> set[str]:
    """Return the values of a field that is a choice of words; `field` is its name in Python."""
    values = set(get_args(block.model_fields[field].annotation))
    assert values and all(isinstance(value, str) for value in values), f"{field} is no choice of words"
    return values
