"""FLOPs of the products of a micro-batch on one rank, from the model's shapes alone: what
parallel/graph/hlo.py counts in the graph.

A product of [positions, in] and a weight [out, in] takes F = 2 x positions x in x out. Each linear layer, and
each factor of LoRA, takes F in the forward, F for the gradient of its input where that is computed, and F for
that of its weight where it is trained: the 6 x parameters x tokens of https://arxiv.org/abs/2001.08361, and 4
x of frozen ones. Of T tensor parallel ranks each has a part of `in` or `out`; the factor that is replicated
(Shard.dim None) sees the rank's positions, under sequence parallelism tokens / T, and all others see all. The
gradient of the input is computed where something below is trained; and of column-parallel layers where
several ranks meet in front of them (collectives, and what they need, are not left out of a graph) if one of
those that read the same input has LoRA, which crosses in the same message, or if layers are recomputed, which
asks for the gradient of each one's input.

Attention: a block of q queries, of which the last sees k keys, takes S = 2 x rows x heads / T x q x k x
head_dim for the scores and S for their mix of values; the backward S for the gradient of each of queries,
keys, probabilities and values. The mask saves no FLOPs within a block.

Recomputation adds, if `selective`, S for each block that has a backward; if `full`, every layer's forward,
but for what only the layer's output needs: the second factor of down_proj, and of a lone rank down_proj (of
several they meet behind it). Of a pipeline, the layers are those of a stage, its spare slot included; they
and the head work in M + P - 1 ticks on rows / M each, idle or not, and the gradient of what they are given is
always computed; where a step is one graph, of the first tick only if the embedding is trained.

Norms, rotary embedding, softmax, the embedding (gather and scatter) and the update have no products.
"""

from torch import nn

from model.attention.blockwise import block_size
from model.llama import Llama, LlamaDecoderLayer
from model.lora import LoraLinear
from trainer.config import Config


def micro_batch_flops(model: Llama, config: Config) -> int:
    """Of forward and backward; `model` (the rank's, on any device) says which parameters are trained."""
    count = _Count(config)
    count.rows = config.per_device_train_batch_size // config.pipeline_microbatches
    for tick in range(config.ticks):
        flows = (
            config.ticks > 1
            and (tick > 0 or config.graph_per_micro_batch)
            or model.model.embed_tokens.weight.requires_grad
        )
        for layer in model.model.layers:
            flows = count.layer(layer, flows)
            if config.checkpointing_mode == "full":
                count.layer(layer, False, recomputed=True)
        count.columns([model.lm_head], flows)
    return count.total


class _Count:
    """Adds up in `total`. What `flows` says: whether the gradient of the input is computed; methods return it
    of the output."""

    def __init__(self, config: Config):
        self.total, self.config, self.several = 0, config, config.tensor_parallel_size > 1
        self.rows = config.per_device_train_batch_size

    def layer(self, layer: LlamaDecoderLayer, flows: bool, recomputed: bool = False) -> bool:
        attention, mlp = layer.self_attn, layer.mlp
        query, key, value = self.columns(
            [attention.q_proj, attention.k_proj, attention.v_proj], flows, recomputed
        )
        mixed = query or key or value
        times = 2
        if not recomputed:
            scores_again = mixed and self.config.checkpointing_mode == "selective"
            times += query + key + (query or key) + value + scores_again
        self.total += times * self.scores(attention)
        flows = self.linear(attention.o_proj, mixed, recomputed) or flows
        inner = any(self.columns([mlp.gate_proj, mlp.up_proj], flows, recomputed))
        return self.linear(mlp.down_proj, inner, recomputed, last=True) or flows

    def columns(self, layers: list[nn.Module], flows: bool, recomputed: bool = False) -> list[bool]:
        """Of layers that read the same input."""
        met = self.several and (
            self.config.checkpointing_mode == "full" or any(isinstance(layer, LoraLinear) for layer in layers)
        )
        return [self.linear(layer, flows, recomputed, met=met) for layer in layers]

    def scores(self, attention: nn.Module) -> int:
        """S of all blocks of queries."""
        query = getattr(attention.q_proj, "base_layer", attention.q_proj)
        length, area = self.config.max_seq_length, 0
        for first in range(0, length, block_size(length)):
            until = min(first + block_size(length), length)
            area += (until - first) * until
        return 2 * self.rows * query.weight.shape[0] * area

    def linear(
        self, layer: nn.Module, flows: bool, recomputed: bool, last: bool = False, met: bool = False
    ) -> bool:
        """`last`: of a recomputed layer nothing reads the output. `met`: the gradient that flows to where the
        ranks meet."""
        base, needed = getattr(layer, "base_layer", layer), not (recomputed and last)
        if needed or self.several:
            self.product(base, flows or met, recomputed)
        if isinstance(layer, LoraLinear):
            self.product(layer.lora_A, flows, recomputed)
            if needed:
                self.product(layer.lora_B, True, recomputed)
        return flows or met or base.weight.requires_grad or isinstance(layer, LoraLinear)

    def product(self, owner: nn.Module, flows: bool, recomputed: bool) -> None:
        """Of the owner's weight and its input."""
        weight, positions = owner.weight, self.rows * self.config.max_seq_length
        if owner.shards["weight"].dim is None and self.config.divides_sequence:
            positions //= self.config.tensor_parallel_size
        self.total += 2 * positions * weight.numel() * (1 if recomputed else 1 + flows + weight.requires_grad)
