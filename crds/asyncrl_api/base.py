"""What the API types are made of: their base class, bounded scalars, references, quantities."""

import re
from decimal import ROUND_CEILING, Decimal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from asyncrl_api.marks import field

MAX_INT = 2**31 - 1
"""The upper bound of our integers; the product of two of them stays within CEL's 64 bits."""

QUANTITY = r"^[0-9]+(\.[0-9]+)?(k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"
OPTIONAL_QUANTITY = r"^([0-9]+(\.[0-9]+)?(k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?)?$"
OPTIONAL_SUBJECT = r"^([A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*)?$"
PATTERN_WORDS = {
    QUANTITY: "must be a quantity of bytes such as 10Gi",
    OPTIONAL_QUANTITY: "must be a quantity of bytes such as 80Gi, or empty",
    OPTIONAL_SUBJECT: "must be words of letters, digits, - and _, separated by dots, or empty",
}
"""What a user is told whose value does not match the pattern."""


def _int_or_auto(value: object) -> object:
    if value == "Auto" or (type(value) is int and 0 <= value <= MAX_INT):
        return value
    raise PydanticCustomError("int_or_auto", "must be Auto, or an integer from 0")


IntOrAuto = Annotated[
    int | Literal["Auto"],
    PlainValidator(_int_or_auto),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0, "maximum": MAX_INT},
                {"type": "string", "const": "Auto"},
            ]
        }
    ),
]
# Every string and list has a bound: the API server derives the cost of CEL rules from it.
Count = Annotated[int, Field(ge=1, le=MAX_INT)]
CountOrZero = Annotated[int, Field(ge=0, le=MAX_INT)]
Percent = Annotated[int, Field(ge=0, le=100)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(max_length=253)]
Text = Annotated[str, Field(max_length=1024)]
Quantity = Annotated[str, Field(max_length=32, pattern=QUANTITY)]
OptionalQuantity = Annotated[str, Field(max_length=32, pattern=OPTIONAL_QUANTITY)]
OptionalSubject = Annotated[str, Field(max_length=253, pattern=OPTIONAL_SUBJECT)]
Arguments = Annotated[list[Text], Field(max_length=256)]
FreeForm = dict[str, Any]
"""Kept as the user wrote it; `x-kubernetes-preserve-unknown-fields` in the CRD."""


class ApiType(BaseModel):
    """Base of all blocks: camelCase in the manifest, frozen, strict; unknown fields are errors."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
    )


class SecretReference(ApiType):
    """A Secret in the job's namespace."""

    name: Name = field("Name of a Secret in the namespace of the job.", min_length=1)


class ConfigMapReference(ApiType):
    """A ConfigMap in the job's namespace."""

    name: Name = field("Name of a ConfigMap in the namespace of the job.", min_length=1)


class ClaimReference(ApiType):
    """A PersistentVolumeClaim in the job's namespace."""

    claim_name: Name = field("Name of a PersistentVolumeClaim in the namespace of the job.", min_length=1)


def parse_quantity(text: str) -> int:
    """Return the bytes that a quantity such as "80Gi" or "1.5G" stands for, rounded up.

    Raises:
        ValueError: `text` is not a quantity.
    """
    match = re.fullmatch(QUANTITY, text)
    if not match:
        raise ValueError(f"{text!r} {PATTERN_WORDS[QUANTITY]}")
    suffix = match[2] or ""
    base = 1024 if suffix.endswith("i") else 1000
    exponent = " KMGTP".index(suffix[:1].upper() or " ")
    number = Decimal(text.removesuffix(suffix))
    return int((number * base**exponent).to_integral_value(ROUND_CEILING))
