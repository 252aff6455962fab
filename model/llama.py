"""Llama 2, 3, 3.1 and 3.2, written in parallel layers, with Hugging Face's parameter names.

One rank's part of the model; with a tensor parallel group of one it is the whole model, by the same code.
"""
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch_xla.utils.checkpoint import checkpoint
from transformers import AutoConfig

from model.attention import apply_rotary, attend, rotary_cos_sin, rotary_frequencies, segment_mask
from model.files import in_one_line
from parallel.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear, divide
from parallel.mesh import ALONE, Group

LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class LlamaConfig:
    """What the architecture needs of a Hugging Face config.json; the fields have its names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    initializer_range: float

    @classmethod
    def from_pretrained(cls, directory: Path) -> "LlamaConfig":
        """Read `directory`/config.json; raises ValueError for what is no Llama, or one whose parts are not implemented."""
        if not (Path(directory) / "config.json").is_file():
            raise ValueError(f"{directory} has no config.json: a Hugging Face model directory was expected")
        try:
            config = AutoConfig.from_pretrained(directory)
        except Exception as error:      # transformers passes on whatever its checks of odd values raise
            raise ValueError(f"{directory}/config.json: not the config of a known model architecture "
                             f"({in_one_line(error)}); markstep trains LlamaForCausalLM") from None
        if config.model_type != "llama" or (config.architectures or ["LlamaForCausalLM"]) != ["LlamaForCausalLM"]:
            raise ValueError(f"{directory}/config.json: the architecture is {config.architectures or config.model_type}; "
                             "markstep trains LlamaForCausalLM")
        if config.hidden_act != "silu":
            raise ValueError(f"{directory}/config.json: hidden_act is {config.hidden_act!r}; Llama's is 'silu'")
        if getattr(config, "quantization_config", None):
            raise ValueError(f"{directory}/config.json: the model is quantized (quantization_config); plain weights are read")
        scaling = config.rope_scaling
        kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
        if kind not in ("default", "llama3"):
            raise ValueError(f"{directory}/config.json: rope_scaling of type {kind!r}; 'llama3' or none is implemented")
        values = {field.name: getattr(config, field.name) for field in fields(cls)}
        values["rope_scaling"] = {key: scaling.get(key) for key in LLAMA3_ROPE} if kind == "llama3" else None
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{directory}/config.json: {error}") from None

    def __post_init__(self):
        """Raise ValueError for values that no model can have."""
        numbers = {field.name: (getattr(self, field.name), field.type) for field in fields(self) if field.type in (int, float)}
        numbers |= {f"rope_scaling.{key}": (value, float) for key, value in (self.rope_scaling or {}).items()}
        for name, (value, kind) in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int | kind) or not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}; {'an integer' if kind is int else 'a number'} above 0 was expected")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is not divisible by num_key_value_heads "
                             f"{self.num_key_value_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embedding needs an even one")


class LlamaRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, statistics in fp32."""

    def __init__(self, size: int, eps: float, dtype, device):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


class LlamaAttention(nn.Module):
    """Self-attention with this rank's heads."""

    def __init__(self, config: LlamaConfig, **layout):
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        column = {"bias": config.attention_bias, "gather_output": False, **layout}
        self.q_proj = ColumnParallelLinear(config.hidden_size, queries, **column)
        self.k_proj = ColumnParallelLinear(config.hidden_size, keys, **column)
        self.v_proj = ColumnParallelLinear(config.hidden_size, keys, **column)
        self.o_proj = RowParallelLinear(queries, config.hidden_size, bias=config.attention_bias, input_is_parallel=True, **layout)

    def forward(self, x, cos, sin, mask):
        query, key, value = (projection(x).unflatten(-1, (-1, self.head_dim))
                             for projection in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(apply_rotary(query, cos, sin), apply_rotary(key, cos, sin), value, mask))


class LlamaMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig, **layout):
        super().__init__()
        column = {"bias": config.mlp_bias, "gather_output": False, **layout}
        self.gate_proj = ColumnParallelLinear(config.hidden_size, config.intermediate_size, **column)
        self.up_proj = ColumnParallelLinear(config.hidden_size, config.intermediate_size, **column)
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias,
                                           input_is_parallel=True, **layout)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaDecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: LlamaConfig, **layout):
        super().__init__()
        norm = {"dtype": layout["dtype"], "device": layout["device"]}
        self.self_attn = LlamaAttention(config, **layout)
        self.mlp = LlamaMLP(config, **layout)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps, **norm)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps, **norm)

    def forward(self, x, cos, sin, mask):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Embedding, decoder layers and the last norm (the name prefix `model.`)."""

    def __init__(self, config: LlamaConfig, **layout):
        super().__init__()
        self.embed_tokens = ParallelEmbedding(config.vocab_size, config.hidden_size, **layout)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, **layout) for _ in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps, dtype=layout["dtype"], device=layout["device"])


class Llama(nn.Module):
    """LlamaForCausalLM, sharded over `group`.

    Activations are of `dtype`; parameters may be kept in another (fp32 while they are trained) and are cast where they are used.
    Parameters are built uninitialised, by default on the meta device, and filled by model/weights.py.
    """

    def __init__(self, config: LlamaConfig, group: Group = ALONE, dtype: torch.dtype = torch.float32, device="meta",
                 gradient_checkpointing: bool = False):
        super().__init__()
        for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
            divide(getattr(config, field), group, f"the model's {field}")
        self.config, self.dtype, self.gradient_checkpointing = config, dtype, gradient_checkpointing
        layout = {"dtype": dtype, "device": device, "tensor_model_parallel_group": group}
        self.model = LlamaModel(config, **layout)
        self.lm_head = ColumnParallelLinear(config.hidden_size, config.vocab_size, bias=False, gather_output=False, **layout)
        frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self.register_buffer("rotary_frequencies", frequencies, persistent=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the head use the embedding's weight where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def rank_index(self) -> torch.Tensor:
        """This rank's place in the tensor parallel group, as data: integer [1] on the model's device."""
        return self.model.embed_tokens.rank_index

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
        """Logits of this rank's part of the vocabulary, [batch, sequence, vocab_size / tp], from three [batch, sequence]."""
        x = self.model.embed_tokens(input_ids).to(self.dtype)
        cos, sin = rotary_cos_sin(position_ids, self.rotary_frequencies)
        mask = segment_mask(segment_ids)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        if recompute and not x.requires_grad:
            x.requires_grad_(True)      # a re-entrant checkpoint whose input needs no gradient computes none (frozen embedding)
        for layer in self.model.layers:
            x = checkpoint(layer, x, cos, sin, mask, use_reentrant=True) if recompute else layer(x, cos, sin, mask)
        return self.lm_head(self.model.norm(x))
