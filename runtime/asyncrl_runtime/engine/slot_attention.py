"""Attention over the slot cache, plugged into Hugging Face models by name."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from asyncrl_runtime.engine.cache import KvCache

ATTENTION = "asyncrl_slots"
"""A name without a mask function of its own: transformers then builds no mask."""
CALL_TOKENS = 256
"""The cost of one more call of the attention kernel, in tokens of one row that could be read in that time."""


class Segment(NamedTuple):
    """The new tokens of one row that is being filled: `start` .. `end` - 1 of its sequence."""

    row: int
    start: int
    end: int


class Window:
    """What one forward of N tokens sees of the cache: one token of each decoding row, then segments.

    Attributes:
        positions: [1, N] int64, the place of each token in its sequence.
    """

    def __init__(self, cache: KvCache, last: Tensor, segments: Sequence[Segment]) -> None:
        """
        Args:
            last: [n] int64, the position of the newest token of rows 0 .. n-1, which are decoding.
            segments: further rows, in the order of their tokens.
        """
        self.num_decoding = len(last)
        self.segments = segments
        rows = torch.arange(self.num_decoding)
        positions = last
        if segments:
            sizes = torch.tensor([s.end - s.start for s in segments])
            filled = torch.tensor([s.row for s in segments]).repeat_interleave(sizes)
            rows = torch.cat([rows, filled])
            positions = torch.cat([positions, *(torch.arange(s.start, s.end) for s in segments)])
        self.positions = positions[None]
        self._targets = rows * cache.capacity + positions
        self._cache = cache.kv
        self._flat = cache.kv.flatten(2, 3)
        if self.num_decoding:
            common, self._long = split_by_length((last + 1).tolist())
            self._decoding = cache.kv[:, :, : self.num_decoding, :common].transpose(3, 4)
            hidden = torch.arange(common) > last[:, None, None, None]
            self._mask = torch.zeros(hidden.shape, dtype=cache.kv.dtype).masked_fill_(hidden, float("-inf"))

    def store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Put the new tokens' keys and values, [N, heads, size], into their slots."""
        self._flat[layer, 0].index_copy_(0, self._targets, keys)
        self._flat[layer, 1].index_copy_(0, self._targets, values)

    def decode(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """Return [n, heads, size] for one new token of each decoding row, each over its whole sequence.

        Query heads that share a key head become its queries, which halves the time. The few rows that are
        much longer than the rest are computed again, by themselves, so that the rest need not be as long.
        """
        keys, values = self._decoding[layer]
        folded = query.reshape(query.shape[0], keys.shape[1], -1, query.shape[2])
        out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=self._mask, scale=scaling)
        for row, length in self._long:
            keys, values = self._cache[layer, :, row, :length].transpose(1, 2)[:, None]
            one = folded[row : row + 1]
            out[row] = F.scaled_dot_product_attention(one, keys, values, scale=scaling)[0]
        return out.reshape(query.shape)

    def fill(self, layer: int, segment: Segment, query: Tensor, scaling: float) -> Tensor:
        """Return [T, heads, size] for a segment's tokens, each over itself and the tokens before it."""
        keys, values = self._cache[layer, :, segment.row, : segment.end].transpose(1, 2)[:, None]
        is_first = segment.start == 0
        mask = None
        if not is_first and len(query) > 1:
            mask = torch.ones(len(query), segment.end, dtype=torch.bool).tril_(segment.start)
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            keys,
            values,
            attn_mask=mask,
            is_causal=is_first,
            scale=scaling,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)


def split_by_length(lengths: Sequence[int]) -> tuple[int, list[tuple[int, int]]]:
    """Return the length up to which all rows are read together, and (row, length) of the longer rows.

    All rows of one call are read as far as the longest of them, so with a long tail of lengths a call would
    mostly read nothing. The choice is the one that reads least, with the cost of the calls included.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    best, best_cost, alone = 0, len(lengths) * lengths[order[0]], 0
    for num_long in range(1, len(lengths)):
        alone += lengths[order[num_long - 1]] + CALL_TOKENS
        if (cost := len(lengths) * lengths[order[num_long]] + alone) < best_cost:
            best, best_cost = num_long, cost
    return lengths[order[best]], [(row, lengths[row]) for row in order[:best]]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    window: Window,
    **_: object,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention of a window's tokens, each over its own row of the cache.

    Args:
        query: [1, query heads, N, size].
        key, value: [1, key heads, N, size].

    Returns:
        [1, N, query heads, size], as transformers expects it.
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    window.store(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    queries = query[0].transpose(0, 1)
    if not window.segments:
        return window.decode(layer, queries, scaling)[None], None
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    if window.num_decoding:
        out[: window.num_decoding] = window.decode(layer, queries[: window.num_decoding], scaling)
    end = window.num_decoding
    for segment in window.segments:
        start, end = end, end + segment.end - segment.start
        out[start:end] = window.fill(layer, segment, queries[start:end], scaling)
    return out[None], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
