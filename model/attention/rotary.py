"""Rotary position embedding (RoFormer, https://arxiv.org/abs/2104.09864)."""

import math
from typing import Any

import torch


def rotary_frequencies(head_dim: int, theta: float, scaling: dict[str, Any] | None) -> torch.Tensor:
    """The angle per position of each pair of dimensions, fp32 [head_dim / 2].

    theta^(-2i/d) (RoFormer, https://arxiv.org/abs/2104.09864); `scaling` of rope_type llama3 stretches long
    wavelengths as Meta's Llama 3.1 does: divided by `factor` beyond original/low_freq_factor positions,
    untouched below original/high_freq_factor, interpolated between.
    """
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if scaling is None:
        return inverse
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inverse
    smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * inverse / factor + smooth * inverse


def rotary_cos_sin(
    position_ids: torch.Tensor, frequencies: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos of the angles, and sin with the sign that it has for each half, fp32 [sequence, batch, 1,
    head_dim].

    position_ids [sequence, batch]; frequencies [head_dim / 2]. A pair is a dimension and the one half a head
    behind it (Hugging Face's layout).
    """
    angles = position_ids[..., None, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, scale):
        ctx.save_for_backward(cos, sin)
        ctx.scale = scale
        return _rotate(x, cos, sin, scale)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin, ctx.scale), None, None, None


def _rotate(x, cos, sin, scale):
    wide = x.float()
    rotated = wide * cos + wide.unflatten(-1, (2, -1)).flip(-2).flatten(-2) * sin
    return (rotated if scale == 1 else rotated * scale).to(x.dtype)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """x [sequence, batch, heads, head_dim] rotated by its position and times `scale`, in fp32, then rounded
    to x's dtype. The gradient is rotated back."""
    return _Rotary.apply(x, cos, sin, scale)
