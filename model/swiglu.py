"""SwiGLU (https://arxiv.org/abs/2002.05202) with a backward of its own."""

import torch
import torch.nn.functional as F

from parallel.recomputed import recompute


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, computed in fp32; all three have one shape and dtype. Nothing but gate and up is kept
    for the backward."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        y = _swiglu(gate, up)
        ctx.recomputed = recompute(y, _swiglu, gate, up)
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.recomputed.sources(ctx.saved_tensors, grad)
        ctx.recomputed.forget()
        dtype, grad, gate, up = gate.dtype, grad.float(), gate.float(), up.float()
        sigmoid = torch.sigmoid(gate)
        of_gate = grad * up * (sigmoid * (1 + gate * (1 - sigmoid)))
        return of_gate.to(dtype), (grad * (gate * sigmoid)).to(dtype)


def _swiglu(gate, up):
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)
