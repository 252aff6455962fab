"""Llama 2, 3, 3.1 and 3.2, written in parallel layers, with Hugging Face's parameter names.

One rank's part of the model; with a tensor parallel group of one it is the whole model, by the same code.
"""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn
from torch_xla.utils.checkpoint import checkpoint

from model.attention.blockwise import attend, segment_masks
from model.attention.flash_nki import flash_attend
from model.attention.rotary import apply_rotary, rotary_cos_sin, rotary_frequencies
from model.config import ModelConfig
from model.lora import TokenSeeds
from parallel import layers as native
from parallel.collectives import sum_over_stages
from parallel.layers import ParallelLayer, column_parallel
from parallel.mesh import ALONE, Group
from parallel.pipeline import ONE_STAGE, Pipeline


class LlamaRMSNorm(ParallelLayer):
    """x / sqrt(mean(x^2) + eps) * weight of x [tokens, size], statistics in fp32."""

    def __init__(
        self,
        size: int,
        eps: float,
        dtype,
        device,
        sequence_parallel_enabled: bool = False,
        tensor_model_parallel_group: Group | None = None,
    ):
        super().__init__(tensor_model_parallel_group, sequence_parallel_enabled)
        self.eps = eps
        self.add_parameter("weight", (size,), None, dtype, device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.float()
        scale = torch.rsqrt((wide * wide).sum(-1, keepdim=True) / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale * weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        grad, normed, of_x, of_weight = grad.float(), x.float() * scale, None, None
        if ctx.needs_input_grad[0]:
            along = grad * weight.float()
            of_x = ((along - normed * ((along * normed).sum(-1, keepdim=True) / x.shape[-1])) * scale).to(
                x.dtype
            )
        if ctx.needs_input_grad[1]:
            of_weight = (grad * normed).sum(0).to(weight.dtype)
        return of_x, of_weight, None


class LlamaAttention(nn.Module):
    """Self-attention with this rank's heads. Where there are more ranks than KV heads, neighbours hold the
    same KV head."""

    def __init__(self, config: ModelConfig, recompute: bool, layers: ModuleType, **layout):
        super().__init__()
        self.head_dim, self.recompute = config.head_dim, recompute
        queries, keys = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        )
        column = {"bias": config.attention_bias, **layout}
        replicas = max(1, layout["tensor_model_parallel_group"].size() // config.num_key_value_heads)
        self.q_proj = layers.ColumnParallelLinear(config.hidden_size, queries, **column)
        self.k_proj = layers.ColumnParallelLinear(config.hidden_size, keys, replicas=replicas, **column)
        self.v_proj = layers.ColumnParallelLinear(config.hidden_size, keys, replicas=replicas, **column)
        self.o_proj = layers.RowParallelLinear(
            queries, config.hidden_size, bias=config.attention_bias, input_is_parallel=True, **layout
        )

    def heads(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries and keys, both rotated, and values of x [tokens, features], [sequence, batch, heads,
        head_dim] of each."""
        query, key, value = (
            each.view(*cos.shape[:2], -1, self.head_dim)
            for each in column_parallel(x, [self.q_proj, self.k_proj, self.v_proj])
        )
        return apply_rotary(query, cos, sin), apply_rotary(key, cos, sin), value

    def forward(self, x, cos, sin, masks):
        query, key, value = self.heads(x, cos, sin)
        if masks is None:
            return self.o_proj(flash_attend(query, key, value))
        return self.o_proj(attend(query, key, value, masks, self.recompute and torch.is_grad_enabled()))


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
        return self.down_proj(F.silu(gate) * up)


class LlamaDecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: ModelConfig, recompute_attention: bool, layers: ModuleType, **layout):
        super().__init__()
        self.self_attn = LlamaAttention(config, recompute_attention, layers, **layout)
        self.mlp = LlamaMLP(config, layers, **layout)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps, **layout)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps, **layout)

    def forward(self, x, cos, sin, masks):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, masks)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Embedding, decoder layers and the last norm (the name prefix `model.`)."""

    def __init__(
        self, config: ModelConfig, recompute_attention: bool, layers: ModuleType, pipeline: Pipeline, **layout
    ):
        super().__init__()
        self.embed_tokens = layers.ParallelEmbedding(
            config.vocab_size, config.hidden_size, parameter_group=pipeline.vocabulary, **layout
        )
        self.layers = nn.ModuleList()  # of this stage, by their numbers in the whole model
        for number in pipeline.slots(config.num_hidden_layers):
            self.layers.add_module(
                str(number), LlamaDecoderLayer(config, recompute_attention, layers, **layout)
            )
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps, **layout)


class Llama(nn.Module):
    """LlamaForCausalLM, sharded over `group`; under `sequence_parallel` norms and residuals are divided over
    it too.

    Activations and parameters are of `dtype`. `gradient_checkpointing` is none (activations are kept for the
    backward), selective (attention scores are computed again) or full (each decoder layer is). `layers` has
    the parallel layers: parallel.layers, or parallel.nxd. `flash_attention` is right where
    model/attention/flash_nki.py says so. Of several stages of a `pipeline`, the rank has the layers of one.
    Parameters are built uninitialised, by default on the meta device, and filled by model/weights/sources.py.
    Raises ValueError where the groups cannot divide the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        group: Group = ALONE,
        dtype: torch.dtype = torch.float32,
        device="meta",
        gradient_checkpointing: str = "none",
        sequence_parallel: bool = False,
        layers: ModuleType = native,
        flash_attention: bool = False,
        pipeline: Pipeline = ONE_STAGE,
    ):
        super().__init__()
        for field in ("num_attention_heads", "intermediate_size", "vocab_size"):
            if getattr(config, field) % group.size():
                raise ValueError(
                    f"the model's {field} {getattr(config, field)} is not divisible by the tensor parallel size "
                    f"{group.size()}"
                )
        parts = group.size() * pipeline.group.size()
        if config.vocab_size % parts:
            raise ValueError(
                f"the model's vocab_size {config.vocab_size} is not divisible by {parts}, the tensor parallel size "
                f"{group.size()} x {pipeline.group.size()} pipeline stages, which divide it"
            )
        kv_heads = config.num_key_value_heads
        if kv_heads % group.size() and group.size() % kv_heads:
            raise ValueError(
                f"the model's num_key_value_heads {kv_heads} neither divides the tensor parallel size "
                f"{group.size()} nor is divisible by it"
            )
        self.config, self.dtype, self.recompute_layers, self.pipeline = (
            config,
            dtype,
            gradient_checkpointing == "full",
            pipeline,
        )
        self.flash_attention, self.token_seeds = flash_attention, TokenSeeds()
        layout = {
            "dtype": dtype,
            "device": device,
            "sequence_parallel_enabled": sequence_parallel,
            "tensor_model_parallel_group": group,
        }
        self.model = LlamaModel(config, gradient_checkpointing == "selective", layers, pipeline, **layout)
        self.lm_head = layers.ColumnParallelLinear(
            config.hidden_size, config.vocab_size, bias=False, parameter_group=pipeline.vocabulary, **layout
        )
        for number, layer in self.model.layers.named_children():
            beside = pipeline.beside(int(number), config.num_hidden_layers)
            for name, module in layer.named_modules():
                module.spare = int(number) >= config.num_hidden_layers
                module.beside = [f"model.layers.{other}.{name}" for other in beside]
        self.model.norm.spare = self.lm_head.reads_spare = not pipeline.is_last
        self.register_buffer("stage_index", torch.tensor([pipeline.group.rank()]), persistent=False)
        frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self.register_buffer("rotary_frequencies", frequencies, persistent=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the head use the embedding's weight where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def rank_index(self) -> torch.Tensor:
        """This rank's place among those that divide the vocabulary, as data: integer [1] on the model's
        device."""
        return self.model.embed_tokens.rank_index

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, segment_ids: torch.Tensor
    ) -> torch.Tensor:
        """Logits of this rank's part of the vocabulary, [batch, sequence, its part], from three [batch,
        sequence].

        Of one stage; several pass their batches on in ticks (model/stage.py).
        """
        return self.head(
            self.stage(self.embed(input_ids), *self.places(position_ids, segment_ids)), len(input_ids)
        )

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[batch, sequence] -> [tokens, features]."""
        return sum_over_stages(self.model.embed_tokens(input_ids.t()).flatten(0, 1), self.pipeline.group)

    def head(self, x: torch.Tensor, batch: int) -> torch.Tensor:
        """Logits of this rank's part of the vocabulary, [batch, sequence, its part], from the last stage's x."""
        [logits] = column_parallel(
            self.model.norm(x),
            [self.lm_head],
            lambda tensor: self.pipeline.from_last_stage(tensor, self.stage_index),
        )
        return logits.unflatten(0, (-1, batch)).transpose(0, 1)

    def places(
        self, position_ids: torch.Tensor, segment_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor] | None]:
        """What attention has to know of rows [batch, sequence]: cos, sin and masks
        (model/attention/blockwise.py)."""
        return *rotary_cos_sin(position_ids.t(), self.rotary_frequencies), (
            None if self.flash_attention else segment_masks(segment_ids)
        )

    def stage(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, masks: list[torch.Tensor] | None
    ) -> torch.Tensor:
        """This stage's layers: x [tokens, features] -> the same shape."""
        seeds = self.token_seeds.values

        def run(x, layer, cos, sin, masks):
            self.token_seeds.values = seeds  # here, because a recomputation has to find them too
            return layer(x, cos, sin, masks)

        recompute = self.recompute_layers and torch.is_grad_enabled()
        if recompute and not x.requires_grad:
            x.requires_grad_(
                True
            )  # a re-entrant checkpoint whose input needs no gradient computes none (frozen embedding)
        for layer in self.model.layers:
            before, given = x, (x, layer, cos, sin, masks)
            x = checkpoint(run, *given, preserve_rng_state=False) if recompute else run(*given)
        return self.pipeline.pass_by_spare(before, x, self.config.num_hidden_layers, self.stage_index)
