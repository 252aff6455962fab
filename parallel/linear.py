"""The matrix products of the parallel layers and of LoRA, with a backward that keeps what it needs, once."""

import torch
import torch.nn.functional as F

from parallel.recomputed import kept_for, restore


def linear(x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x W^T for each of the weights: x [..., in], W [out, in] -> [..., out].

    The backward keeps the weights if x has a gradient, and x, or what it is computed of (`recompute`), if a
    weight trains. torch_xla's own F.linear keeps a transposed copy of each weight, and one of x.
    """
    if x.dim() == 2:
        return _Linear.apply(x, *weights)
    return tuple(y.unflatten(0, x.shape[:-1]) for y in _Linear.apply(x.flatten(0, -2), *weights))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *weights):
        ctx.recomputed, kept = kept_for(x) if any(ctx.needs_input_grad[1:]) else (None, ())
        ctx.weights = len(weights) if ctx.needs_input_grad[0] else 0
        ctx.save_for_backward(*weights[: ctx.weights], *kept)
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    def backward(ctx, *grads):
        weights, kept = ctx.saved_tensors[: ctx.weights], ctx.saved_tensors[ctx.weights :]
        of_x = None
        for grad, weight in reversed(list(zip(grads, weights, strict=False))):
            # addmm is one operation more than the product; + is four.
            of_x = grad @ weight if of_x is None else torch.addmm(of_x, grad, weight)
        trains = ctx.needs_input_grad[1:]
        x = restore(ctx.recomputed, kept, grads[0]) if any(trains) else None
        return of_x, *(grad.t() @ x if each else None for grad, each in zip(grads, trains, strict=True))
