"""FLOPs of the matrix products of a micro-batch on one rank, computed from the model's shapes.

The closed formula of https://arxiv.org/abs/2001.08361 (6 x parameters x tokens), in detail. bench_compile
compares it with the products that parallel/graph/hlo.py counts in the traced graphs. Norms, rotary embedding,
softmax, the embedding (gather and scatter) and the optimizer have no matrix products.
"""

from dataclasses import replace

from torch import nn

from model.attention.blockwise import block_size, first_key
from model.config import ModelConfig
from model.decoder_layer import LlamaDecoderLayer
from model.llama import Llama
from model.lora import LoraConfig, LoraLinear
from parallel.loss import chunk_sizes
from parallel.mesh import ALONE, Mesh
from trainer.build import build_model
from trainer.config import Config


def micro_batch_flops(model: Llama, config: Config, recomputation: bool = True) -> int:
    """FLOPs of the forward and backward of one accumulation step on the rank that has this part of the model,
    with or without what the backward computes again.

    Parameters may be on any device; their requires_grad says what is trained. A pipeline stage computes its
    layers, padding layers included, and its part of the head in each of its M + P - 1 ticks, idle or not.
    """
    block = block_size(config.max_seq_length)
    count = _Count(config, recomputation, block)
    for tick in range(config.ticks):
        # A tick sends the gradient of its input to the stage before. In the first tick that input is a
        # constant; but ticks that share a graph compute what any of them needs.
        receives = config.ticks > 1 and (tick > 0 or config.graph_per_micro_batch)
        needs_grad = receives or model.model.embed_tokens.weight.requires_grad
        for layer in model.model.layers:
            needs_grad = count.layer(layer, needs_grad)
            if recomputation and config.checkpointing_mode == "full":
                count.layer(layer, False, recomputed=True)
        count.column_parallel([model.lm_head], needs_grad)
        if config.checkpointing_mode != "none":
            count.logits_again(model.lm_head)
    return count.total


def model_flops(config: Config, model_config: ModelConfig, lora: LoraConfig | None, mesh: Mesh) -> float:
    """FLOPs that the model needs for an accumulation step: a rank's share, without what the backward computes
    again and without idle ticks. Padding counts as tokens."""
    plain = replace(config, gradient_checkpointing="none", pipeline_parallel_size=1, num_microbatches=1)
    whole = build_model(plain, model_config, replace(mesh, pp=ALONE, model=mesh.tp), lora)
    return micro_batch_flops(whole, plain, recomputation=False) / mesh.pp.size()


class _Count:
    """Adds up FLOPs in `total`.

    Each method counts the forward and backward of a part of the model, or with `recomputed` only the forward,
    which the backward runs again. `needs_grad` says whether autograd computes the gradient of the part's
    input; the method returns whether it computes that of the output.
    """

    def __init__(self, config: Config, recomputation: bool, block: int):
        self.config, self.recomputation, self.block, self.total = config, recomputation, block, 0
        self.has_collectives = config.tensor_parallel_size > 1
        self.rows = config.per_device_train_batch_size // config.pipeline_microbatches

    def layer(self, layer: LlamaDecoderLayer, needs_grad: bool, recomputed: bool = False) -> bool:
        """A decoder layer. S is scores(): one product of attention, of all its blocks.

        The forward takes S for the scores and S for the weighted sum of the values, the backward S for each
        of the gradients of queries, keys, probabilities and values, after it has computed the scores again.
        """
        attention, mlp = layer.self_attn, layer.mlp
        query, key, value = self.column_parallel(
            [attention.q_proj, attention.k_proj, attention.v_proj], needs_grad, recomputed
        )
        mixed = query or key or value
        products = 2
        if not recomputed:
            products += query + key + (query or key) + value
            products += mixed and self.recomputation
        self.total += products * self.scores(attention)
        needs_grad = self.linear(attention.o_proj, mixed, recomputed) or needs_grad
        inner = any(self.column_parallel([mlp.gate_proj, mlp.up_proj], needs_grad, recomputed))
        return self.linear(mlp.down_proj, inner, recomputed, is_last=True) or needs_grad

    def column_parallel(
        self, layers: list[nn.Module], needs_grad: bool, recomputed: bool = False
    ) -> list[bool]:
        """Layers that read the same input.

        With several tensor parallel ranks, the gradient of this input goes through a collective. Where the
        collective is in the graph, the gradient is computed even if nothing reads it: graphs keep all
        collectives. It is in the graph if one of the layers has LoRA, whose gradient is part of the same
        message, and under full recomputation, which requests the gradient of every layer's input.
        """
        sends_grad = self.has_collectives and (
            self.config.checkpointing_mode == "full" or any(isinstance(layer, LoraLinear) for layer in layers)
        )
        return [self.linear(layer, needs_grad, recomputed, sends_grad=sends_grad) for layer in layers]

    def logits_again(self, head: nn.Module) -> None:
        """The logits that the backward computes again: all but the last chunk's (parallel/loss.py)."""
        weights = [getattr(head, "base_layer", head).weight]
        if isinstance(head, LoraLinear):
            weights.append(head.lora_B.weight)
        tokens = self.rows * self.config.max_seq_length
        tokens -= chunk_sizes(tokens, len(weights[0]))[-1]
        self.total += 2 * tokens * sum(weight.numel() for weight in weights)

    def scores(self, attention: nn.Module) -> int:
        """FLOPs of the rank's attention scores: 2 x rows x heads x head_dim x q x k, summed over the blocks.

        A block of q queries is multiplied with all k keys up to its last query, or with a window from
        first_key on. The causal mask saves nothing within a block.
        """
        query = getattr(attention.q_proj, "base_layer", attention.q_proj)
        length, area = self.config.max_seq_length, 0
        for first in range(0, length, self.block):
            end = min(first + self.block, length)
            area += (end - first) * (end - first_key(first, attention.kind.window))
        return 2 * self.rows * query.weight.shape[0] * area

    def linear(
        self,
        layer: nn.Module,
        needs_grad: bool,
        recomputed: bool,
        is_last: bool = False,
        sends_grad: bool = False,
    ) -> bool:
        """A linear layer and its LoRA factors. `sends_grad`: see column_parallel.

        Nothing reads the output of the last product of a recomputed layer (`is_last`), so that it is left
        out; but not where its output goes through a collective.
        """
        base, is_read = getattr(layer, "base_layer", layer), not (recomputed and is_last)
        if is_read or self.has_collectives:
            self.product(base, needs_grad or sends_grad, recomputed)
        if isinstance(layer, LoraLinear):
            self.product(layer.lora_A, needs_grad, recomputed)
            if is_read:
                self.product(layer.lora_B, True, recomputed)
        return needs_grad or sends_grad or base.weight.requires_grad or isinstance(layer, LoraLinear)

    def product(self, owner: nn.Module, needs_grad: bool, recomputed: bool) -> None:
        """The products of an input [positions, in] with the rank's part of the owner's weight [out, in].

        Each takes F = 2 x positions x in x out: one for the output, one for the gradient of the input and one
        for that of the weight, where these are computed. Under sequence parallelism a replicated weight
        (Shard.dim is None) sees only the rank's part of the positions.
        """
        weight, positions = owner.weight, self.rows * self.config.max_seq_length
        if owner.shards["weight"].dim is None and self.config.divides_sequence:
            positions //= self.config.tensor_parallel_size
        products = 1 if recomputed else 1 + needs_grad + weight.requires_grad
        self.total += 2 * positions * weight.numel() * products
