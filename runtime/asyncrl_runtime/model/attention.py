"""Causal attention over packed sequences, for any Hugging Face causal LM that uses the attention interface.

A micro-batch is one row of T tokens in which segments (sequences) lie end to end. Attention within each
segment costs the sum of squared segment lengths, not T squared, and few calls: segments of similar length
share one `scaled_dot_product_attention` and are padded on the right to the longest of them. Padding needs no
mask: under causality no real token looks to its right, and what padding rows compute is dropped, so that
their gradient is zero.

A model is loaded with `attn_implementation=IMPLEMENTATION` and called with `attention_plan=plan`. No mask
function is registered under that name, so transformers builds no mask at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

IMPLEMENTATION = "asyncrl_segments"

MAX_PADDED_AREA = 1.2
"""The largest factor by which padding may grow the area of the score matrices. Measured on CPUs, forward and
backward: 1.05 makes as many calls as there are lengths, and 1.5 costs a quarter more than 1.2 on long-tailed
lengths."""


@dataclass(frozen=True)
class LengthBucket:
    """Neighboring segments that share one attention call."""

    num_segments: int
    length: int
    """The length of the longest segment, to which the others are padded."""
    num_tokens: int
    """The number of real tokens, which lie next to each other in the packed row."""
    pad: Tensor | None
    """[num_segments * length] int64: the bucket's token at each place of the padded batch (padding repeats
    the last token of its segment); None if all segments are equally long."""
    unpad: Tensor | None
    """[num_tokens] int64: the place of each token in the padded batch; None if there is no padding."""

    def to(self, device: torch.device) -> "LengthBucket":
        if self.pad is None or self.unpad is None:
            return self
        return replace(self, pad=self.pad.to(device), unpad=self.unpad.to(device))


@dataclass(frozen=True)
class AttentionPlan:
    """How attention over one packed row is done; made once per micro-batch and used by every layer."""

    buckets: tuple[LengthBucket, ...]
    max_length: int

    def to(self, device: torch.device) -> "AttentionPlan":
        return replace(self, buckets=tuple(bucket.to(device) for bucket in self.buckets))


def plan_attention(lengths: Sequence[int]) -> AttentionPlan:
    """Group the segments of a packed row into buckets.

    Args:
        lengths: lengths of the segments, each at least 1, in the order in which they are packed. Any order
            is correct; longest first gives the fewest buckets, since a bucket is a run of neighbors.
    """
    buckets, start = [], 0
    while start < len(lengths):
        stop = _end_of_run(lengths, start)
        buckets.append(_build_bucket(lengths[start:stop]))
        start = stop
    return AttentionPlan(tuple(buckets), max_length=max(lengths))


def _end_of_run(lengths: Sequence[int], start: int) -> int:
    """Return the end (exclusive) of the longest run from `start` whose padding stays within bounds."""
    longest, real_area, stop = 0, 0, start
    while stop < len(lengths):
        longest = max(longest, lengths[stop])
        real_area += lengths[stop] ** 2
        if (stop + 1 - start) * longest**2 > MAX_PADDED_AREA * real_area:
            break
        stop += 1
    return stop


def _build_bucket(lengths: Sequence[int]) -> LengthBucket:
    num_segments, longest, num_tokens = len(lengths), max(lengths), sum(lengths)
    if num_segments * longest == num_tokens:
        return LengthBucket(num_segments, longest, num_tokens, pad=None, unpad=None)
    length = torch.tensor(lengths)[:, None]
    first = length.cumsum(0) - length
    place = torch.arange(longest)[None, :]
    pad = first + torch.minimum(place, length - 1)
    unpad = (place < length).flatten().nonzero().squeeze(1)
    return LengthBucket(num_segments, longest, num_tokens, pad.flatten(), unpad)


def segment_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attention_plan: AttentionPlan,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each segment; the signature is that of transformers' attention interface.

    There is no dropout, whatever the model's config says: passes over the same tokens must give the same
    log-probs, or every ratio would be noise.

    Args:
        query: [1, heads, T, d].
        key: [1, key heads, T, d]; fewer heads than `query` under grouped-query attention.
        value: as `key`.
        attention_mask: None, since the plan says what a mask would say.
        attention_plan: the plan for the row's segments; their lengths sum to T.

    Returns:
        [1, T, heads, d], and no attention weights.

    Raises:
        ValueError: the model needs another kind of attention (a window that would cut, capped scores).
    """
    if sliding_window is not None and attention_plan.max_length > sliding_window:
        raise ValueError(
            f"sequence of {attention_plan.max_length} tokens under a sliding window of {sliding_window}: "
            "packed attention has no window"
        )
    if softcap is not None or attention_mask is not None:
        raise ValueError("packed attention supports neither capped scores nor a mask")
    # With tokens first, a token's heads are one block of memory, which index_select copies as such. There is
    # one split per tensor, not one slice per bucket: each slice would have a full-size zero gradient.
    sizes = [bucket.num_tokens for bucket in attention_plan.buckets]
    queries, keys, values = (torch.split(x[0].transpose(0, 1), sizes) for x in (query, key, value))
    outputs = [
        _attend(bucket, q, k, v, scaling)
        for bucket, q, k, v in zip(attention_plan.buckets, queries, keys, values, strict=True)
    ]
    return torch.cat(outputs)[None], None


def _attend(bucket: LengthBucket, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Return [num_tokens, heads, d] for tensors of [num_tokens, heads or key heads, d]."""
    if bucket.pad is not None:
        query, key, value = (x.index_select(0, bucket.pad) for x in (query, key, value))
    query, key, value = (
        x.reshape(bucket.num_segments, bucket.length, *x.shape[1:]).transpose(1, 2)
        for x in (query, key, value)
    )
    output = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    tokens = output.transpose(1, 2).flatten(0, 1)
    return tokens if bucket.unpad is None else tokens.index_select(0, bucket.unpad)


AttentionInterface.register(IMPLEMENTATION, segment_attention)
