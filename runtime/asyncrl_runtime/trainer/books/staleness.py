"""What of a prompt group may be trained at a version, and which groups form the next batch. Pure.

The gate (tickets.py) bounds what is started; this module checks what is trained. Both are in
journey 1 of docs/architecture.md.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from asyncrl_runtime.contract.messages import Group, PolicyVersion, Sample, Tombstone, unusable_number
from asyncrl_runtime.trainer.books.tickets import Discard


class StalenessRule(Protocol):
    """`spec.staleness`."""

    @property
    def max_versions(self) -> int: ...
    @property
    def on_exceed(self) -> Literal["Mask", "Drop", "Keep"]: ...
    @property
    def order(self) -> Literal["OldestFirst", "FreshestFirst"]: ...


def surviving_version(sampled: PolicyVersion, began: Mapping[int, int]) -> int:
    """Return the version of the surviving history that `sampled` counts as.

    An attempt that began at version b abandoned whatever earlier attempts had published beyond b: those
    weights are not ancestors of today's. Tokens sampled with them count as sampled where the histories
    part.

    Args:
        sampled: the version that the server attested.
        began: the version at which each attempt began new steps (attempt -> version).
    """
    cuts = [version for attempt, version in began.items() if attempt > sampled.attempt]
    return min([sampled.version, *cuts])


def token_staleness(sample: Sample, version: int, began: Mapping[int, int]) -> NDArray[np.int32]:
    """Return [num_tokens] int32: `version` minus the version that sampled the token."""
    result = np.empty(sample.num_tokens, dtype=np.int32)
    start = 0
    for span in sample.version_spans:
        result[start : span.end] = version - surviving_version(span.policy_version, began)
        start = span.end
    return result


@dataclass(frozen=True)
class LiveSample:
    """A sample that stays in its group."""

    sample: Sample
    staleness: NDArray[np.int32]
    """[num_tokens] the staleness of each token of the response, sampled or not."""
    loss_mask: NDArray[np.bool_]
    """[num_tokens] the tokens that the policy sampled and that are not masked as stale."""


@dataclass(frozen=True)
class LiveGroup:
    """A group that can be trained at one version."""

    ticket: int
    samples: tuple[LiveSample, ...]
    num_dropped_samples: int = 0
    num_masked_tokens: int = 0


def reject(group: Group | Tombstone, sample_filter: str) -> Discard | None:
    """Return why a group can be trained at no version, or None. That is known on arrival."""
    if isinstance(group, Tombstone):
        return Discard(group.ticket, group.reason)
    if any(map(cannot_be_trained, group.samples)):
        return Discard(group.ticket, "unusable_number")
    if len(group.samples) < min(2, group.group_size):
        return Discard(group.ticket, "failed")
    rewards = {sample.reward for sample in group.samples}
    if sample_filter == "DropUniformGroups" and len(rewards) == 1:
        return Discard(group.ticket, "uniform")
    return None


def cannot_be_trained(sample: Sample) -> str:
    """Return why no step may be recorded with this sample, in words; empty if one may.

    A worker refuses such numbers itself, but a stream may hold what an earlier version of it has stored.
    """
    if sample.temperature <= 0:
        return f"sample {sample.index} has temperature {sample.temperature}"
    return unusable_number(sample)


def assess(
    group: Group, version: int, rule: StalenessRule, began: Mapping[int, int], sample_filter: str
) -> LiveGroup | Discard:
    """Apply the staleness rule to a group that is to be trained at `version`.

    A group left with fewer than two samples (one where the group has one), or with no token in the loss,
    is discarded.
    """
    if (rejected := reject(group, sample_filter)) is not None:
        return rejected
    live, num_masked = [], 0
    for sample in group.samples:
        staleness, sampled = token_staleness(sample, version, began), sample.mask()
        too_old = sampled & (staleness > rule.max_versions)
        if rule.on_exceed == "Drop" and too_old.any():
            continue
        keep = sampled & ~too_old if rule.on_exceed == "Mask" else sampled
        num_masked += int(sampled.sum() - keep.sum())
        live.append(LiveSample(sample, staleness, keep))
    if len(live) < min(2, group.group_size) or not any(s.loss_mask.any() for s in live):
        return Discard(group.ticket, "stale")
    rewards = {s.sample.reward for s in live}
    if sample_filter == "DropUniformGroups" and len(rewards) == 1:
        return Discard(group.ticket, "uniform")
    num_dropped = len(group.samples) - len(live)
    return LiveGroup(group.ticket, tuple(live), num_dropped, num_masked)


def form_batch(
    arrived: Iterable[Group],
    *,
    version: int,
    batch_size: int,
    rule: StalenessRule,
    began: Mapping[int, int],
    sample_filter: str,
) -> tuple[list[LiveGroup] | None, list[Discard]]:
    """Return the next batch, or None while too few groups have arrived, and what must be discarded.

    The oldest tickets come first, so that long answers are not pushed out by short ones; with
    `FreshestFirst` the newest come first.
    """
    ordered = sorted(arrived, key=lambda g: g.ticket, reverse=rule.order == "FreshestFirst")
    batch: list[LiveGroup] = []
    discards: list[Discard] = []
    for group in ordered:
        verdict = assess(group, version, rule, began, sample_filter)
        if isinstance(verdict, Discard):
            discards.append(verdict)
            continue
        batch.append(verdict)
        if len(batch) == batch_size:
            return batch, discards
    return None, discards
