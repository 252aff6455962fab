"""Rotary embedding and attention for rows that hold several examples."""
import math
from typing import Any

import torch


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
    """cos and sin of the angles, fp32 [batch, sequence, 1, head_dim], both halves alike (Hugging Face's layout)."""
    angles = position_ids.unsqueeze(-1).float() * frequencies
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(2)
    return angles.cos(), angles.sin()


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [batch, sequence, heads, head_dim] rotated by its position, computed in fp32, in x's dtype."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def segment_mask(segment_ids: torch.Tensor) -> torch.Tensor:
    """bool [batch, sequence, sequence]: position i sees j when both belong to one segment and j is not later than i.

    segment_ids [batch, sequence]; padding is segment 0 and sees itself only, so no row of the softmax is empty.
    """
    order = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    same = segment_ids.unsqueeze(2) == segment_ids.unsqueeze(1)
    return same & (order.unsqueeze(1) >= order.unsqueeze(0))


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Scaled dot-product attention with grouped queries; softmax in fp32.

    query [batch, sequence, heads, head_dim]; key, value [batch, sequence, kv_heads, head_dim]; mask [batch, sequence, sequence].
    Returns [batch, sequence, heads * head_dim]. The query heads that share a KV head form one product: nothing is repeated.
    """
    batch, sequence, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    shared = heads // kv_heads
    query = query.view(batch, sequence, kv_heads, shared, head_dim).permute(0, 2, 3, 1, 4)
    query = query.reshape(batch, kv_heads, shared * sequence, head_dim)
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    scores = (query @ key.transpose(2, 3)).float() / math.sqrt(head_dim)
    scores = scores.view(batch, kv_heads, shared, sequence, sequence)
    scores = scores.masked_fill(~mask[:, None, None], torch.finfo(torch.float32).min)
    weights = scores.softmax(-1).to(value.dtype).view(batch, kv_heads, shared * sequence, sequence)
    mixed = (weights @ value).view(batch, kv_heads, shared, sequence, head_dim)
    return mixed.permute(0, 3, 1, 2, 4).reshape(batch, sequence, heads * head_dim)
