"""Gradients of a step: added up over its micro-batches, their global norm, clipping."""

import torch

from parallel.buckets import Buckets
from parallel.collectives import all_reduce


class GradientAccumulator:
    """This rank's sums over the micro-batches of a step so far.

    `grad_sums`: fp32 [parts, columns] of each bucket. `counts`: fp32 [n]. Where the micro-batches of a step
    are graphs of their own, the sums are tensors that stay (`persistent`) and change in place. Where the
    whole step is one graph, they exist only while it is recorded, and are None before.
    """

    def __init__(self, buckets: Buckets, num_counts: int, device: torch.device, persistent: bool):
        self._buckets, self._persistent = buckets, persistent
        self.grad_sums = [torch.zeros(shape).to(device) for shape in buckets.shapes] if persistent else None
        self.counts = torch.zeros(num_counts).to(device) if persistent else None

    def add(self, counts: torch.Tensor) -> None:
        """Add the parameters' gradients, which are cleared, and `counts` [n]."""
        self.grad_sums = self._buckets.take_gradients(self.grad_sums)
        self.counts = counts if self.counts is None else self.counts.add_(counts)

    def reset(self) -> None:
        """Begin the next step."""
        if self._persistent:
            for total in (*self.grad_sums, self.counts):
                total.zero_()
        else:
            self.grad_sums = self.counts = None


def global_norm(buckets: Buckets, gradients: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of the gradient of the whole model, fp32 [1], from this rank's part of each bucket.

    Each slice counts once: where `replicas` ranks hold the same slice, its squares are divided by that number
    before the sum.
    """
    squares = torch.stack(
        [
            (gradient * gradient).sum() / bucket.replicas
            for bucket, gradient in zip(buckets.buckets, gradients, strict=True)
        ]
    )
    mesh = buckets.mesh
    return all_reduce(squares.sum().reshape(1), mesh.world if buckets.parts > 1 else mesh.model).sqrt()


def clip_gradients(gradients: list[torch.Tensor], norm: torch.Tensor, max_norm: float) -> list[torch.Tensor]:
    """The gradients times min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ scales them."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return [gradient * factor for gradient in gradients]


def all_finite(values: torch.Tensor) -> torch.Tensor:
    """Whether no value is NaN or infinite: one bool on the device.

    Such a value minus itself is NaN. torch_xla computes torch.isfinite in float64, which NeuronCores lack.
    """
    return (values - values == 0).all()
