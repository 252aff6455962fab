"""The cache of keys and values of one layer, for text generation, and attention to it."""

import torch
import torch.nn.functional as F

from model.attention.blockwise import attend


class CacheUpdate:
    """One forward pass's access to the cache of a layer: writes new keys and values, and attends.

    cache: keys [batch * kv_heads, head_dim, capacity] and values [batch * kv_heads, capacity, head_dim], as
    the products want them, so that what is written is read without another copy. is_turn: bool [1], whether
    this pipeline stage may write; None with one stage.

    For a prompt, which fills the cache from its start, `slots` is None, and `masks` are those of
    segment_masks. For one token of each row, slots are bool [batch * kv_heads, capacity], where it is
    written, and the one mask is [batch * kv_heads, 1, capacity], what it sees.
    """

    def __init__(
        self,
        cache: tuple[torch.Tensor, torch.Tensor],
        slots: torch.Tensor | None,
        masks: list[torch.Tensor],
        is_turn: torch.Tensor | None,
    ):
        self._cache, self._slots, self._masks, self._is_turn = cache, slots, masks, is_turn

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """As model.decoder_layer.LayerCache.attend; the cache changes in place."""
        keys = self._write(self._cache[0], key.permute(1, 2, 3, 0).flatten(0, 1), 2)
        values = self._write(self._cache[1], value.permute(1, 2, 0, 3).flatten(0, 1), 1)
        if self._slots is None:
            return attend(query, key, value, self._masks)
        batch, _, head_dim = query.shape[1:]
        query = query.reshape(len(keys), -1, head_dim)  # [batch * kv_heads, heads that share one, head_dim]
        scores = torch.bmm(query, keys).float()
        scores = scores.masked_fill(~self._masks[0], torch.finfo(torch.float32).min)
        return torch.bmm(scores.softmax(-1).to(values.dtype), values).reshape(batch, -1)

    def _write(self, cache, new, dim):
        """Write `new`, whose sequence is in dimension `dim`; returns what the cache holds afterwards."""
        if self._slots is None:
            written = F.pad(new, (0, 0) * (2 - dim) + (0, cache.shape[dim] - new.shape[dim]))
        else:
            written = torch.where(self._slots.unsqueeze(3 - dim), new, cache)
        cache.copy_(written if self._is_turn is None else torch.where(self._is_turn, written, cache))
        return written
