"""A copy of weights that are none: an emulated trainer has nothing to keep."""

from asyncrl_runtime.weights.bucket import PublishedWeights


class EmulatedCopy:
    """Implements WeightsCopy.

    Args:
        weights: what is published; its buckets have a size, and no memory.
    """

    def __init__(self, weights: PublishedWeights) -> None:
        self.published = weights

    async def take(self) -> None:
        pass
