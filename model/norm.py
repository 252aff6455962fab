"""RMSNorm with a backward of its own."""

import torch

from parallel.layers import ParallelLayer
from parallel.mesh import Group
from parallel.recomputed import recompute


class LlamaRMSNorm(ParallelLayer):
    """x / sqrt(mean(x^2) + eps) * weight of x [tokens, size], statistics in fp32.

    by_head: x has this rank's heads, so that the weight's gradient is a sum over the tensor parallel ranks.
    """

    def __init__(
        self,
        size: int,
        eps: float,
        dtype,
        device,
        sequence_parallel_enabled: bool = False,
        tensor_model_parallel_group: Group | None = None,
        by_head: bool = False,
    ):
        super().__init__(tensor_model_parallel_group, sequence_parallel_enabled)
        self.eps = eps
        self.add_parameter("weight", (size,), None, dtype, device, partial=by_head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.float()
        scale = torch.rsqrt((wide * wide).sum(-1, keepdim=True) / x.shape[-1] + eps)
        y = _norm(x, weight, scale)
        ctx.recomputed = recompute(y, _norm, x, weight, scale)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.recomputed.sources(ctx.saved_tensors, grad)
        ctx.recomputed.forget()
        grad, normed, grad_x, grad_weight = grad.float(), x.float() * scale, None, None
        if ctx.needs_input_grad[0]:
            grad_normed = grad * weight.float()
            mean = (grad_normed * normed).sum(-1, keepdim=True) / x.shape[-1]
            grad_x = ((grad_normed - normed * mean) * scale).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).sum(0).to(weight.dtype)
        return grad_x, grad_weight, None


def _norm(x, weight, scale):
    return (x.float() * scale * weight.float()).to(x.dtype)
