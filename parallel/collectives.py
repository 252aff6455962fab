"""Collectives over replica groups, and the autograd pairs that tensor parallelism is made of.

The only file that calls xm's collectives. Every one is issued with pin_layout=False: XLA:CPU's verifier rejects a mix. In a group
of one nothing is issued. The names of the autograd pairs are neuronx-distributed's (parallel_layers/mappings.py).
"""
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


def all_reduce_in_place(tensors: list[torch.Tensor], group: Group) -> None:
    """Replace each tensor by its sum over the group, in one collective."""
    if group.size() > 1 and tensors:
        xm.all_reduce(xm.REDUCE_SUM, tensors, groups=group.replica_groups, pin_layout=False)


def all_gather(tensor: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """The group's tensors, concatenated along `dim`; not differentiable."""
    if group.size() == 1:
        return tensor
    return xm.all_gather(tensor, dim=dim, groups=group.replica_groups, pin_layout=False)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        return all_reduce(tensor, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group, index):
        ctx.width = tensor.shape[-1]
        ctx.save_for_backward(index)
        return all_gather(tensor, group, dim=-1)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        columns = index * ctx.width + torch.arange(ctx.width, device=grad.device)
        return grad.index_select(-1, columns), None, None


def copy_to_tensor_model_parallel_region(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """The tensor itself; in the backward its gradient is summed over the group."""
    return tensor if group.size() == 1 else _Copy.apply(tensor, group)


def reduce_from_tensor_model_parallel_region(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum over the group; in the backward the gradient passes unchanged."""
    return tensor if group.size() == 1 else _Reduce.apply(tensor, group)


def gather_from_tensor_model_parallel_region(tensor: torch.Tensor, group: Group, index: torch.Tensor) -> torch.Tensor:
    """The group's tensors side by side in the last dimension; in the backward each rank keeps its own columns.

    `index` is this rank's place in the group, a tensor of shape [1]: as data, so that all ranks trace one graph.
    """
    return tensor if group.size() == 1 else _Gather.apply(tensor, group, index)
