"""Collectives over replica groups, and the autograd pairs that tensor and sequence parallelism are made of.

The only file that calls xm's collectives. Every one is issued with pin_layout=False: XLA:CPU's verifier
rejects a mix. In a group of one nothing is issued. The names of the autograd pairs are neuronx-distributed's
(parallel_layers/mappings.py); the sequence is dimension 0.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch_xla.core.xla_model as xm

from parallel.mesh import Group


def all_reduce(tensor: torch.Tensor, group: Group, op: str = xm.REDUCE_SUM) -> torch.Tensor:
    """The sum (or xm.REDUCE_MAX: maximum) over the group, of the same shape; not differentiable."""
    if group.size() == 1:
        return tensor
    return xm.all_reduce(op, tensor, groups=group.replica_groups, pin_layout=False)


def all_reduce_max(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """The maximum over the group; not differentiable."""
    return all_reduce(tensor, group, xm.REDUCE_MAX)


def all_gather(tensor: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """The group's tensors, concatenated along `dim`; not differentiable."""
    if group.size() == 1:
        return tensor
    return xm.all_gather(tensor, dim=dim, groups=group.replica_groups, pin_layout=False)


def reduce_scatter(tensor: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """This rank's part, along `dim`, of the sum over the group; not differentiable."""
    if group.size() == 1:
        return tensor
    return xm.reduce_scatter(
        xm.REDUCE_SUM,
        tensor,
        scale=1.0,
        scatter_dim=dim,
        shard_count=group.size(),
        groups=group.replica_groups,
        pin_layout=False,
    )


def permute(tensor: torch.Tensor, group: Group, shift: int) -> torch.Tensor:
    """The tensor of the rank `shift` places before this one in the group, which is a ring; not
    differentiable."""
    if group.size() == 1:
        return tensor
    pairs = [
        [rank, ranks[(place + shift) % len(ranks)]]
        for ranks in group.replica_groups
        for place, rank in enumerate(ranks)
    ]
    return xm.collective_permute(tensor, pairs)


class _Exchange(torch.autograd.Function):
    """collective(tensor, group); in the backward dual(gradient, group), its transpose."""

    @staticmethod
    def forward(ctx, tensor, group, collective, dual):
        ctx.group, ctx.dual = group, dual
        return collective(tensor, group)

    @staticmethod
    def backward(ctx, grad):
        return ctx.dual(grad, ctx.group), None, None, None


def _exchange(tensor, group, collective, dual):
    return tensor if group.size() == 1 else _Exchange.apply(tensor, group, collective, dual)


def _same(tensor, group):
    return tensor.view_as(tensor)  # autograd asks for a tensor of its own


_gather_sequence, _scatter_sequence = partial(all_gather, dim=0), partial(reduce_scatter, dim=0)


def copy_to_tensor_model_parallel_region(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """The tensor itself; in the backward its gradient is summed over the group."""
    return _exchange(tensor, group, _same, all_reduce)


def reduce_from_tensor_model_parallel_region(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum over the group; in the backward the gradient passes unchanged."""
    return _exchange(tensor, group, all_reduce, _same)


def gather_from_sequence_parallel_region(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """[sequence / size, ...] -> [sequence, ...]; in the backward the gradients are summed and each rank keeps
    its positions."""
    return _exchange(tensor, group, _gather_sequence, _scatter_sequence)


def reduce_scatter_to_sequence_parallel_region(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """[sequence, ...] -> this rank's [sequence / size, ...] of the sum; in the backward the gradient is
    gathered."""
    return _exchange(tensor, group, _scatter_sequence, _gather_sequence)


def sum_over_stages(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum over the group, of which each rank has its own use: in the backward the gradients are summed,
    too."""
    return _exchange(tensor, group, all_reduce, all_reduce)


def coalesced(
    collective: Callable[[torch.Tensor, Group], torch.Tensor], tensors: list[torch.Tensor], group: Group
) -> list[torch.Tensor]:
    """The collective of each tensor [..., n], all in one message: latency is what a small one costs."""
    if group.size() == 1 or len(tensors) == 1:
        return [collective(tensor, group) for tensor in tensors]
    return list(collective(torch.cat(tensors, -1), group).split([tensor.shape[-1] for tensor in tensors], -1))
