"""Rotary position embedding (RoFormer, https://arxiv.org/abs/2104.09864)."""

import math
from typing import Any

import torch


def rotary_frequencies(
    head_dim: int, theta: float, scaling: dict[str, Any] | None
) -> tuple[torch.Tensor, float]:
    """(the angle per position of each pair of dimensions, fp32 [head_dim / 2]; a factor of cos and sin).

    theta^(-2i/d), or what `scaling` (rope_settings.py) makes of it, as transformers' modeling_rope_utils.py
    computes it.
    """
    powers = theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if scaling is None:
        return 1.0 / powers, 1.0
    return _SCALINGS[scaling["rope_type"]](1.0 / powers, theta, **scaling)


def _linear(inverse, theta, factor, **_):
    """All positions divided by `factor`."""
    return inverse / factor, 1.0


def _llama3(inverse, theta, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings, **_):
    """Meta's Llama 3.1 stretches long wavelengths: divided by `factor` beyond original/low_freq_factor
    positions, untouched below original/high_freq_factor, interpolated between."""
    wavelength = 2 * math.pi / inverse
    smooth = (original_max_position_embeddings / wavelength - low_freq_factor) / (
        high_freq_factor - low_freq_factor
    )
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * inverse / factor + smooth * inverse, 1.0


def _yarn(
    inverse,
    theta,
    factor,
    original_max_position_embeddings,
    beta_fast,
    beta_slow,
    attention_factor=None,
    mscale=None,
    mscale_all_dim=None,
    truncate=True,
    **_,
):
    """YaRN (https://arxiv.org/abs/2309.00071): pairs that turn more than beta_fast times within the original
    length are untouched, those with less than beta_slow divided by `factor`, interpolated between."""
    head_dim = 2 * len(inverse)

    def pair_that_turns(times):
        return (
            head_dim
            * math.log(original_max_position_embeddings / (times * 2 * math.pi))
            / (2 * math.log(theta))
        )

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(len(inverse)).float() - low) / (high - low or 0.001)
    stretched = ramp.clamp(0, 1)
    if attention_factor is None:
        attention_factor = _yarn_magnitude(factor, 1)
        if mscale and mscale_all_dim:
            attention_factor = _yarn_magnitude(factor, mscale) / _yarn_magnitude(factor, mscale_all_dim)
    return inverse / factor * stretched + inverse * (1 - stretched), attention_factor


def _yarn_magnitude(factor, scale):
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(
    inverse, theta, short_factor, factor, original_max_position_embeddings, attention_factor=None, **_
):
    """LongRoPE (https://arxiv.org/abs/2402.13753) for rows of up to the original length: each pair has a
    divisor of its own. Longer rows, which take long_factor, are refused (ModelConfig.max_positions)."""
    if attention_factor is None:
        grown = max(0.0, math.log(factor)) / math.log(original_max_position_embeddings)
        attention_factor = math.sqrt(1 + grown)
    return inverse / torch.tensor(short_factor), attention_factor


_SCALINGS = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}


def rotary_cos_sin(
    position_ids: torch.Tensor, frequencies: torch.Tensor, factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos of the angles, and sin with the sign that it has for each half, both times `factor`, fp32
    [sequence, batch, 1, head_dim].

    position_ids [sequence, batch]; frequencies [head_dim / 2]. A pair is a dimension and the one half a head
    behind it (Hugging Face's layout).
    """
    angles = position_ids[..., None, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    if factor != 1:
        cos, sin = cos * factor, sin * factor
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
