"""The storage of keys and values: one slot per running row, and a few prompts kept for reuse."""

from collections import OrderedDict

import torch
from torch import Tensor


class KvCache:
    """Keys and values of the running rows, dense, so that a decode step works on slices.

    Rows 0..n-1 are running; the scheduler keeps them contiguous by moving the last row into a gap. Memory
    is taken as sequences grow, and beyond a row's length it holds finite numbers, never NaN, because the
    attention multiplies them by zero.
    """

    def __init__(self, num_layers: int, num_heads: int, head_size: int, dtype: torch.dtype) -> None:
        self.kv = torch.zeros(num_layers, 2, 0, 0, num_heads, head_size, dtype=dtype)
        """The cache itself: [layers, keys and values, slots, capacity, heads, head size]."""

    @property
    def capacity(self) -> int:
        """The number of tokens that each slot can hold."""
        return self.kv.shape[3]

    def reserve(self, num_rows: int, num_tokens: int, used_rows: int, used_tokens: int) -> None:
        """Make room for `num_rows` rows of `num_tokens` tokens, at least doubling what is too small.

        Args:
            used_rows, used_tokens: the part that must be kept, as far as it exists. No more is copied, since
                zeroed memory that was never written to costs nothing.
        """
        layers, two, slots, capacity, heads, size = self.kv.shape
        if num_rows <= slots and num_tokens <= capacity:
            return
        slots_wanted = slots if num_rows <= slots else max(num_rows, 2 * slots)
        capacity_wanted = capacity if num_tokens <= capacity else max(num_tokens, 2 * capacity, 64)
        grown = self.kv.new_zeros(layers, two, slots_wanted, capacity_wanted, heads, size)
        kept = self.kv[:, :, :used_rows, :used_tokens]
        grown[:, :, : kept.shape[2], : kept.shape[3]] = kept
        self.kv = grown

    def move(self, source: int, target: int, num_tokens: int) -> None:
        self.kv[:, :, target, :num_tokens] = self.kv[:, :, source, :num_tokens]

    def export_row(self, row: int, num_tokens: int) -> Tensor:
        """Return a copy of a row's first tokens, [layers, 2, num_tokens, heads, head size]."""
        return self.kv[:, :, row, :num_tokens].clone()

    def import_row(self, row: int, kv: Tensor, num_tokens: int) -> None:
        self.kv[:, :, row, :num_tokens] = kv[:, :, :num_tokens]


class PrefixCache:
    """Prompts whose keys and values are kept for reuse; the least recently used ones are dropped first.

    The entry found for a prompt is the longest stored prompt with the same salt that it begins with. Salts
    keep apart what was computed under different weights if the cache survives an update.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self._entries: OrderedDict[tuple[str, bytes], Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, salt: str, prompt: bytes) -> Tensor | None:
        """Return the keys and values of the longest stored prefix of `prompt` (int64 ids), if any.

        They are [layers, 2, tokens, heads, head size] and may cover the whole prompt.
        """
        key = (salt, prompt)
        if key not in self._entries:
            prefixes = [k for k in self._entries if k[0] == salt and prompt.startswith(k[1])]
            if not prefixes:
                return None
            key = max(prefixes, key=lambda k: len(k[1]))
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, salt: str, prompt: bytes, kv: Tensor) -> None:
        """Keep the keys and values of a whole prompt, which has at most `max_tokens` tokens."""
        if (salt, prompt) in self._entries:
            return
        self._entries[salt, prompt] = kv
        self.num_tokens += kv.shape[2]
        while self.num_tokens > self.max_tokens:
            _, evicted = self._entries.popitem(last=False)
            self.num_tokens -= evicted.shape[2]

    def clear(self) -> None:
        self._entries.clear()
        self.num_tokens = 0
