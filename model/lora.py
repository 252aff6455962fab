"""LoRA (https://arxiv.org/abs/2106.09685) on column- and row-parallel layers.

y = W x + (alpha / r) B A dropout(x), with alpha / sqrt(r) for rsLoRA (https://arxiv.org/abs/2312.03732). Of
the pair, the factor that has the divided dimension is divided with it, and the other is replicated. The ranks
communicate between A and B, where the tensors are r wide, in the message that the base layer sends anyway: no
collective is added. The replicated factor is used for the rank's own positions, as a norm's weight is.
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from parallel.collectives import keep_apart
from parallel.layers import ColumnParallelLinear, ParallelLayer, RowParallelLinear, column_parallel
from parallel.linear import linear
from parallel.mesh import Group
from parallel.recomputed import kept_for, restore
from parallel.shard import Shard

MASK = 0x7FFFFFFF  # the 31 bits of an int32 that is not negative


@dataclass(frozen=True)
class LoraConfig:
    """peft's settings of the same names. target_modules: Hugging Face module names, or their last parts."""

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: tuple[str, ...]
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


def hash_token_seeds(row_seeds: torch.Tensor, sequence: int) -> torch.Tensor:
    """The dropout seed of each token, a hash of its row and position.

    row_seeds [batch], 31 bits each -> int32 [sequence, batch] on the same device.
    """
    position = torch.arange(sequence, device=row_seeds.device, dtype=torch.int32)
    return _mix(((position * 0x1E3779B1) & MASK).unsqueeze(1) ^ _mix(row_seeds.to(torch.int32)).unsqueeze(0))


class TokenSeeds:
    """The dropout seeds of the batch that is being computed, shared by all LoRA layers of a model."""

    values: torch.Tensor | None = None

    def __init__(self, dropout: float = 0.0):
        """dropout: the probability with which the layers drop a feature."""
        self.dropout = dropout

    @contextmanager
    def during(self, values: torch.Tensor | None) -> Iterator[None]:
        """Within this context LoRA layers drop features by these seeds (hash_token_seeds), int32 [sequence,
        batch]."""
        self.values, before = values, self.values
        try:
            yield
        finally:
            self.values = before


class LoraLinear(nn.Module):
    """A parallel layer with a low-rank update: `base_layer.*`, `lora_A.weight` and `lora_B.weight`."""

    has_adapter = True

    def __init__(
        self,
        base_layer: ColumnParallelLinear | RowParallelLinear,
        config: LoraConfig,
        name: str,
        seeds: TokenSeeds,
    ):
        super().__init__()
        self.base_layer, self.seeds = base_layer, seeds
        self.scaling, self.dropout = config.scaling, config.lora_dropout
        self.by_row = isinstance(base_layer, RowParallelLinear)
        self.tensor_parallel_group = base_layer.tensor_parallel_group
        self.sequence_parallel_enabled = base_layer.sequence_parallel_enabled
        self.lora_A, self.lora_B = (
            ParallelLayer(self.tensor_parallel_group, self.sequence_parallel_enabled, group)
            for group in (self.tensor_parallel_group, base_layer.parameter_group)
        )
        self.lora_A.is_padding = base_layer.is_padding or base_layer.input_is_padding
        self.lora_B.is_padding = base_layer.is_padding
        how = (base_layer.weight.dtype, base_layer.weight.device)
        if self.by_row:
            self.lora_A.add_parameter("weight", (config.r, base_layer.input_size), 1, *how)
            self.lora_B.add_parameter("weight", (base_layer.output_size, config.r), None, *how)
        else:
            self.lora_A.add_parameter("weight", (config.r, base_layer.input_size), None, *how)
            self.lora_B.add_parameter(
                "weight", (base_layer.output_size, config.r), 0, *how, base_layer.replicas, base_layer.pad
            )
        if self.dropout:
            features = self.lora_A.shards["weight"].slices[1]
            feature = torch.arange(features.start, features.stop, dtype=torch.int32)
            hashes = ((feature * 0x35EBCA6B) ^ (zlib.crc32(name.encode()) & MASK)) & MASK
            self.register_buffer("feature_seeds", hashes, persistent=False)

    @property
    def drops(self) -> bool:
        """Whether features of the update's input are zeroed now."""
        return self.training and self.dropout > 0

    @staticmethod
    def low_rank_inputs(x: torch.Tensor, layers: list["LoraLinear"]) -> list[torch.Tensor]:
        """A dropout(x) of each layer, [tokens of x, r].

        Without dropout it is one product for all layers: r alone is too narrow for a fast one.
        """
        if len(layers) == 1 or layers[0].drops:
            return [layer._low_rank_input(x) for layer in layers]
        factors = [layer.lora_A.weight for layer in layers]
        return list(linear(x, torch.cat(factors))[0].split([len(factor) for factor in factors], -1))

    def gather_input(self, x: torch.Tensor, group: Group) -> torch.Tensor:
        """As the base layer's: x of this rank's positions -> x of all positions (column-parallel layers
        only)."""
        return self.base_layer.gather_input(x, group)

    def factors(self, x: torch.Tensor, low_rank: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The layer's output in parts, as the base layer's (column-parallel layers only)."""
        return [*self.base_layer.factors(x), (low_rank, self.lora_B.weight * self.scaling)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.by_row:
            y, low_rank = self.base_layer(x, *self.low_rank_inputs(x, [self]))
            return self.add_update(y, low_rank)
        return column_parallel(x, [self])[0]

    def add_update(self, y: torch.Tensor, low_rank: torch.Tensor) -> torch.Tensor:
        """The base layer's y [tokens, out] and the update of `low_rank` [tokens, r], both of all
        positions."""
        # B is scaled because it is small, and transposed before: then the product that gives its gradient is
        # [r, out], which is fast.
        return torch.addmm(y, low_rank, self.lora_B.weight.t() * self.scaling)

    def _low_rank_input(self, x):
        if not self.drops:
            return linear(x, self.lora_A.weight)[0]
        return _DroppedLinear.apply(x, self.lora_A.weight, self.seeds.values, self._keep, 1 - self.dropout)

    def _keep(self, token_seeds):
        if self.sequence_parallel_enabled and not self.by_row:  # x has this rank's positions only
            size = self.tensor_parallel_group.size()
            token_seeds = token_seeds.unflatten(0, (size, -1)).index_select(0, self.base_layer.rank_index)
        return keep_mask(token_seeds.flatten(), self.feature_seeds, self.dropout)


class _DroppedLinear(torch.autograd.Function):
    """dropout(x) W^T, whose backward computes what is kept, the mask keep(token_seeds), again."""

    @staticmethod
    def forward(ctx, x, weight, token_seeds, keep, probability):
        ctx.recomputed, kept = kept_for(x)
        ctx.save_for_backward(weight, token_seeds, *kept)
        ctx.keep, ctx.probability = keep, probability
        return F.linear(x * keep(token_seeds).to(x.dtype) / probability, weight)

    @staticmethod
    def backward(ctx, grad):
        weight, token_seeds, *kept = ctx.saved_tensors
        token_seeds = token_seeds.clone()
        keep_apart([grad.clone(), token_seeds])  # or the compiler would keep the forward's mask
        mask, x = ctx.keep(token_seeds).to(grad.dtype), restore(ctx.recomputed, kept, grad)
        of_weight = grad.t() @ (x * mask / ctx.probability)
        return (grad @ weight) * mask / ctx.probability, of_weight, None, None, None


def keep_mask(token_seeds: torch.Tensor, feature_seeds: torch.Tensor, probability: float) -> torch.Tensor:
    """bool [..., features]: False with `probability`; a hash of 31-bit seeds, int32 [...] of tokens and
    [features].

    No generator: the mask of a feature and position is the same whichever rank has them, in a recomputation,
    and after a resume.
    """
    return _mix(token_seeds.unsqueeze(-1) ^ feature_seeds) >= int(probability * 2**31)


def _mix(x: torch.Tensor) -> torch.Tensor:
    # The finaliser "lowbias32" (C. Wellons, https://nullprogram.com/blog/2018/07/31/) in 31 bits: torch_xla's
    # >> is a division, and that is a shift only of numbers that are not negative. int32 products wrap.
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x046CA68B) & MASK
    return x ^ (x >> 16)


def add_lora(model: nn.Module, config: LoraConfig) -> TokenSeeds:
    """Put LoRA on the target modules and freeze everything else, in place.

    Where a module of one pipeline stage is a target, its counterparts on the other stages get a padding LoRA,
    whose factors and gradients are 0. Raises ValueError for a target that names no parallel linear layer.
    Returns the seeds that dropout reads: set them (`TokenSeeds.during`) around a forward pass in training.
    """
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ColumnParallelLinear | RowParallelLinear)
    }
    for target in config.target_modules:
        if not any(
            _matches(each, [target])
            for name, module in linear.items()
            for each in (name, *module.counterparts)
        ):
            known = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise ValueError(f"the model has no linear layer {target!r}; it has {', '.join(known)}")
    seeds = model.token_seeds = TokenSeeds(config.lora_dropout)
    model.requires_grad_(False)
    for name, module in linear.items():
        if any(_matches(each, config.target_modules) for each in (name, *module.counterparts)):
            if name == "lm_head" and model.config.tie_word_embeddings:
                raise ValueError(
                    "lm_head shares its weight with the embedding in this model "
                    "(tie_word_embeddings), so it cannot have an update of its own"
                )
            added = LoraLinear(module, config, name, seeds)
            if not _matches(name, config.target_modules):
                added.lora_A.is_padding = added.lora_B.is_padding = True
            model.set_submodule(name, added)
    return seeds


def _matches(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith("." + target) for target in targets)


def hf_name(name: str) -> str:
    """The Hugging Face name of a parameter of the model that LoRA was added to."""
    return name.replace(".base_layer.", ".")


def is_lora(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def generator_of(name: str, seed: int) -> torch.Generator:
    """A generator for this name: what it draws depends on neither the topology nor the order of calls."""
    return torch.Generator().manual_seed(
        zlib.crc32(f"{seed}/{name}".encode())
    )  # of a seed, torch's takes 32 bits


def initial_factor(name: str, shard: Shard, seed: int) -> torch.Tensor:
    """The first value of a factor, this rank's slice, fp32: peft's kaiming_uniform_(a=sqrt(5)) for A, zeros
    for B.

    Drawn over the whole shape, so that every topology has the same.
    """
    if ".lora_B." in name:
        return torch.zeros(shard.shape)
    bound = shard.global_shape[1] ** -0.5
    whole = torch.empty(shard.global_shape).uniform_(-bound, bound, generator=generator_of(name, seed))
    return whole[shard.slices].clone()


def lora_delta(factor_a: torch.Tensor, factor_b: torch.Tensor, config: LoraConfig) -> torch.Tensor:
    """scaling * B A in fp32, [out, in]: what merging adds to the base weight. factor_a [r, in], factor_b
    [out, r]."""
    return (factor_b.float() @ factor_a.float()) * config.scaling
