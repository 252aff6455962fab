"""The cache of keys and values of one layer, for text generation."""

import torch
import torch.nn.functional as F


class CacheUpdate:
    """One forward pass's access to the cache of a layer: writes new keys and values, and returns those to
    attend to.

    cache: keys [batch * kv_heads, head_dim, capacity] and values [batch * kv_heads, capacity, head_dim], as
    attention's products want them: what is written is used without another copy. slots: bool [batch *
    kv_heads, capacity], where the one new token of each row is written; None for a prompt, which fills the
    cache from its start. is_turn: bool [1], whether this pipeline stage may write; None with one stage.
    """

    def __init__(
        self,
        cache: tuple[torch.Tensor, torch.Tensor],
        slots: torch.Tensor | None,
        is_turn: torch.Tensor | None,
    ):
        self._cache, self._slots, self._is_turn = cache, slots, is_turn

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As model.decoder_layer.LayerCache.update; the cache changes in place."""
        heads = key.shape[1:3]
        key = self._write(self._cache[0], key.permute(1, 2, 3, 0).flatten(0, 1), 2)
        value = self._write(self._cache[1], value.permute(1, 2, 0, 3).flatten(0, 1), 1)
        return key.unflatten(0, heads).permute(3, 0, 1, 2), value.unflatten(0, heads).permute(2, 0, 1, 3)

    def _write(self, cache, new, dim):
        """Write `new`, whose dimension `dim` is the sequence; returns what to attend to, of its layout."""
        if self._slots is None:
            rest = cache.shape[dim] - new.shape[dim]
            attended, written = new, F.pad(new, (0, 0) * (2 - dim) + (0, rest))
        else:
            attended = written = torch.where(self._slots.unsqueeze(3 - dim), new, cache)
        cache.copy_(written if self._is_turn is None else torch.where(self._is_turn, written, cache))
        return attended
