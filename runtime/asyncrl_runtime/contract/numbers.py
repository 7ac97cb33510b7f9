"""Which numbers may be trained on: those that are finite in float32. Pure, and without imports of its own.

A number that is not would become a loss and a gradient that are not finite, in every sample of its minibatch.
"""

MAX_FLOAT32 = (2 - 2**-23) * 2.0**127
"""The largest finite float32."""


def is_usable(value: object) -> bool:
    """Return whether `value` is a number that is finite in float32; None, as JSON has NaN, is not."""
    return isinstance(value, int | float) and abs(value) <= MAX_FLOAT32  # NaN compares as False
