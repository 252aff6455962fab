"""The decoder layer of Llama and its relatives, for training and for generation with a cache."""

from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import torch
from torch import nn

from model.attention.blockwise import attend
from model.attention.flash_nki import flash_attend
from model.attention.rotary import apply_rotary
from model.config import ModelConfig
from model.layer_kinds import LayerKind
from model.norm import LlamaRMSNorm
from model.swiglu import swiglu
from parallel.layers import column_parallel


class LayerCache(Protocol):
    """The keys and values of earlier tokens, of one layer (model/cache.py has one)."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Keep new keys and values [sequence, batch, kv_heads, head_dim], and attend to all that the query
        [sequence, batch, heads, head_dim], which is scaled already, sees of them; returns [sequence * batch,
        heads * head_dim]."""


@dataclass
class LayerInputs:
    """What a layer needs to know about the tokens of a batch: its part of StageInputs."""

    cos: torch.Tensor
    sin: torch.Tensor
    masks: list[torch.Tensor] | None


class LlamaAttention(nn.Module):
    """Self-attention with this rank's heads. Where there are more ranks than KV heads, neighbours hold the
    same KV head."""

    def __init__(self, config: ModelConfig, kind: LayerKind, layers: ModuleType, **layout):
        super().__init__()
        self.head_dim, self.kind = config.head_dim, kind
        self.scale = config.attention_multiplier or config.head_dim**-0.5
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        column = {"bias": config.attention_bias or config.qkv_bias, **layout}
        replicas = max(1, layout["tensor_model_parallel_group"].size() // config.num_key_value_heads)
        self.q_proj = layers.ColumnParallelLinear(config.hidden_size, queries, **column)
        self.k_proj = layers.ColumnParallelLinear(config.hidden_size, keys, replicas=replicas, **column)
        self.v_proj = layers.ColumnParallelLinear(config.hidden_size, keys, replicas=replicas, **column)
        self.o_proj = layers.RowParallelLinear(
            queries, config.hidden_size, bias=config.attention_bias, input_is_parallel=True, **layout
        )
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm, self.k_norm = (
                LlamaRMSNorm(config.head_dim, config.rms_norm_eps, by_head=True, **layout) for _ in range(2)
            )

    def forward(self, x: torch.Tensor, inputs: LayerInputs, cache: LayerCache | None = None) -> torch.Tensor:
        """x [tokens, features] -> the same shape; with a `cache`, attention to earlier tokens, too."""
        query, key, value = (
            each.view(*inputs.cos.shape[:2], -1, self.head_dim)  # [sequence, batch, heads, head_dim]
            for each in column_parallel(x, [self.q_proj, self.k_proj, self.v_proj])
        )
        if self.q_norm is not None:
            query = self.q_norm(query.flatten(0, 2)).view(query.shape)
            key = self.k_norm(key.flatten(0, 2)).view(key.shape)
        flash = cache is None and inputs.masks is None
        # Scaled before it is rounded: no pass over the scores, no rounding more. The kernel scales itself.
        scale = self.scale / (self.head_dim**-0.5 if flash else 1)
        if self.kind.rotates:
            query = apply_rotary(query, inputs.cos, inputs.sin, scale)
            key = apply_rotary(key, inputs.cos, inputs.sin)
        else:
            query = times(query, scale)
        if flash:
            return self.o_proj(flash_attend(query, key, value))
        if cache is not None:
            return self.o_proj(cache.attend(query, key, value))
        return self.o_proj(attend(query, key, value, inputs.masks))


class LlamaMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, layers: ModuleType, **layout):
        super().__init__()
        column = {"bias": config.mlp_bias, **layout}
        self.gate_proj = layers.ColumnParallelLinear(config.hidden_size, config.intermediate_size, **column)
        self.up_proj = layers.ColumnParallelLinear(config.hidden_size, config.intermediate_size, **column)
        self.down_proj = layers.RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=config.mlp_bias,
            input_is_parallel=True,
            **layout,
        )

    def forward(self, x):
        gate, up = column_parallel(x, [self.gate_proj, self.up_proj])
        return self.down_proj(swiglu(gate, up))


class LlamaDecoderLayer(nn.Module):
    """Attention and MLP, each after a norm and added to the residual."""

    def __init__(self, config: ModelConfig, kind: LayerKind, layers: ModuleType, **layout):
        super().__init__()
        self.kind, self.residual_multiplier = kind, config.residual_multiplier
        self.self_attn = LlamaAttention(config, kind, layers, **layout)
        self.mlp = LlamaMLP(config, layers, **layout)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps, **layout)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps, **layout)

    def forward(self, x: torch.Tensor, inputs: LayerInputs, cache: LayerCache | None = None) -> torch.Tensor:
        """x [tokens, features] -> the same shape."""
        x = x + times(self.self_attn(self.input_layernorm(x), inputs, cache), self.residual_multiplier)
        return x + times(self.mlp(self.post_attention_layernorm(x)), self.residual_multiplier)


def times(x: torch.Tensor, factor: float) -> torch.Tensor:
    """x * factor; x itself where that is 1, because a product would be in the graph."""
    return x if factor == 1 else x * factor
