"""What happens to gradients between backward and update: reduction over data parallel ranks, the global norm, clipping."""
import torch
from torch import nn

from parallel.collectives import all_reduce, all_reduce_in_place
from parallel.layers import Shard
from parallel.mesh import Group


def reduce_gradients(parameters: list[nn.Parameter], dp: Group) -> None:
    """Sum the gradients over the data parallel ranks, in place and in one collective."""
    all_reduce_in_place([parameter.grad for parameter in parameters], dp)


def global_norm(parameters: list[nn.Parameter], shards: list[Shard], tp: Group) -> torch.Tensor:
    """The 2-norm of the gradient of the whole model, fp32, shape [1].

    Each slice counts once: the squares of one that `replicas` ranks hold are divided by that number before the sum over tp.
    """
    squares = torch.stack([parameter.grad.float().square().sum() / shard.replicas
                           for parameter, shard in zip(parameters, shards, strict=True)])
    return all_reduce(squares.sum().reshape(1), tp).sqrt()


def clip_gradients(parameters: list[nn.Parameter], norm: torch.Tensor, max_norm: float) -> None:
    """Scale the gradients by min(1, max_norm / (norm + 1e-6)) in place, as torch.nn.utils.clip_grad_norm_ does."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        parameter.grad.mul_(factor.to(parameter.grad.dtype))
