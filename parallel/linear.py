"""The matrix product of the parallel layers and of LoRA, with a backward that keeps what it needs, once."""

import torch
import torch.nn.functional as F

from parallel.recomputed import kept_for


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b: x [..., in], weight [out, in], bias [out] -> [..., out].

    The backward keeps the weight if x has a gradient, and x, or what it is computed of (`recompute`), if the
    weight trains. torch_xla's own F.linear keeps a transposed copy of the weight, and one of x for each layer
    with that input.
    """
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        trains_x, trains_weight, _ = ctx.needs_input_grad
        ctx.recomputed, kept = kept_for(x) if trains_weight else (None, ())
        ctx.save_for_backward(weight if trains_x else None, *kept)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        weight, *kept = ctx.saved_tensors
        of_weight = None
        if kept:
            x = ctx.recomputed.tensor(kept, grad) if ctx.recomputed else kept[0]
            of_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        return (
            None if weight is None else grad @ weight,
            of_weight,
            grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None,
        )
