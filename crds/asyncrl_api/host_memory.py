"""The host memory that a trainer needs for copies of what it trains. Pure."""

from typing import NamedTuple

from asyncrl_api.job import Spec


class HostMemory(NamedTuple):
    """What the copy takes from which engines get weights."""

    share_bytes: int
    """The copy of each rank's share."""
    bucket_bytes: int
    """What rank 0 has beside it: two buckets that travel, and one that it receives."""


def host_memory(spec: Spec, num_ranks: int) -> HostMemory | None:
    """Return what the copies take; None if the size of what is trained is not known from the manifest.

    Args:
        num_ranks: the ranks of the trainer.
    """
    if not spec.model.parameter_count or spec.training.trains_adapters:
        return None
    num_bytes = spec.model.parameter_count * (2 if spec.model.dtype == "BFloat16" else 4)
    bucket = min(num_bytes, spec.weight_sync.bucket_megabytes * 2**20)
    return HostMemory(-(-num_bytes // num_ranks), 3 * bucket)
