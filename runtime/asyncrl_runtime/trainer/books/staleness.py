"""What of a prompt group may be trained at a version, and which groups form the next batch. Pure.

The gate (tickets.py) bounds what is started; this module checks what is trained. Both are in
journey 1 of docs/architecture.md.
"""

from collections.abc import Callable, Iterable, Mapping
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
    return min(sampled.version, *cuts) if cuts else sampled.version


def span_staleness(sample: Sample, version: int, began: Mapping[int, int]) -> tuple[int, ...]:
    """Return for each version span `version` minus the version that sampled its tokens."""
    return tuple(version - surviving_version(span.policy_version, began) for span in sample.version_spans)


@dataclass(frozen=True)
class LiveSample:
    """A sample that stays in its group. Its arrays are made when they are asked for, and kept nowhere."""

    sample: Sample
    by_span: tuple[int, ...]
    """The staleness of each version span."""
    oldest: int | None
    """The highest staleness of tokens in the loss; None if no token is masked as stale."""

    @property
    def staleness(self) -> NDArray[np.int32]:
        """[num_tokens] the staleness of each token of the response, sampled or not."""
        ends = [span.end for span in self.sample.version_spans]
        return np.repeat(np.array(self.by_span, dtype=np.int32), np.diff(ends, prepend=0))

    @property
    def loss_mask(self) -> NDArray[np.bool_]:
        """[num_tokens] the tokens that the policy sampled and that are not masked as stale."""
        sampled = self.sample.mask()
        if self.oldest is None or max(self.by_span) <= self.oldest:
            return sampled
        return sampled & (self.staleness <= self.oldest)


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
    live, num_masked, num_in_loss = [], 0, 0
    for sample in group.samples:
        by_span, num_sampled = span_staleness(sample, version, began), sample.num_sampled
        num_too_old = 0
        if max(by_span) > rule.max_versions:
            masked = LiveSample(sample, by_span, rule.max_versions)
            num_too_old = num_sampled - int(masked.loss_mask.sum())
        if rule.on_exceed == "Drop" and num_too_old:
            continue
        is_masked = rule.on_exceed == "Mask" and num_too_old > 0
        live.append(LiveSample(sample, by_span, rule.max_versions if is_masked else None))
        num_masked += num_too_old if is_masked else 0
        num_in_loss += num_sampled - (num_too_old if is_masked else 0)
    if len(live) < min(2, group.group_size) or num_in_loss == 0:
        return Discard(group.ticket, "stale")
    rewards = {s.sample.reward for s in live}
    if sample_filter == "DropUniformGroups" and len(rewards) == 1:
        return Discard(group.ticket, "uniform")
    num_dropped = len(group.samples) - len(live)
    return LiveGroup(group.ticket, tuple(live), num_dropped, num_masked)


def form_batch(
    arrived: Iterable[Group],
    verdict_on: Callable[[Group], LiveGroup | Discard],
    *,
    batch_size: int,
    freshest_first: bool,
) -> tuple[list[LiveGroup] | None, list[Discard]]:
    """Return the next batch, or None while too few groups have arrived, and what must be discarded.

    The oldest tickets come first, so that long answers are not pushed out by short ones, or the newest. A
    group behind a full batch is not looked at: it may be fit at no later version, or may go on waiting.

    Args:
        verdict_on: `assess` at the version that the batch is for.
    """
    ordered = sorted(arrived, key=lambda group: group.ticket, reverse=freshest_first)
    batch: list[LiveGroup] = []
    discards: list[Discard] = []
    for group in ordered:
        verdict = verdict_on(group)
        if isinstance(verdict, Discard):
            discards.append(verdict)
            continue
        batch.append(verdict)
        if len(batch) == batch_size:
            return batch, discards
    return None, discards
