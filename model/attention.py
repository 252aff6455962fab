"""Rotary embedding and attention for rows that hold several examples."""
import math
from typing import Any

import torch
from torch_xla.utils.checkpoint import checkpoint

BLOCK = 1024    # queries that attend at once: a tensor of scores is [heads, BLOCK, sequence]


def rotary_frequencies(head_dim: int, theta: float, scaling: dict[str, Any] | None) -> torch.Tensor:
    """The angle per position of each pair of dimensions, fp32 [head_dim / 2].

    theta^(-2i/d) (RoFormer, https://arxiv.org/abs/2104.09864); `scaling` of rope_type llama3 stretches long wavelengths as
    Meta's Llama 3.1 does: divided by `factor` beyond original/low_freq_factor positions, untouched below
    original/high_freq_factor, interpolated between.
    """
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if scaling is None:
        return inverse
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inverse
    smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * inverse / factor + smooth * inverse


def rotary_cos_sin(position_ids: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the angles, fp32 [sequence, batch, 1, head_dim], both halves alike (Hugging Face's layout).

    position_ids [sequence, batch]; frequencies [head_dim / 2].
    """
    angles = position_ids.unsqueeze(-1).float() * frequencies
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(2)
    return angles.cos(), angles.sin()


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [sequence, batch, heads, head_dim] rotated by its position, computed in fp32, in x's dtype."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def segment_masks(segment_ids: torch.Tensor) -> list[torch.Tensor]:
    """For each block of BLOCK queries, bool [batch, queries, keys]; the keys are those up to the block's end.

    Position i sees j when both belong to one segment and j is not later than i. segment_ids [batch, sequence]; padding is segment
    0 and sees itself only, so no row of the softmax is empty.
    """
    sequence = segment_ids.shape[1]
    order = torch.arange(sequence, device=segment_ids.device)
    masks = []
    for first in range(0, sequence, BLOCK):
        last = min(first + BLOCK, sequence)
        same = segment_ids[:, first:last].unsqueeze(2) == segment_ids[:, :last].unsqueeze(1)
        masks.append(same & (order[first:last].unsqueeze(1) >= order[:last].unsqueeze(0)))
    return masks


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, masks: list[torch.Tensor],
           recompute: bool = False) -> torch.Tensor:
    """Scaled dot-product attention with grouped queries; softmax in fp32.

    query [sequence, batch, heads, head_dim]; key, value [sequence, batch, kv_heads, head_dim]; `masks` of segment_masks. Returns
    [sequence, batch, heads * head_dim]. Block by block of queries, with the keys up to its end: blocks above the diagonal are not
    computed, and no tensor holds the scores of all queries. With `recompute` the backward computes a block's scores again: one
    block's are held at a time. The query heads that share a KV head form one product: nothing is repeated.
    """
    sequence, batch, heads, head_dim = query.shape
    query = query.unflatten(2, (key.shape[2], -1)).permute(1, 2, 3, 0, 4)      # [batch, kv_heads, shared, sequence, head_dim]
    key, value = key.permute(1, 2, 3, 0), value.permute(1, 2, 0, 3)
    mixed, first = [], 0
    for mask in masks:
        queries, last = mask.shape[1:]
        block = (query[..., first:last, :], key[..., :last], value[:, :, :last], mask)
        mixed.append(checkpoint(_attend_block, *block, preserve_rng_state=False) if recompute else _attend_block(*block))
        first += queries
    return torch.cat(mixed, 3).permute(3, 0, 1, 2, 4).reshape(sequence, batch, heads * head_dim)


def _attend_block(query, key, value, mask):
    """[batch, kv_heads, shared, queries, head_dim] of a query of that shape, key [batch, kv_heads, head_dim, keys] and value."""
    batch, kv_heads, shared, queries, head_dim = query.shape
    scores = (query.flatten(2, 3) @ key).float() / math.sqrt(head_dim)
    scores = scores.view(batch, kv_heads, shared, queries, -1).masked_fill(~mask[:, None, None], torch.finfo(torch.float32).min)
    weights = scores.softmax(-1).to(value.dtype).flatten(2, 3)
    return (weights @ value).view(query.shape)
