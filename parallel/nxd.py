"""The layers of parallel/layers.py, computed by those of neuronx-distributed (0.17 or later), and its groups.

Each class is one of ours: it has our parameters, their shards and rank_index, so LoRA, the reduction of
gradients, clipping, ZeRO-1 and checkpoints know no difference. For a forward pass it lends its parameters to
a layer of neuronx-distributed that has none of its own, as [tokens, 1, features], with arguments that avoid
what was found wrong in 0.18 (tests/parallel/test_nxd.py shows each):

- Without sequence parallelism the gradient of a column-parallel layer's bf16 input is reduced in a copy, and
  the copy dropped, unless `reduce_dtype` is the layer's dtype.
- An embedding's rank is a constant of its graph unless `use_spmd_rank` makes it data; and with a
  `sequence_dimension` of 1 it leaves out the sum over the ranks.
- GQAQKVColumnParallelLinear sums the gradients of a replicated KV head over ranks that at TP 4 on trn1 are in
  different tensor parallel groups. Here a KV head is replicated by a column-parallel layer of as many times
  the width, filled as the shards say.
- parallel_cross_entropy has no ignore_index and changes the logits, and `.to("xla")` drops the attributes
  that it gives to parameters: ours needs neither.

Column-parallel layers that read the same input would meet once each; here they enter together, by its
mappings.
"""

from dataclasses import dataclass

import torch
from neuronx_distributed.parallel_layers import layers as nxd
from neuronx_distributed.parallel_layers import mappings, parallel_state
from torch.distributed import ProcessGroup

from parallel import layers
from parallel.collectives import coalesced
from parallel.mesh import Group, Mesh


@dataclass(frozen=True)
class NxdGroup(Group):
    """A group with neuronx-distributed's handle of it."""

    process_group: ProcessGroup


def create_mesh(
    rank: int, world_size: int, tensor_parallel_size: int = 1, pipeline_parallel_size: int = 1
) -> Mesh:
    """The mesh that neuronx-distributed makes of the world: on trn1, TP 4 is strided within the node.

    The process group must have been initialised. All ranks meet here, in a small graph of their own that
    initialises the collectives. Raises ValueError where the world cannot be divided.
    """
    if pipeline_parallel_size > 1:
        raise ValueError("neuronx-distributed's layers are used with one pipeline stage")
    Mesh.create(rank, world_size, tensor_parallel_size)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel_size)
    tp = NxdGroup(
        parallel_state.get_tensor_model_parallel_replica_groups(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_group(),
    )
    dp = Group(parallel_state.get_data_parallel_replica_groups(), parallel_state.get_data_parallel_rank())
    return Mesh(rank, world_size, tp, dp, Group([[each] for each in range(world_size)], 0), tp)


class _Lending:
    """A parallel layer of ours that computes with one of neuronx-distributed."""

    def hold(self, kind: type, *sizes: int, **arguments) -> None:
        """Make the layer that computes, of the same group and dtype. It is no submodule: its parameters are
        never ours."""
        meta = torch.device("meta")
        with meta:  # its weight would be drawn at random, whole, on every rank
            layer = kind(
                *sizes,
                device=meta,
                dtype=self.weight.dtype,
                sequence_parallel_enabled=self.sequence_parallel_enabled,
                tensor_model_parallel_group=self.tensor_parallel_group.process_group,
                **arguments,
            )
        self._held = (layer,)

    @property
    def lent(self) -> torch.nn.Module:
        """The layer that computes, with our parameters."""
        [layer] = self._held
        layer.sequence_parallel_enabled = self.sequence_parallel_enabled  # which generation turns off
        layer.weight = self.weight
        if hasattr(layer, "bias"):
            layer.bias = self.bias
        return layer

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T by neuronx-distributed's autograd function, in which the ranks do not meet."""
        layer = self.lent
        return layer._forward_impl(
            input=x.unsqueeze(1),
            weight=layer.weight,
            bias=None,
            async_grad_allreduce=False,
            sequence_parallel_enabled=False,
            sequence_dimension=0,
            autograd_func_class=layer.autograd_func_class,
            process_group=layer.tensor_parallel_group,
            reduce_dtype=layer.reduce_dtype,
        ).squeeze(1)


class ColumnParallelLinear(_Lending, layers.ColumnParallelLinear):
    """As parallel.layers.ColumnParallelLinear."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        device=None,
        sequence_parallel_enabled: bool = False,
        tensor_model_parallel_group: NxdGroup | None = None,
        replicas: int = 1,
        parameter_group: NxdGroup | None = None,
        pad: bool = False,
    ):
        super().__init__(
            input_size,
            output_size,
            bias,
            dtype,
            device,
            sequence_parallel_enabled,
            tensor_model_parallel_group,
            replicas,
            parameter_group,
            pad,
        )
        self.hold(
            nxd.ColumnParallelLinear,
            input_size,
            len(self.weight) * self.tensor_parallel_group.size(),
            bias=bias,
            gather_output=False,
            sequence_dimension=0,
            reduce_dtype=dtype,
        )

    def gather_input(self, tensor, group):
        if self.sequence_parallel_enabled:
            return mappings.gather_from_sequence_parallel_region(tensor, process_group=group.process_group)
        return mappings.copy_to_tensor_model_parallel_region(tensor, process_group=group.process_group)

    @staticmethod
    def matmul(x, layers):
        products = [layer.multiply(x) for layer in layers]
        return [
            y if layer.bias is None else y + layer.bias for y, layer in zip(products, layers, strict=True)
        ]

    def forward(self, x):
        return self.lent(x.unsqueeze(1)).squeeze(1)


class RowParallelLinear(_Lending, layers.RowParallelLinear):
    """As parallel.layers.RowParallelLinear."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        input_is_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
        device=None,
        sequence_parallel_enabled: bool = False,
        tensor_model_parallel_group: NxdGroup | None = None,
    ):
        super().__init__(
            input_size,
            output_size,
            bias,
            input_is_parallel,
            dtype,
            device,
            sequence_parallel_enabled,
            tensor_model_parallel_group,
        )
        self.hold(
            nxd.RowParallelLinear,
            input_size,
            output_size,
            bias=bias,
            input_is_parallel=True,
            sequence_dimension=0,
            reduce_dtype=dtype,
        )

    def forward(self, x, *partial_sums):
        if not partial_sums:
            return self.lent(x.unsqueeze(1)).squeeze(1)
        y, *sums = coalesced(
            lambda tensor, _: self.lent._rpl_maybe_reduce_output(tensor),
            [self.multiply(x), *partial_sums],
            self.tensor_parallel_group,
        )
        return [y if self.bias is None else y + self.bias, *sums]


class ParallelEmbedding(_Lending, layers.ParallelEmbedding):
    """As parallel.layers.ParallelEmbedding."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype = torch.float32,
        device=None,
        sequence_parallel_enabled: bool = False,
        tensor_model_parallel_group: NxdGroup | None = None,
        parameter_group: NxdGroup | None = None,
        pad: bool = False,
    ):
        super().__init__(
            num_embeddings,
            embedding_dim,
            dtype,
            device,
            sequence_parallel_enabled,
            tensor_model_parallel_group,
            parameter_group,
            pad,
        )
        padded = len(self.weight) * self.tensor_parallel_group.size()
        self.hold(nxd.ParallelEmbedding, padded, embedding_dim, use_spmd_rank=True)
        [layer] = self._held
        layer.rank_util.get_rank = lambda: self.rank_index

    def forward(self, ids):
        # Under sequence parallelism it takes [batch, sequence] and exchanges the two before it divides the
        # sequence.
        return self.lent(ids.t() if self.sequence_parallel_enabled else ids)
