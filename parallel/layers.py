"""Linear and embedding layers sharded over the tensor parallel group, with or without sequence parallelism.

Names and signatures are neuronx-distributed's (parallel_layers/layers.py), as far as markstep uses them;
weights have PyTorch's layout, [out, in]. Activations are [tokens, features], the first tokens of all rows
before the second ones: a part of the sequence is one piece of them, and no product has to be reshaped. Every
layer says in `shards` how its parameters are cut out of the whole: loading, saving, merging, the reduction of
gradients and their norm read that and know no layer by name. A layer knows its rank as data (a tensor of
shape [1]), never as a constant.

Between a row-parallel layer and the next column-parallel one every rank has all positions, or under sequence
parallelism (https://arxiv.org/abs/2205.05198) its [sequence / size]: the first ends with a reduce-scatter in
place of an all-reduce, and the second begins with an all-gather.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import nn

from parallel.collectives import (
    coalesced,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from parallel.linear import linear
from parallel.mesh import ALONE, Group, Mesh
from parallel.shard import Shard, divide

create_mesh = Mesh.create  # parallel/nxd.py has one of its own


class ParallelLayer(nn.Module):
    """The base of all parallel layers: the group, and the shards of the parameters.

    `parameter_group` divides the parameters where that is not the tensor parallel group alone: a vocabulary
    is divided over pipeline stages, too. `has_adapter`: see column_parallel.

    With pipeline stages (parallel/pipeline.py): the parameters of a layer that `is_padding` exist only so
    that all ranks have the same graph; `input_is_padding` means that its input comes from such a layer;
    `counterparts` are the names of the layers in the same position of the other stages.
    """

    is_padding = input_is_padding = has_adapter = False
    counterparts: Sequence[str] = ()

    def __init__(
        self,
        group: Group | None,
        sequence_parallel_enabled: bool = False,
        parameter_group: Group | None = None,
    ):
        super().__init__()
        self.tensor_parallel_group, self.sequence_parallel_enabled = group or ALONE, sequence_parallel_enabled
        self.parameter_group = parameter_group or self.tensor_parallel_group
        self.shards: Mapping[str, Shard] = MappingProxyType({})  # read-only: replays need not compare it

    def add_rank_index(self, group: Group) -> None:
        """Register `rank_index`: this rank's place in the group as data, integer [1]."""
        self.register_buffer("rank_index", torch.tensor([group.rank()]), persistent=False)

    def add_parameter(
        self,
        name: str,
        global_shape: tuple[int, ...],
        dim: int | None,
        dtype,
        device,
        replicas: int = 1,
        pad: bool = False,
        partial: bool = False,
    ) -> None:
        """Register an uninitialised parameter: the rank's slice along `dim`, or the whole where dim is None.

        A slice may be held by `replicas` neighbours, each of which uses it for other heads. A whole parameter
        is held by all, and used for all positions, or under sequence parallelism for the rank's own, or
        where it is `partial` for the rank's own heads. `pad`: rows need not divide; the last ranks then have
        rows more than the whole, which are 0 (Shard).
        """
        size, rank = self.parameter_group.size(), self.parameter_group.rank()
        if dim is None:
            partial = (partial or self.sequence_parallel_enabled) and size > 1
            shard = Shard(global_shape, replicas=size, partial=partial)
        else:
            parts = divide(size, replicas, "the tensor parallel size")
            if not pad:
                divide(global_shape[dim], parts, "the size")
            shard = Shard(global_shape, dim, parts, rank // replicas, replicas, partial=replicas > 1)
        self.shards = MappingProxyType({**self.shards, name: shard})
        empty = torch.empty(shard.local_shape, dtype=dtype, device=device)
        self.register_parameter(name, nn.Parameter(empty))


class ColumnParallelLinear(ParallelLayer):
    """y = x W^T + b with the rows of W [output_size, input_size] divided over the group.

    x [tokens, input_size] is replicated, or under sequence parallelism the rank's [tokens / size,
    input_size]; y is this rank's [tokens, output_size * replicas / size]. With `replicas`, so many neighbours
    hold the same rows (the heads of keys and values, where there are more ranks than heads). With `pad`, rows
    of zeros are added where the ranks do not divide output_size: y has as many columns more, which are 0.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        device=None,
        sequence_parallel_enabled: bool = False,
        tensor_model_parallel_group: Group | None = None,
        replicas: int = 1,
        parameter_group: Group | None = None,
        pad: bool = False,
    ):
        super().__init__(tensor_model_parallel_group, sequence_parallel_enabled, parameter_group)
        self.add_rank_index(self.tensor_parallel_group)
        self.input_size, self.output_size, self.replicas, self.pad = input_size, output_size, replicas, pad
        self.add_parameter("weight", (output_size, input_size), 0, dtype, device, replicas, pad)
        if bias:
            self.add_parameter("bias", (output_size,), 0, dtype, device, replicas, pad)
        else:
            self.bias = None

    def gather_input(self, x: torch.Tensor, group: Group) -> torch.Tensor:
        """x of this rank's positions -> x of all positions. In the backward its gradient is summed over the
        group."""
        if self.sequence_parallel_enabled:
            return gather_from_sequence_parallel_region(x, group)
        return copy_to_tensor_model_parallel_region(x, group)

    @staticmethod
    def matmul(x: torch.Tensor, layers: list["ColumnParallelLinear"]) -> list[torch.Tensor]:
        """The y of each layer, of an x of all positions. The caller sums the gradient of x over the group
        (gather_input)."""
        products = linear(x, *(layer.weight for layer in layers))
        return [
            y if layer.bias is None else y + layer.bias for y, layer in zip(products, layers, strict=True)
        ]

    def factors(self, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The output of a layer without bias, in parts: it is the sum of a W^T over these (a, W)."""
        return [(x, self.weight)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return column_parallel(x, [self])[0]


def column_parallel(
    x: torch.Tensor, layers: list[nn.Module], receive: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """The outputs of several column-parallel layers with the same input x, which is gathered once for all of
    them (gather_inputs)."""
    x, low_rank_of = gather_inputs(x, layers, receive)
    bases = [layer.base_layer if layer.has_adapter else layer for layer in layers]
    outputs = dict(zip(layers, bases[0].matmul(x, bases), strict=True))
    for layer, low_rank in low_rank_of.items():
        outputs[layer] = layer.add_update(outputs[layer], low_rank)
    return list(outputs.values())


def gather_inputs(
    x: torch.Tensor, layers: list[nn.Module], receive: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> tuple[torch.Tensor, dict[nn.Module, torch.Tensor]]:
    """The inputs of column-parallel layers: (x of all positions, of each layer with an adapter its narrow
    tensor).

    A layer that `has_adapter` (LoRA's) computes the narrow tensor from this rank's positions of x first, by
    `low_rank_inputs(x, layers)`. It is gathered in the same message as x, and its `add_update` adds what
    comes of it to the output of its `base_layer`. `receive` is applied to the message before it is gathered:
    it brings it from another pipeline stage.
    """
    adapted = [layer for layer in layers if layer.has_adapter]
    low_rank = adapted[0].low_rank_inputs(x, adapted) if adapted else []

    def gather(message, group):
        return layers[0].gather_input(receive(message) if receive else message, group)

    x, *low_rank = coalesced(gather, [x, *low_rank], layers[0].tensor_parallel_group)
    return x, dict(zip(adapted, low_rank, strict=True))


class RowParallelLinear(ParallelLayer):
    """y = x W^T + b with the columns of W [output_size, input_size] divided over the group.

    x is this rank's [tokens, input_size / size] (input_is_parallel); y is the sum over the group, [tokens,
    output_size], or under sequence parallelism the rank's [tokens / size, output_size] of it.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        input_is_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
        device=None,
        sequence_parallel_enabled: bool = False,
        tensor_model_parallel_group: Group | None = None,
    ):
        super().__init__(tensor_model_parallel_group, sequence_parallel_enabled)
        if not input_is_parallel:
            raise ValueError(
                "RowParallelLinear takes an input that is divided already: pass input_is_parallel=True"
            )
        self.input_size, self.output_size = input_size, output_size
        self.add_parameter("weight", (output_size, input_size), 1, dtype, device)
        if bias:
            self.add_parameter("bias", (output_size,), None, dtype, device)
        else:
            self.bias = None

    def forward(self, x: torch.Tensor, *partial_sums: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """y; or [y, sums] where `partial_sums` [tokens, n] are summed over the group in the same message."""
        y, *sums = reduce_output([*linear(x, self.weight), *partial_sums], self)
        y = y if self.bias is None else y + self.bias
        return [y, *sums] if partial_sums else y


def reduce_output(tensors: list[torch.Tensor], layer: ParallelLayer) -> list[torch.Tensor]:
    """The sum over the group of each tensor [tokens, n]; under sequence parallelism, this rank's positions of
    it."""
    collective = (
        reduce_scatter_to_sequence_parallel_region
        if layer.sequence_parallel_enabled
        else reduce_from_tensor_model_parallel_region
    )
    return coalesced(collective, tensors, layer.tensor_parallel_group)


def local_index(
    index: torch.Tensor, size: int, rank_index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(index within this rank's `size` rows, or 0; whether the row is this rank's), both of index's shape."""
    local = index - rank_index * size
    inside = (local >= 0) & (local < size)
    return torch.where(inside, local, torch.zeros_like(local)), inside


class ParallelEmbedding(ParallelLayer):
    """An embedding [num_embeddings, embedding_dim] with the vocabulary divided over the group.

    ids [sequence, batch] of integers -> [sequence, batch, embedding_dim], or under sequence parallelism the
    rank's positions. Of a vocabulary divided over a larger `parameter_group` (whose index `rank_index` is),
    the rest of the sum is the caller's. With `pad`, rows of zeros are added where the ranks do not divide it.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype = torch.float32,
        device=None,
        sequence_parallel_enabled: bool = False,
        tensor_model_parallel_group: Group | None = None,
        parameter_group: Group | None = None,
        pad: bool = False,
    ):
        super().__init__(tensor_model_parallel_group, sequence_parallel_enabled, parameter_group)
        self.add_rank_index(self.parameter_group)
        self.add_parameter("weight", (num_embeddings, embedding_dim), 0, dtype, device, pad=pad)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        local, inside = local_index(ids, self.weight.shape[0], self.rank_index)
        rows = F.embedding(local, self.weight) * inside.unsqueeze(-1).to(self.weight.dtype)
        return reduce_output([rows], self)[0]
