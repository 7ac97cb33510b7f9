"""Writes manifests the way the API server stores them, so that what was applied equals what is there. Pure.

A quantity has many spellings (`1024Mi`, `1Gi`), one of which is stored; some fields are not stored if they
say nothing. Without this, such an overlay would look edited by hand in every pass.
"""

import re
from collections.abc import Mapping
from decimal import ROUND_UP, Decimal
from typing import Any

QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(Ki|Mi|Gi|Ti|Pi|Ei|n|u|m|k|M|G|T|P|E|[eE][+-]?\d+)?")
DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
BINARY = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
SMALLEST, SMALLEST_EXPONENT = Decimal("1e-3"), -3

COUNTS = {"requests", "limits", "overhead"}
"""The maps whose values are quantities."""
SIZES = {"sizeLimit", "divisor"}
UNSAID = {"readOnly", "hostNetwork", "hostPID", "hostIPC", "tty", "stdin", "stdinOnce"}
"""Fields that are not stored if they are false."""


def canonical(value: Any, name: str = "") -> Any:
    """Return a part of a pod template, or of a claim template, as the API server stores it.

    Args:
        name: the name of the field that holds it.
    """
    if isinstance(value, Mapping):
        if name in COUNTS:
            return {key: canonical_quantity(each) for key, each in value.items()}
        return {key: canonical(each, key) for key, each in value.items() if not _is_unsaid(key, each, value)}
    if isinstance(value, list):
        return [canonical(each) for each in value]
    return canonical_quantity(value) if name in SIZES else value


def canonical_quantity(value: Any) -> Any:
    """Return a quantity in the spelling that is stored; anything else is left for the API server to refuse.

    The stored number is the smallest whole number that a unit of its kind allows: powers of 1000, or of 1024
    for `Ki` and above. What is finer than a thousandth is rounded up.
    """
    match = None if isinstance(value, bool) else QUANTITY.fullmatch(str(value))
    if match is None:
        return value
    suffix = match[2] or ""
    if suffix.endswith("i"):
        amount = Decimal(match[1]) * 1024 ** BINARY.index(suffix)
        if abs(amount) >= 1024 and amount == int(amount):
            return _binary(int(amount))
    else:
        is_exponent = suffix[:1] in ("e", "E") and len(suffix) > 1
        amount = Decimal(match[1]).scaleb(int(suffix[1:]) if is_exponent else DECIMAL[suffix])
        if is_exponent:
            return _decimal(
                amount, {exponent: f"e{exponent}" for exponent in range(SMALLEST_EXPONENT, 19, 3)} | {0: ""}
            )
    return _decimal(amount, {exponent: unit for unit, exponent in DECIMAL.items()})


def _binary(number: int) -> str:
    power = 0
    while number % 1024 == 0 and power < len(BINARY) - 1:
        number, power = number // 1024, power + 1
    return f"{number}{BINARY[power]}"


def _decimal(amount: Decimal, units: Mapping[int, str]) -> str:
    if not amount:
        return "0"
    number, exponent = int((amount / SMALLEST).to_integral_value(ROUND_UP)), SMALLEST_EXPONENT
    while number % 1000 == 0 and exponent < max(units):
        number, exponent = number // 1000, exponent + 3
    return f"{number}{units[exponent]}"


def _is_unsaid(key: str, value: Any, siblings: Mapping[str, Any]) -> bool:
    is_variable = key == "value" and value == "" and "name" in siblings
    return is_variable or (key in UNSAID and value is False)
