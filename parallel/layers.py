"""Linear and embedding layers sharded over the tensor parallel group.

Names and signatures are neuronx-distributed's (parallel_layers/layers.py), as far as markstep uses them; weights have PyTorch's
layout, [out, in]. Every layer says in `shards` how its parameters are cut out of the whole: loading, saving, merging and the
gradient norm read that and know no layer by name. A layer knows its rank as data (a tensor of shape [1]), never as a constant.
"""
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from parallel.collectives import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from parallel.mesh import ALONE, Group


@dataclass(frozen=True)
class Shard:
    """Which part of a whole parameter a rank holds.

    The parameter of `global_shape` is cut into `parts` equal slices along `dim`, of which the rank holds number `index`;
    `replicas` ranks of the tensor parallel group hold the same slice. A replicated parameter has dim None and parts 1.
    """

    global_shape: tuple[int, ...]
    dim: int | None = None
    parts: int = 1
    index: int = 0
    replicas: int = 1

    @property
    def slices(self) -> tuple[slice, ...]:
        """The slice of each dimension of the whole that the rank holds."""
        whole = [slice(0, size) for size in self.global_shape]
        if self.dim is not None:
            size = self.global_shape[self.dim] // self.parts
            whole[self.dim] = slice(self.index * size, (self.index + 1) * size)
        return tuple(whole)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the slice."""
        return tuple(part.stop - part.start for part in self.slices)


def divide(size: int, group: Group, what: str) -> int:
    """size / group.size(); raises ValueError naming `what` where that is no integer."""
    if size % group.size():
        raise ValueError(f"{what} {size} is not divisible by the tensor parallel size {group.size()}")
    return size // group.size()


def named_shards(module: nn.Module, group: Group) -> Iterator[tuple[str, nn.Parameter, Shard]]:
    """(name, parameter, shard) of each parameter, a tied one once, in the module's order.

    A parameter that no parallel layer owns is replicated over the tensor parallel `group`.
    """
    seen = set()
    for prefix, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter in seen:
                continue
            seen.add(parameter)
            shard = getattr(owner, "shards", {}).get(name) or Shard(tuple(parameter.shape), replicas=group.size())
            yield (f"{prefix}.{name}" if prefix else name), parameter, shard


class ParallelLayer(nn.Module):
    """What the layers share: the group, this rank's index in it as data, and the shards of the parameters."""

    def __init__(self, group: Group | None):
        super().__init__()
        self.tensor_parallel_group = group or ALONE
        self.shards: dict[str, Shard] = {}
        self.register_buffer("rank_index", torch.tensor([self.tensor_parallel_group.rank()]), persistent=False)

    def add_parameter(self, name: str, global_shape: tuple[int, ...], dim: int | None, dtype, device) -> None:
        """Register an uninitialised parameter: the rank's slice along `dim`, or the whole where dim is None."""
        group = self.tensor_parallel_group
        parts = 1 if dim is None else group.size()
        shard = Shard(global_shape, dim, parts, 0 if dim is None else group.rank(), group.size() // parts)
        self.shards[name] = shard
        self.register_parameter(name, nn.Parameter(torch.empty(shard.shape, dtype=dtype, device=device)))


class ColumnParallelLinear(ParallelLayer):
    """y = x W^T + b with the rows of W [output_size, input_size] divided over the group.

    x [..., input_size] is replicated; y is this rank's [..., output_size / size], or with gather_output the whole. Parameters
    are used in x's dtype, whatever dtype they are kept in.
    """

    def __init__(self, input_size: int, output_size: int, bias: bool = True, gather_output: bool = True,
                 dtype: torch.dtype = torch.float32, device=None, tensor_model_parallel_group: Group | None = None):
        super().__init__(tensor_model_parallel_group)
        divide(output_size, self.tensor_parallel_group, "the output size")
        self.input_size, self.output_size, self.gather_output = input_size, output_size, gather_output
        self.add_parameter("weight", (output_size, input_size), 0, dtype, device)
        if bias:
            self.add_parameter("bias", (output_size,), 0, dtype, device)
        else:
            self.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = copy_to_tensor_model_parallel_region(x, self.tensor_parallel_group)
        y = F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        if self.gather_output:
            y = gather_from_tensor_model_parallel_region(y, self.tensor_parallel_group, self.rank_index)
        return y


class RowParallelLinear(ParallelLayer):
    """y = x W^T + b with the columns of W [output_size, input_size] divided over the group.

    x is this rank's [..., input_size / size] (input_is_parallel); y is the whole, the sum over the group.
    """

    def __init__(self, input_size: int, output_size: int, bias: bool = True, input_is_parallel: bool = False,
                 dtype: torch.dtype = torch.float32, device=None, tensor_model_parallel_group: Group | None = None):
        super().__init__(tensor_model_parallel_group)
        if not input_is_parallel:
            raise ValueError("RowParallelLinear takes an input that is divided already: pass input_is_parallel=True")
        divide(input_size, self.tensor_parallel_group, "the input size")
        self.input_size, self.output_size = input_size, output_size
        self.add_parameter("weight", (output_size, input_size), 1, dtype, device)
        if bias:
            self.add_parameter("bias", (output_size,), None, dtype, device)
        else:
            self.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = reduce_from_tensor_model_parallel_region(F.linear(x, self.weight.to(x.dtype)), self.tensor_parallel_group)
        return y if self.bias is None else y + self.bias.to(x.dtype)


def local_index(index: torch.Tensor, size: int, rank_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(index within this rank's `size` rows, or 0; whether the row is this rank's), both of index's shape."""
    local = index - rank_index * size
    inside = (local >= 0) & (local < size)
    return torch.where(inside, local, torch.zeros_like(local)), inside


class ParallelEmbedding(ParallelLayer):
    """An embedding [num_embeddings, embedding_dim] with the vocabulary divided over the group.

    ids [...] of integers -> [..., embedding_dim], the whole on every rank.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype = torch.float32, device=None,
                 tensor_model_parallel_group: Group | None = None):
        super().__init__(tensor_model_parallel_group)
        self.rows = divide(num_embeddings, self.tensor_parallel_group, "the vocabulary size")
        self.add_parameter("weight", (num_embeddings, embedding_dim), 0, dtype, device)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        local, inside = local_index(ids, self.rows, self.rank_index)
        rows = F.embedding(local, self.weight) * inside.unsqueeze(-1).to(self.weight.dtype)
        return reduce_from_tensor_model_parallel_region(rows, self.tensor_parallel_group)
